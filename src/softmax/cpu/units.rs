//! The units of work: segments of rows and tiles of rows, read in pieces that fit into the scratch memory, handed to the
//! vectorised loops, and written.

use super::kernels::{Blocks, Detail, Emit, EmitBlock, EmitTile, ReduceBlocks, ReduceTile, RowScalars, States};
use super::rows::{BLOCK, DEPTH, Extra, LANES, Logits, Place, Scratch, Strip};
use crate::cpu::element::{Element, Output, as_uninit};
use crate::cpu::math::{Baseline, Real, dispatch};
use std::mem::MaybeUninit;
use std::ops::Range;

/// What a pass reads.
#[derive(Clone, Copy)]
pub(super) struct Operands<'k, 'a, T: Element> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
}

impl<T: Element> Operands<'_, '_, T> {
    pub(super) fn reduce_strip(&self, detail: Detail, strip: &Strip, scratch: &mut Scratch<T::Acc>) -> States<T::Acc> {
        let mut states = States::EMPTY;
        let Scratch { x, extra: q, .. } = scratch;
        let (x, q) = (x.as_flattened_mut(), q.as_flattened_mut());
        let (rows, of) = (strip.rows.clone(), &strip.classes);
        for class in of.clone().step_by(BLOCK) {
            let block = class..(class + BLOCK).min(of.end);
            let mut qs: [&[_]; LANES] = [&[]; LANES];
            for ((row, q), qs) in rows.clone().zip(q.chunks_mut(block.len())).zip(&mut qs) {
                *qs = self.extra.load_block(row * self.logits.rows.classes + class, class, q).unwrap_or(&[]);
            }
            let blocks = Blocks {
                states: &mut states,
                next: self.logits.after(rows.end - 1, block.end),
                q: (!self.extra.is_none()).then_some(&qs[..rows.len()]),
                block: block.clone(),
                of: of.clone(),
                detail,
            };
            if self.logits.is_read_directly() {
                let mut xs: [&[_]; LANES] = [&[]; LANES];
                rows.clone().zip(&mut xs).for_each(|(row, xs)| *xs = self.logits.stored(row, &block));
                dispatch(ReduceBlocks { blocks, xs: &xs[..rows.len()] });
            } else {
                let mut xs: [&[_]; LANES] = [&[]; LANES];
                for ((row, x), xs) in rows.clone().zip(x.chunks_mut(block.len())).zip(&mut xs) {
                    self.logits.load(row, class, x, None);
                    *xs = x;
                }
                dispatch(ReduceBlocks { blocks, xs: &xs[..rows.len()] });
            }
        }
        states
    }

