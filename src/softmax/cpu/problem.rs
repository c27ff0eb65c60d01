//! Cross-entropy and NLL on one pair of tensors: targets, losses and gradients of rows.

use super::kernels::{Detail, LogitsGradient, RowLosses, RowScalars, States, log_sum};
use super::passes::{EmitAll, Finish, PerRow, Reduce, ReduceAndEmit};
use super::rows::{Engine, Extra, LANES, Logits};
use super::units::Operands;
use crate::cpu::element::{Element, Input, Output, Strided, source};
use crate::cpu::math::{Real, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::cpu::sum_in_order;
use crate::reduction::Reduction;
use crate::softmax::op::{Arg, CrossEntropy, Rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use std::mem::MaybeUninit;
use std::ops::Range;

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

    /// The classes of up to [`LANES`] adjacent rows.
    #[inline(always)]
    fn load(&self, rows: Range<usize>) -> [i64; LANES] {
        fn widen<I: Copy + Into<i64>>(from: &[I], to: &mut [i64; LANES]) {
            to.iter_mut().zip(from).for_each(|(to, &class)| *to = class.into());
        }
        let mut classes = [0; LANES];
        match self {
            Indices::U8(t) => widen(&t[rows], &mut classes),
            Indices::U32(t) => widen(&t[rows], &mut classes),
            Indices::I32(t) => widen(&t[rows], &mut classes),
            Indices::I64(t) => widen(&t[rows], &mut classes),
        }
        classes
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

/// The targets of up to [`LANES`] adjacent rows.
pub(super) struct RowTargets<A> {
    /// The class, inside the row by [`Targets::check`], and its weight times `keep`; 0 and 0 where there is none.
    pub(super) class: [usize; LANES],
    pub(super) weight: [A; LANES],
    /// Whether the row counts.
    pub(super) live: [bool; LANES],
}

impl<'a, A: Real> Targets<'a, A> {
    #[inline(always)]
    pub(super) fn rows(&self, rows: Range<usize>) -> RowTargets<A> {
        let mut targets = RowTargets { class: [0; LANES], weight: [A::ZERO; LANES], live: [true; LANES] };
        let Some(indices) = &self.indices else { return targets };
        for (lane, class) in indices.load(rows.clone()).into_iter().take(rows.len()).enumerate() {
            let live = class != self.ignore_index;
            let class = if live { class as usize } else { 0 };
            let weight = self.keep * self.weight.map_or(A::ONE, |weight| weight[class]);
            targets.class[lane] = class;
            targets.weight[lane] = if live { weight } else { A::ZERO };
            targets.live[lane] = live;
        }
        targets
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

    /// The losses of up to [`LANES`] adjacent rows.
    pub(super) fn losses(
        &self,
        rows: Range<usize>,
        targets: &RowTargets<T::Acc>,
        states: &States<T::Acc>,
    ) -> [T::Acc; LANES] {
        dispatch(RowLosses {
            states,
            own: &self.logits.pick(rows, &targets.class),
            weight: &targets.weight,
            live: &targets.live,
            extra: !self.targets.extra.is_none(),
            z_loss: T::Acc::of(self.options.z_loss),
        })
    }

    /// The losses of up to [`LANES`] adjacent rows of log-probabilities.
    fn nll(&self, rows: Range<usize>) -> [T::Acc; LANES] {
        let RowTargets { class, weight, .. } = self.targets.rows(rows.clone());
        let mut losses = self.logits.pick(rows, &class);
        for (loss, weight) in losses.iter_mut().zip(weight) {
            *loss = if weight == T::Acc::ZERO { T::Acc::ZERO } else { -weight * *loss };
        }
        losses
    }

    /// The numbers from which the gradient of a lane's row is made, `upstream` already over the denominator.
    pub(super) fn scalars(
        &self,
        targets: &RowTargets<T::Acc>,
        lane: usize,
        max: T::Acc,
        rest: T::Acc,
        mass: T::Acc,
        upstream: T::Acc,
    ) -> RowScalars<T::Acc> {
        if !targets.live[lane] {
            return RowScalars::DEAD;
        }
        let own = self.targets.indices.as_ref().map(|_| (targets.class[lane], targets.weight[lane]));
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
    fn finish(&self, rows: Range<usize>, states: &States<T::Acc>) {
        let count = self.problem.rows().count();
        let targets = self.problem.targets.rows(rows.clone());
        self.loss.set(rows.clone(), &self.problem.losses(rows.clone(), &targets, states));
        let kinds = [&states.max, &states.rest, &states.mass];
        for (kind, values) in kinds[..self.problem.kinds()].iter().enumerate() {
            self.statistics.set(kind * count + rows.start..kind * count + rows.end, values.as_slice());
        }
    }
}

/// The work of a row of NLL, one element that is rarely in the first cache: 4 ns.
const NLL_ROW: usize = 16;

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
            let losses = PerRow::new(&mut results.loss);
            for_each_task(rows.div_ceil(LANES), LANES * NLL_ROW, |tiles| {
                for first in tiles.map(|tile| tile * LANES) {
                    let rows = first..(first + LANES).min(rows);
                    losses.set(rows.clone(), &self.nll(rows));
                }
            });
        } else {
            let writer = RowResultsWriter {
                problem: self,
                loss: PerRow::new(&mut results.loss),
                statistics: PerRow::new(&mut results.statistics),
            };
            Reduce::run(self.operands(), Detail::Loss, writer);
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
        let scalars = |range: Range<usize>, _: &States<T::Acc>| {
            let targets = self.targets.rows(range.clone());
            RowScalars::of_rows(range, |lane, row| {
                let mass = if self.kinds() == 3 { statistics[2 * rows + row] } else { uniform_mass };
                let upstream = upstream_of(upstream, row, denominator);
                self.scalars(&targets, lane, statistics[row], statistics[rows + row], mass, upstream)
            })
        };
        EmitAll::run_into(self.operands(), LogitsGradient, scalars, out);
    }

    /// The gradient of NLL: nothing but each row's own class.
    pub(super) fn emit_log_probs_gradient(&self, upstream: &[T::Acc], denominator: T::Acc, out: &Output<T>) {
        let rows = self.rows();
        // SAFETY: no other slice of the output is alive
        unsafe { out.slice(0, rows.count() * rows.classes) }.fill(MaybeUninit::new(T::from_acc(T::Acc::ZERO)));
        for first in (0..rows.count()).step_by(LANES) {
            let range = first..(first + LANES).min(rows.count());
            let targets = self.targets.rows(range.clone());
            for (lane, row) in range.enumerate().filter(|(lane, _)| targets.live[*lane]) {
                let g = -(targets.weight[lane] * upstream_of(upstream, row, denominator));
                let at = rows.written_start(row) + targets.class[lane] * rows.written_stride();
                // SAFETY: as above
                unsafe { out.slice(at, 1)[0].write(T::from_acc(g)) };
            }
        }
    }

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    pub(super) fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let denominator = self.denominator()?;
        let acc_denominator = T::Acc::of(denominator);
        let rows_in_parts = matches!(self.logits.engine(), Engine::Blocks { segments: 2.., .. });
        let loss = if rows_in_parts || self.options.log_probs {
            let results = self.reduce();
            self.emit_gradient(&results.statistics, &[T::Acc::ONE], acc_denominator, out);
            results.loss
        } else {
            let mut loss = vec![T::Acc::ZERO; self.rows().count()];
            let losses = PerRow::new(&mut loss);
            let upstream = T::Acc::ONE / acc_denominator;
            let scalars = |rows: Range<usize>, states: &States<T::Acc>| {
                let targets = self.targets.rows(rows.clone());
                losses.set(rows.clone(), &self.losses(rows.clone(), &targets, states));
                RowScalars::of_rows(rows, |lane, _| {
                    let (max, rest, mass) = (states.max[lane], states.rest[lane], states.mass[lane]);
                    self.scalars(&targets, lane, max, rest, mass, upstream)
                })
            };
            ReduceAndEmit::run_into(self.operands(), LogitsGradient, scalars, out);
            loss
        };
        Ok(self.reduced(loss, denominator))
    }
}
