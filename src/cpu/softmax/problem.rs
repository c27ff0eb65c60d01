//! Cross-entropy and NLL on one pair of tensors: targets, losses and gradients of rows.

use super::kernels::{Detail, LogitsGradient, RowScalars, State, log_sum};
use super::passes::{EmitAll, Finish, PerRow, Reduce, UnitPass};
use super::rows::{Engine, Extra, LANES, Logits, Place, Scratch, Strip};
use super::units::Operands;
use crate::cpu::element::{Element, Input, Output, Strided, source};
use crate::cpu::math::Real;
use crate::cpu::{for_each_task, sum_in_order};
use crate::reduction::Reduction;
use crate::softmax::{Arg, CrossEntropy, Rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use std::mem::MaybeUninit;

/// Class indices of any dtype.
pub(super) enum Indices<'a> {
    U8(&'a [u8]),
    U32(&'a [u32]),
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl<'a> Indices<'a> {
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout, rows: usize) -> Result<Self> {
        let range = layout.start_offset()..layout.start_offset() + rows;
        Ok(match storage {
            CpuStorage::U8(t) => Indices::U8(&t[range]),
            CpuStorage::U32(t) => Indices::U32(&t[range]),
            CpuStorage::I32(t) => Indices::I32(&t[range]),
            CpuStorage::I64(t) => Indices::I64(&t[range]),
            other => bail!("class indices of dtype {:?}, expected u8, u32, i32 or i64", other.dtype()),
        })
    }

    #[inline(always)]
    pub(super) fn get(&self, row: usize) -> i64 {
        match self {
            Indices::U8(t) => t[row] as i64,
            Indices::U32(t) => t[row] as i64,
            Indices::I32(t) => t[row] as i64,
            Indices::I64(t) => t[row],
        }
    }
}

/// The targets of a cross-entropy: what each row's own class adds to the extra numbers q of all classes.
pub(super) struct Targets<'a, A> {
    pub(super) indices: Option<Indices<'a>>,
    /// What goes into the loss for every class: smoothing, or the probabilities.
    pub(super) extra: Extra<'a, A>,
    pub(super) ignore_index: i64,
    /// 1 - label smoothing
    pub(super) keep: A,
    pub(super) weight: Option<&'a [A]>,
    pub(super) classes: usize,
}

#[derive(Clone, Copy)]
pub(super) enum RowTarget<A> {
    Ignored,
    /// The class, inside the row by [`Targets::check`], and its weight times `keep`.
    Class(usize, A),
    Probabilities,
}

impl<'a, A: Real> Targets<'a, A> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> RowTarget<A> {
        let Some(indices) = &self.indices else { return RowTarget::Probabilities };
        let class = indices.get(row);
        if class == self.ignore_index {
            return RowTarget::Ignored;
        }
        let class = class as usize;
        RowTarget::Class(class, self.weight.map_or(A::ONE, |w| w[class]) * self.keep)
    }

    /// Checks every class index, and sums the weights of the rows that count.
    pub(super) fn check(&self, name: &str, rows: usize) -> Result<f64> {
        /// How many rows count, or nothing if a class is out of range.
        fn count<I: Copy + Into<i64>>(classes: &[I], ignore_index: i64, end: usize) -> Option<usize> {
            let (mut count, mut good) = (0, true);
            for &class in classes {
                let class = class.into();
                let counts = class != ignore_index;
                // as an unsigned number a negative class is a large one
                good &= !counts | ((class as u64) < end as u64);
                count += counts as usize;
            }
            good.then_some(count)
        }
        let Some(indices) = &self.indices else { return Ok(rows as f64) };
        let count = match indices {
            Indices::U8(t) => count(t, self.ignore_index, self.classes),
            Indices::U32(t) => count(t, self.ignore_index, self.classes),
            Indices::I32(t) => count(t, self.ignore_index, self.classes),
            Indices::I64(t) => count(t, self.ignore_index, self.classes),
        };
        let counted = (0..rows).map(|row| (row, indices.get(row))).filter(|(_, class)| *class != self.ignore_index);
        let Some(count) = count else {
            let bad = counted.into_iter().find(|(_, class)| *class < 0 || *class >= self.classes as i64);
            let (row, class) = bad.unwrap_or_default();
            bail!(
                "{name}: target {class} at row {row} is out of range, expected a class in 0..{} or the ignore_index {}",
                self.classes,
                self.ignore_index
            )
        };
        Ok(match self.weight {
            None => count as f64,
            Some(weight) => counted.map(|(_, class)| weight[class as usize].to_f64()).sum(),
        })
    }
}

