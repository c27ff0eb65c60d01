//! Passes over all rows, cut into units of work that run in parallel.

use super::kernels::{Detail, Emit, RowScalars, State, States};
use super::rows::{Engine, LANES, Place, Scratch, Strip};
use super::units::Operands;
use crate::cpu::element::{Element, Output, build};
use crate::cpu::math::Real;
use std::ops::Range;

/// One pass over the logits, cut into units that don't depend on each other.
pub(super) trait UnitPass<A: Real>: Sync {
    /// The work of a logit: 1 to reduce it, 2 to emit a value for it.
    const WORK: usize = 2;

    fn unit(&self, unit: usize, scratch: &mut Scratch<A>);
}

/// What a pass does with the states of up to [`LANES`] adjacent rows.
pub(super) trait Finish<A: Real>: Sync {
    fn finish(&self, rows: Range<usize>, states: &States<A>);
}

/// Reduces every row.
pub(super) struct Reduce<'p, 'a, T: Element, F> {
    operands: Operands<'p, 'a, T>,
    engine: Engine,
    detail: Detail,
    finish: F,
    /// One state for each unit, where a unit is only part of a row.
    parts: Option<Output<'p, State<T::Acc>>>,
}

impl<'p, 'a, T: Element, F: Finish<T::Acc>> Reduce<'p, 'a, T, F> {
    pub(super) fn run(operands: Operands<'p, 'a, T>, detail: Detail, finish: F) {
        let logits = operands.logits;
        let engine = logits.engine();
        let Engine::Blocks { segments: segments @ 2.., .. } = engine else {
            return logits.for_each_unit(engine, &Reduce { operands, engine, detail, finish, parts: None });
        };
        let mut parts = vec![State::EMPTY; logits.units(engine)];
        let pass = Reduce { operands, engine, detail, finish: (), parts: Some(Output::in_place(&mut parts).1) };
        logits.for_each_unit(engine, &pass);
        for (row, parts) in parts.chunks(segments).enumerate() {
            let mut state = parts[0];
            parts[1..].iter().for_each(|part| state.merge(part));
            finish.finish(row..row + 1, &States::one(state.complete()));
        }
    }
}

impl<A: Real> Finish<A> for () {
    fn finish(&self, _: Range<usize>, _: &States<A>) {}
}

impl<T: Element, F: Finish<T::Acc>> UnitPass<T::Acc> for Reduce<'_, '_, T, F> {
    const WORK: usize = 1;

    fn unit(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        match self.engine {
            Engine::Blocks { rows, segments } => {
                let strip = Strip::new(unit, rows, segments, &self.operands.logits.rows);
                let states = self.operands.reduce_strip(self.detail, &strip, scratch);
                if let Some(parts) = &self.parts {
                    // SAFETY: this unit alone writes its element
                    unsafe { parts.slice(unit, 1)[0].write(states.get(0)) };
                    return;
                }
                self.finish.finish(strip.rows, &states);
            }
            Engine::Tiles => {
                let place = Place::new(&self.operands.logits.rows, unit);
                let states = self.operands.reduce_tile(self.detail, &place, scratch);
                self.finish.finish(place.rows(), &states);
            }
        }
    }
}

/// One value for each row, written by the tasks that own the rows.
pub(super) struct PerRow<'a, A>(Output<'a, A>);

impl<'a, A: Copy> PerRow<'a, A> {
    pub(super) fn new(values: &'a mut [A]) -> Self {
        PerRow(Output::in_place(values).1)
    }

    /// Sets the values of some rows to the first of `values`.
    pub(super) fn set(&self, rows: Range<usize>, values: &[A]) {
        // SAFETY: a row is finished by one task, and nothing reads the values before all tasks are done
        let to = unsafe { self.0.slice(rows.start, rows.len()) };
        for (to, &value) in to.iter_mut().zip(values) {
            to.write(value);
        }
    }
}

/// Emits a value for every logit from the numbers of its row. With `REDUCE` they are made of the row's state, which is reduced
/// first, while the row comes into the cache; no row may be split then. Without it all states are empty.
pub(super) struct Emission<'p, 'a, T: Element, O, E, S, const REDUCE: bool> {
    operands: Operands<'p, 'a, T>,
    engine: Engine,
    emit: E,
    scalars: S,
    out: &'p Output<'p, O>,
}

pub(super) type EmitAll<'p, 'a, T, O, E, S> = Emission<'p, 'a, T, O, E, S, false>;
pub(super) type ReduceAndEmit<'p, 'a, T, O, E, S> = Emission<'p, 'a, T, O, E, S, true>;

impl<'p, 'a, T, O, E, S, const REDUCE: bool> Emission<'p, 'a, T, O, E, S, REDUCE>
where
    T: Element,
    O: Element<Acc = T::Acc>,
    E: Emit<T::Acc>,
    S: Fn(Range<usize>, &States<T::Acc>) -> [RowScalars<T::Acc>; LANES] + Sync,
{
    pub(super) fn run(operands: Operands<'p, 'a, T>, emit: E, scalars: S) -> Vec<O> {
        let rows = &operands.logits.rows;
        // SAFETY: every row is emitted whole
        unsafe {
            build(rows.count() * rows.classes, |out| {
                Emission::<T, O, E, S, REDUCE>::run_into(operands, emit, scalars, out)
            })
        }
    }

    pub(super) fn run_into(operands: Operands<'p, 'a, T>, emit: E, scalars: S, out: &'p Output<'p, O>) {
        let engine = operands.logits.engine();
        operands.logits.for_each_unit(engine, &Emission::<T, O, E, S, REDUCE> { operands, engine, emit, scalars, out });
    }
}

impl<T, O, E, S, const REDUCE: bool> UnitPass<T::Acc> for Emission<'_, '_, T, O, E, S, REDUCE>
where
    T: Element,
    O: Element<Acc = T::Acc>,
    E: Emit<T::Acc>,
    S: Fn(Range<usize>, &States<T::Acc>) -> [RowScalars<T::Acc>; LANES] + Sync,
{
    fn unit(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        let Self { operands, emit, out, .. } = self;
        match self.engine {
            Engine::Blocks { rows, segments } => {
                let strip = Strip::new(unit, rows, segments, &operands.logits.rows);
                let states = if REDUCE { operands.reduce_strip(Detail::Loss, &strip, scratch) } else { States::EMPTY };
                operands.emit_strip(emit, &(self.scalars)(strip.rows.clone(), &states), &strip, out, scratch);
            }
            Engine::Tiles => {
                let place = Place::new(&operands.logits.rows, unit);
                let states = if REDUCE { operands.reduce_tile(Detail::Loss, &place, scratch) } else { States::EMPTY };
                operands.emit_tile(emit, &(self.scalars)(place.rows(), &states), &place, REDUCE, out, scratch);
            }
        }
    }
}