    pub(super) fn reduce_tile(&self, detail: Detail, place: &Place, scratch: &mut Scratch<T::Acc>) -> States<T::Acc> {
        let mut states = States::EMPTY;
        let Scratch { x, extra: q, .. } = scratch;
        let of = self.logits.rows.classes;
        for class in (0..of).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(of);
            let xs = self.logits.tile(place, &classes, x, None);
            let q = place.load_extra(self.extra, &classes, q);
            dispatch(ReduceTile { states: &mut states, classes, of, xs, q, detail });
        }
        states
    }

    pub(super) fn emit_strip<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &[RowScalars<T::Acc>; LANES],
        strip: &Strip,
        out: &Output<O>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        for (scalars, row) in scalars.iter().zip(strip.rows.clone()) {
            self.emit_segment(emit, scalars, row, strip.classes.clone(), out, scratch);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn emit_segment<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &RowScalars<T::Acc>,
        row: usize,
        classes: Range<usize>,
        out: &Output<O>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let capped = E::IN_LOGITS && self.logits.softcap.is_some();
        // in place, the own logit is gone once the segment is written
        let own = scalars.own.filter(|(class, _)| classes.contains(class));
        let own = own.map(|(class, weight)| (class, self.own_value(emit, scalars, row, class, weight)));
        let Scratch { x, e, extra: q, slope } = scratch;
        let (x, e, q, slope) =
            (x.as_flattened_mut(), e.as_flattened_mut(), q.as_flattened_mut(), slope.as_flattened_mut());
        for class in classes.clone().step_by(BLOCK) {
            let len = (classes.end - class).min(BLOCK);
            let at = row * self.logits.rows.classes + class;
            if !scalars.live {
                // SAFETY: each segment of each row is emitted by one unit
                unsafe { out.slice(at, len) }.fill(MaybeUninit::new(O::from_acc(T::Acc::ZERO)));
                continue;
            }
            let q = self.extra.load_block(at, class, &mut q[..len]);
            // SAFETY: as above; where the output replaces the logits, a copy of them is read
            let out = unsafe { out.slice(at, len) };
            if self.logits.is_read_directly() && !self.logits.in_place {
                let xs = self.logits.stored(row, &(class..class + len));
                emit_block(emit, scalars, xs, q, None, out, &mut e[..len]);
            } else {
                let (x, slope) = (&mut x[..len], &mut slope[..len]);
                self.logits.load(row, class, x, Some(slope));
                emit_block(emit, scalars, x, q, capped.then_some(&*slope), out, &mut e[..len]);
            }
        }
        if let Some((class, value)) = own {
            // SAFETY: as above, and no other slice of it is alive
            unsafe { out.slice(row * self.logits.rows.classes + class, 1)[0].write(O::from_acc(value)) };
        }
    }

    /// What is emitted at the row's own class, which adds to the extra number.
    fn own_value<E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &RowScalars<T::Acc>,
        row: usize,
        class: usize,
        weight: T::Acc,
    ) -> T::Acc {
        let (x, slope) = self.logits.get(row, class);
        let extra = match self.extra {
            Extra::Constant(v) => *v,
            Extra::Weights { factor, weight } => *factor * weight[class],
            Extra::None | Extra::Dense { .. } => T::Acc::ZERO,
        };
        emit.value::<Baseline>(scalars, x, weight + extra) * slope
    }

    /// `reduced`: whether the scratch memory is as [`Self::reduce_tile`] of the same tile left it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn emit_tile<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &[RowScalars<T::Acc>; LANES],
        place: &Place,
        reduced: bool,
        out: &Output<O>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let capped = E::IN_LOGITS && self.logits.softcap.is_some();
        let Scratch { x, e, extra: q, slope } = scratch;
        let of = self.logits.rows.classes;
        let loaded = reduced && of <= DEPTH && !capped;
        let has_own = scalars.iter().any(|row| row.own.is_some());
        for class in (0..of).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(of);
            if !loaded {
                self.logits.tile(place, &classes, x, Some(slope));
                place.load_extra(self.extra, &classes, q);
            }
            if has_own {
                if self.extra.is_none() {
                    q[..classes.len()].as_flattened_mut().fill(T::Acc::ZERO);
                }
                for (lane, row) in scalars.iter().enumerate() {
                    if let Some((class, weight)) = row.own
                        && classes.contains(&class)
                    {
                        q[class - classes.start][lane] += weight;
                    }
                }
            }
            let xs = &x[..classes.len()];
            let q = (has_own || !self.extra.is_none()).then_some(&q[..classes.len()]);
            let slope = capped.then_some(&slope[..]);
            let e = &mut e[..classes.len()];
            dispatch(EmitTile { emit, scalars, xs, q, slope, out: e });
            place.store(e, &classes, out);
        }
    }
}

/// Emits a block, by way of `e` if the output's type can't be written directly.
fn emit_block<S: Element, O: Element<Acc = S::Acc>, E: Emit<S::Acc>>(
    emit: &E,
    scalars: &RowScalars<S::Acc>,
    xs: &[S],
    q: Option<&[S::Acc]>,
    slope: Option<&[S::Acc]>,
    out: &mut [MaybeUninit<O>],
    e: &mut [S::Acc],
) {
    if O::INLINE {
        return dispatch(EmitBlock { emit, scalars, xs, q, slope, out });
    }
    dispatch(EmitBlock { emit, scalars, xs, q, slope, out: as_uninit(e) });
    O::narrow(e, out);
}

impl Place {
    /// Writes some classes of a tile.
    fn store<O: Element>(&self, e: &[[O::Acc; LANES]], classes: &Range<usize>, out: &Output<O>) {
        if self.write_adjacent && self.write_stride > 1 {
            for (e, class) in e.iter().zip(classes.clone()) {
                let at = self.write[0] + class * self.write_stride;
                // SAFETY: each row is emitted by one unit, after its logits were copied into the scratch
                O::narrow(&e[..self.lanes], unsafe { out.slice(at, self.lanes) });
            }
            return;
        }
        let mut row = [O::Acc::ZERO; DEPTH];
        let row = &mut row[..classes.len()];
        for lane in 0..self.lanes {
            let values = e.iter().map(|e| e[lane]);
            if self.write_stride > 1 {
                for (v, class) in values.zip(classes.clone()) {
                    // SAFETY: as above
                    let out = unsafe { out.slice(self.write[lane] + class * self.write_stride, 1) };
                    out[0].write(O::from_acc(v));
                }
                continue;
            }
            // SAFETY: as above
            let out = unsafe { out.slice(self.write[lane] + classes.start, classes.len()) };
            if O::INLINE {
                for (out, v) in out.iter_mut().zip(values) {
                    out.write(O::from_acc(v));
                }
            } else {
                row.iter_mut().zip(values).for_each(|(to, v)| *to = v);
                O::narrow(row, out);
            }
        }
    }
}