/// One cross-entropy on one pair of tensors.
pub(super) struct Problem<'a, T: Element> {
    pub(super) options: &'a CrossEntropy,
    pub(super) logits: Logits<'a, T>,
    pub(super) targets: Targets<'a, T::Acc>,
}

impl<'a, T: Element> Problem<'a, T> {
    pub(super) fn new(
        options: &'a CrossEntropy,
        x: Input<'a, T>,
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        weight: Option<&'a [T::Acc]>,
    ) -> Result<Self> {
        let of = <T::Acc as Real>::of;
        let e = options.label_smoothing;
        let spread = of(e / rows.classes.max(1) as f64);
        let (indices, extra) = if !target.0.dtype().is_float() {
            let extra = match weight {
                _ if e == 0.0 => Extra::None,
                None => Extra::Constant(spread),
                Some(weight) => Extra::Weights { factor: spread, weight },
            };
            (Some(Indices::new(target.0, target.1, rows.count())?), extra)
        } else {
            let order = options.target_rows(target.1, &rows)?;
            let order = Strided::new(order.offset, order.axes(rows.class_last()));
            let source = source(target.0, order)?;
            (None, Extra::Dense { source, keep: of(1.0 - e), spread, weight })
        };
        let targets = Targets {
            indices,
            extra,
            ignore_index: options.ignore_index,
            keep: of(1.0 - e),
            weight,
            classes: rows.classes,
        };
        let mut logits = Logits::new(x, rows);
        logits.scale = of(options.logit_scale);
        logits.softcap = options.softcap.map(of);
        Ok(Problem { options, logits, targets })
    }

    pub(super) fn operands(&self) -> Operands<'_, 'a, T> {
        Operands { logits: &self.logits, extra: &self.targets.extra }
    }

    pub(super) fn rows(&self) -> &Rows {
        &self.logits.rows
    }

    /// What the sum of the rows' losses is divided by, after a check of every class index.
    pub(super) fn denominator(&self) -> Result<f64> {
        let total = self.targets.check(self.options.name, self.rows().count())?;
        Ok(match (self.options.reduction, self.options.normalizer) {
            (Reduction::Mean, Some(normalizer)) => normalizer,
            (Reduction::Mean, None) => total,
            (Reduction::None | Reduction::Sum, _) => 1.0,
        })
    }

    /// The loss of a row.
    pub(super) fn loss(&self, row: usize, target: RowTarget<T::Acc>, state: &State<T::Acc>) -> T::Acc {
        let zero = T::Acc::ZERO;
        let (own, class) = match target {
            RowTarget::Ignored => return zero,
            RowTarget::Class(class, own) => (own, class),
            RowTarget::Probabilities => (zero, 0),
        };
        let log_sum = state.log_sum;
        let mut loss = if own == zero {
            // still NaN in a row without a softmax
            zero * log_sum
        } else {
            own * (log_sum - (self.logits.get(row, class).0 - state.max))
        };
        if !self.targets.extra.is_none() {
            loss += state.mass * log_sum - state.linear;
        }
        loss + self.z_loss(state.max + log_sum)
    }

    /// The loss of a row of log-probabilities.
    #[inline(always)]
    fn nll(&self, row: usize) -> T::Acc {
        match self.targets.row(row) {
            RowTarget::Class(class, own) if own != T::Acc::ZERO => -own * self.logits.get(row, class).0,
            _ => T::Acc::ZERO,
        }
    }

    pub(super) fn z_loss(&self, lse: T::Acc) -> T::Acc {
        match self.options.z_loss {
            0.0 => T::Acc::ZERO,
            z => T::Acc::of(z) * lse * lse,
        }
    }

