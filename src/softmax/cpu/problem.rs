//! Cross-entropy and NLL on one pair of tensors: targets, losses and gradients of rows.

use super::kernels::{Detail, LogitsGradient, RowLosses, RowScalars, States, log_sum};
use super::passes::{EmitAll, Finish, PerRow, Reduce, ReduceAndEmit};
use super::rows::{Engine, Extra, LANES, Logits};
use super::units::Operands;
use crate::cpu::element::{Element, Input, Output, Strided, source};
use crate::cpu::indices::Indices;
use crate::cpu::math::{Real, dispatch};
use crate::cpu::{own_slice, sum_in_order};
use crate::custom_op::{Arg, Locked};
use crate::reduction::Reduction;
use crate::rows::Rows;
use crate::softmax::problem::CrossEntropy;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, WithDType};
use std::ops::Range;

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
        match &self.indices {
            Some(indices) => indices.total(name, self.ignore_index, self.classes, self.weight),
            None => Ok(rows as f64),
        }
    }
}

/// One cross-entropy on one pair of tensors.
pub(super) struct RowProblem<'a, T: Element> {
    pub(super) options: &'a CrossEntropy,
    pub(super) logits: Logits<'a, T>,
    pub(super) targets: Targets<'a, T::Acc>,
}

impl<'a, T: Element> RowProblem<'a, T> {
    pub(super) fn new(
        options: &'a CrossEntropy,
        x: Input<'a, T>,
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        weight: &'a Option<Locked>,
    ) -> Result<Self> {
        let weight = weight.as_ref().map(|weight| own_slice(weight.arg(options.name)?)).transpose()?;
        let of = <T::Acc as Real>::of;
        let e = options.options.label_smoothing;
        let spread = of(e / rows.classes.max(1) as f64);
        let (indices, extra) = if !target.0.dtype().is_float() {
            let extra = match weight {
                _ if e == 0.0 => Extra::None,
                None => Extra::Constant(spread),
                Some(weight) => Extra::Weights { factor: spread, weight },
            };
            (Some(Indices::new(options.name, target.0, target.1)?), extra)
        } else {
            let order = options.target_rows(target.1, &rows)?;
            let order = Strided::new(order.offset, order.axes(rows.class_last()));
            let source = source(target.0, order)?;
            (None, Extra::Dense { source, keep: of(1.0 - e), spread, weight })
        };
        let targets = Targets {
            indices,
            extra,
            ignore_index: options.options.rows.ignore_index,
            keep: of(1.0 - e),
            weight,
            classes: rows.classes,
        };
        let mut logits = Logits::new(x, rows);
        logits.scale = of(options.options.logit_scale);
        logits.softcap = options.options.softcap.map(of);
        Ok(RowProblem { options, logits, targets })
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
        Ok(self.options.options.rows.denominator(total))
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
            z_loss: T::Acc::of(self.options.options.z_loss),
        })
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
        scalars.slope = match self.options.options.z_loss {
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
    pub(super) problem: &'p RowProblem<'a, T>,
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

/// The upstream gradient of a row over the denominator.
#[inline(always)]
pub(super) fn upstream_of<A: Real>(upstream: &[A], row: usize, denominator: A) -> A {
    upstream[if upstream.len() == 1 { 0 } else { row }] / denominator
}

impl<'a, T: Element> RowProblem<'a, T> {
    /// How many numbers of a row the backward needs.
    pub(super) fn kinds(&self) -> usize {
        if self.targets.indices.is_some() { 2 } else { 3 }
    }

    pub(super) fn reduce(&self) -> RowResults<T::Acc> {
        let rows = self.rows().count();
        let mut results =
            RowResults { loss: vec![T::Acc::ZERO; rows], statistics: vec![T::Acc::ZERO; rows * self.kinds()] };
        let writer = RowResultsWriter {
            problem: self,
            loss: PerRow::new(&mut results.loss),
            statistics: PerRow::new(&mut results.statistics),
        };
        Reduce::run(self.operands(), Detail::Loss, writer);
        results
    }

    /// What `forward` returns for the rows' losses.
    pub(super) fn reduced(&self, loss: Vec<T::Acc>, denominator: f64) -> CpuStorage {
        T::Acc::to_cpu_storage_owned(match self.options.options.rows.reduction {
            Reduction::None => loss,
            Reduction::Mean | Reduction::Sum => vec![T::Acc::of(sum_in_order(&loss) / denominator)],
        })
    }

    /// The sum of the extra numbers of a row where they are the same in all rows.
    pub(super) fn uniform_mass(&self) -> T::Acc {
        match &self.targets.extra {
            Extra::Constant(_) => T::Acc::of(self.options.options.label_smoothing),
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

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    pub(super) fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let denominator = self.denominator()?;
        let acc_denominator = T::Acc::of(denominator);
        let rows_in_parts = matches!(self.logits.engine(), Engine::Blocks { segments: 2.., .. });
        let loss = if rows_in_parts {
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