    /// The numbers from which a row's gradient is made, `upstream` already over the denominator.
    pub(super) fn scalars(
        &self,
        target: RowTarget<T::Acc>,
        max: T::Acc,
        rest: T::Acc,
        mass: T::Acc,
        upstream: T::Acc,
    ) -> RowScalars<T::Acc> {
        let own = match target {
            RowTarget::Ignored => return RowScalars::DEAD,
            RowTarget::Class(class, own) => Some((class, own)),
            RowTarget::Probabilities => None,
        };
        let mut scalars = RowScalars::new(max, rest);
        scalars.upstream = upstream * self.logits.scale;
        scalars.own = own;
        scalars.mass = own.map_or(T::Acc::ZERO, |(_, weight)| weight) + mass;
        scalars.slope = match self.options.z_loss {
            0.0 => scalars.mass,
            z => scalars.mass + T::Acc::of(2.0 * z) * (scalars.max + log_sum(max, rest)),
        };
        scalars
    }
}

/// Each row's loss, and what the backward needs of it.
pub(super) struct RowResults<A> {
    pub(super) loss: Vec<A>,
    /// max, rest and, with probability targets, mass of all rows: see [`State`]
    pub(super) statistics: Vec<A>,
}

pub(super) struct RowResultsWriter<'p, 'a, T: Element> {
    pub(super) problem: &'p Problem<'a, T>,
    pub(super) loss: PerRow<'p, T::Acc>,
    pub(super) statistics: PerRow<'p, T::Acc>,
}

impl<T: Element> Finish<T::Acc> for RowResultsWriter<'_, '_, T> {
    fn finish(&self, row: usize, state: &State<T::Acc>) {
        let rows = self.problem.rows().count();
        self.loss.set(row, self.problem.loss(row, self.problem.targets.row(row), state));
        let kinds = [state.max, state.rest, state.mass];
        for (kind, value) in kinds[..self.problem.kinds()].iter().enumerate() {
            self.statistics.set(kind * rows + row, *value);
        }
    }
}

/// How many elements of a vector loop a row of NLL, which is one element that is rarely in a cache, is worth.
const NLL_ROW: usize = 4;

/// The upstream gradient of a row over the denominator.
#[inline(always)]
pub(super) fn upstream_of<A: Real>(upstream: &[A], row: usize, denominator: A) -> A {
    upstream[if upstream.len() == 1 { 0 } else { row }] / denominator
}

impl<'a, T: Element> Problem<'a, T> {
    /// How many numbers of a row the backward needs.
    pub(super) fn kinds(&self) -> usize {
        match (&self.targets.indices, self.options.log_probs) {
            (_, true) => 0,
            (Some(_), _) => 2,
            (None, _) => 3,
        }
    }

    pub(super) fn reduce(&self) -> RowResults<T::Acc> {
        let rows = self.rows().count();
        let mut results =
            RowResults { loss: vec![T::Acc::ZERO; rows], statistics: vec![T::Acc::ZERO; rows * self.kinds()] };
        if self.options.log_probs {
            let losses = Output::in_place(&mut results.loss).1;
            for_each_task(rows, NLL_ROW, |rows| {
                // SAFETY: a row belongs to one task, and nothing reads the losses before all tasks are done
                let losses = unsafe { losses.slice(rows.start, rows.len()) };
                for (row, loss) in rows.zip(losses) {
                    loss.write(self.nll(row));
                }
            });
        } else {
            let writer = RowResultsWriter {
                problem: self,
                loss: PerRow::new(&mut results.loss),
                statistics: PerRow::new(&mut results.statistics),
            };
            Reduce::run(&self.logits, &self.targets.extra, Detail::Loss, writer);
        }
        results
    }

    /// What `forward` returns for the rows' losses.
    pub(super) fn reduced(&self, loss: Vec<T::Acc>, denominator: f64) -> CpuStorage {
        T::Acc::to_cpu_storage_owned(match self.options.reduction {
            Reduction::None => loss,
            Reduction::Mean | Reduction::Sum => vec![T::Acc::of(sum_in_order(&loss) / denominator)],
        })
    }

    /// The sum of the extra numbers of a row where they are the same in all rows.
    pub(super) fn uniform_mass(&self) -> T::Acc {
        match &self.targets.extra {
            Extra::Constant(_) => T::Acc::of(self.options.label_smoothing),
            Extra::Weights { factor, weight } => T::Acc::of(factor.to_f64() * sum_in_order(weight)),
            Extra::None | Extra::Dense { .. } => T::Acc::ZERO,
        }
    }

    /// Writes the gradient from the rows' results.
    pub(super) fn emit_gradient(
        &self,
        statistics: &[T::Acc],
        upstream: &[T::Acc],
        denominator: T::Acc,
        out: &Output<T>,
    ) {
        if self.options.log_probs {
            return self.emit_log_probs_gradient(upstream, denominator, out);
        }
        let rows = self.rows().count();
        let uniform_mass = self.uniform_mass();
        let scalars = |row: usize| {
            let mass = if self.kinds() == 3 { statistics[2 * rows + row] } else { uniform_mass };
            let upstream = upstream_of(upstream, row, denominator);
            self.scalars(self.targets.row(row), statistics[row], statistics[rows + row], mass, upstream)
        };
        let engine = self.logits.engine();
        let Operands { logits, extra } = self.operands();
        logits.for_each_unit(engine, &EmitAll { logits, extra, engine, emit: LogitsGradient, scalars, out });
    }

    /// The gradient of NLL: nothing but each row's own class.
    pub(super) fn emit_log_probs_gradient(&self, upstream: &[T::Acc], denominator: T::Acc, out: &Output<T>) {
        let rows = self.rows();
        // SAFETY: no other slice of the output is alive
        unsafe { out.slice(0, rows.count() * rows.classes) }.fill(MaybeUninit::new(T::from_acc(T::Acc::ZERO)));
        for row in 0..rows.count() {
            if let RowTarget::Class(class, own) = self.targets.row(row) {
                let g = -(own * upstream_of(upstream, row, denominator));
                let at = rows.written_start(row) + class * rows.written_stride();
                // SAFETY: as above
                unsafe { out.slice(at, 1)[0].write(T::from_acc(g)) };
            }
        }
    }

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    pub(super) fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let denominator = self.denominator()?;
        let acc_denominator = T::Acc::of(denominator);
        let engine = self.logits.engine();
        let rows_in_parts = matches!(engine, Engine::Blocks { segments: 2.., .. });
        let loss = if rows_in_parts || self.options.log_probs {
            let results = self.reduce();
            self.emit_gradient(&results.statistics, &[T::Acc::ONE], acc_denominator, out);
            results.loss
        } else {
            let mut loss = vec![T::Acc::ZERO; self.rows().count()];
            let upstream = T::Acc::ONE / acc_denominator;
            let pass = Fused { problem: self, engine, loss: PerRow::new(&mut loss), upstream, out };
            self.logits.for_each_unit(engine, &pass);
            loss
        };
        Ok(self.reduced(loss, denominator))
    }
}

impl Place {
    pub(super) fn scalars<A: Real>(&self, of_row: impl Fn(usize) -> RowScalars<A>) -> [RowScalars<A>; LANES] {
        let mut lanes = [RowScalars::DEAD; LANES];
        (0..self.lanes).for_each(|lane| lanes[lane] = of_row(self.first + lane));
        lanes
    }
}

/// Reduces each row and emits its gradient while the row is in the cache.
pub(super) struct Fused<'p, 'a, T: Element> {
    pub(super) problem: &'p Problem<'a, T>,
    pub(super) engine: Engine,
    pub(super) loss: PerRow<'p, T::Acc>,
    pub(super) upstream: T::Acc,
    pub(super) out: &'p Output<'p, T>,
}

impl<T: Element> UnitPass<T::Acc> for Fused<'_, '_, T> {
    fn unit(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        let Problem { logits, targets, .. } = self.problem;
        let operands = self.problem.operands();
        let finish = |row: usize, state: &State<T::Acc>| {
            let target = targets.row(row);
            self.loss.set(row, self.problem.loss(row, target, state));
            self.problem.scalars(target, state.max, state.rest, state.mass, self.upstream)
        };
        match self.engine {
            Engine::Blocks { rows, segments } => {
                let strip = Strip::new(unit, rows, segments, &logits.rows);
                let states = operands.reduce_strip(Detail::Loss, &strip, scratch);
                for (lane, row) in strip.rows.enumerate() {
                    let scalars = finish(row, &states.get(lane));
                    operands.emit_segment(&LogitsGradient, &scalars, row, strip.classes.clone(), self.out, scratch);
                }
            }
            Engine::Tiles => {
                let place = Place::new(&logits.rows, unit);
                let states = operands.reduce_tile(Detail::Loss, &place, scratch);
                let lanes = place.scalars(|row| finish(row, &states.get(row - place.first)));
                operands.emit_tile(&LogitsGradient, &lanes, &place, true, self.out, scratch);
            }
        }
    }
}
