//! Cross-entropy on one pair of tensors: targets, losses, and the numbers of which gradients are made.

use super::kernels::{RowLosses, RowScalars, RowTargets, States, log_sum};
use super::logits::{Logits, TargetDistribution};
use crate::cpu::element::{Element, Input, Strided, source};
use crate::cpu::indices::Indices;
use crate::cpu::math::{LANES, Real, dispatch};
use crate::cpu::{own_slice, sum_in_order};
use crate::custom_op::Arg;
use crate::rows::cpu::{ignore_weightless, row_weights};
use crate::rows::layout::Rows;
use crate::rows::options::LockedRowOptions;
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
use crate::softmax::transform::RowTransform;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, WithDType};
use std::borrow::Cow;
use std::ops::Range;

/// One cross-entropy on one pair of tensors.
pub(super) struct RowProblem<'a, T: Element> {
    pub(super) problem: &'a CrossEntropy,
    pub(super) options: &'a SoftmaxOptions,
    pub(super) logits: Logits<'a, T>,
    /// What goes into the loss for every class: smoothing, or the probabilities.
    pub(super) q: TargetDistribution<'a, T::Acc>,
    /// The rows' own classes, which add `keep` times their weight to q; `keep` is 1 - label smoothing.
    pub(super) indices: Option<Indices<'a>>,
    pub(super) keep: T::Acc,
    pub(super) weight: Option<&'a [T::Acc]>,
    /// A factor of each row, 0 where it doesn't count.
    pub(super) row_weight: Option<Cow<'a, [T::Acc]>>,
    /// What the sum of the rows' losses is divided by, once every class index is checked.
    pub(super) denominator: f64,
}

impl<'a, T: Element> RowProblem<'a, T> {
    pub(super) fn new(
        problem: &'a CrossEntropy,
        x: Input<'a, T>,
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        locked: &'a LockedRowOptions,
    ) -> Result<Self> {
        let CrossEntropy { name, options, .. } = problem;
        let [weight, row_weight, _] = locked.args(name)?;
        let weight = weight.map(own_slice).transpose()?;
        let row_weight = row_weights(row_weight)?;
        let of = <T::Acc as Real>::of;
        let keep = of(1.0 - options.label_smoothing);
        let spread = of(options.label_smoothing / rows.classes.max(1) as f64);
        let (indices, q) = if !target.0.dtype().is_float() {
            let q = match weight {
                _ if options.label_smoothing == 0.0 => TargetDistribution::None,
                None => TargetDistribution::Constant(spread),
                Some(weight) => TargetDistribution::Weights { factor: spread, weight },
            };
            (Some(Indices::new(name, rows.count(), target)?), q)
        } else {
            let order = problem.target_rows(target.1, &rows)?;
            let order = Strided::new(order.offset, order.axes(rows.class_last()));
            (None, TargetDistribution::Dense { source: source(target.0, order)?, keep, spread, weight })
        };
        let (scale, factor) = options.split_scale();
        let logits = Logits { x, rows, scale: of(scale), softcap: options.softcap.map(of), factor: of(factor) };
        let total = match &indices {
            Some(indices) => {
                let ignore_index = options.rows.ignore_index;
                indices.total(name, ignore_index, rows.classes, (weight, row_weight.as_deref()))?
            }
            None => row_weight.as_ref().map_or(rows.count() as f64, |weights| sum_in_order(weights)),
        };
        let denominator = problem.form.denominator(|| total)?;
        Ok(RowProblem { problem, options, logits, q, indices, keep, weight, row_weight, denominator })
    }

    pub(super) fn rows(&self) -> &Rows {
        &self.logits.rows
    }

    /// The targets of up to [`LANES`] adjacent rows. A class is inside its row by the check of [`Self::new`].
    #[inline(always)]
    pub(super) fn targets(&self, rows: Range<usize>) -> RowTargets<T::Acc> {
        let mut targets = RowTargets::NONE;
        let ignored = self.options.rows.ignore_index;
        let Some(indices) = &self.indices else {
            if let Some(weights) = &self.row_weight {
                targets.live.iter_mut().zip(&weights[rows]).for_each(|(live, w)| *live = *w != T::Acc::ZERO);
            }
            return targets;
        };
        let mut classes = indices.load(rows.clone());
        if let Some(weights) = &self.row_weight {
            ignore_weightless(&mut classes, &weights[rows.clone()], ignored);
        }
        for (lane, class) in classes.into_iter().take(rows.len()).enumerate() {
            let live = class != ignored;
            let class = if live { class as usize } else { 0 };
            let weight = self.keep * self.weight.map_or(T::Acc::ONE, |weight| weight[class]);
            targets.class[lane] = class;
            targets.weight[lane] = if live { weight } else { T::Acc::ZERO };
            targets.live[lane] = live;
        }
        targets
    }

    /// Multiplies the own classes' weights by the slopes of their transformed terms.
    pub(super) fn transform(targets: &mut RowTargets<T::Acc>, slopes: Option<&[T::Acc]>) {
        for (weight, &slope) in targets.weight.iter_mut().zip(slopes.unwrap_or_default()) {
            *weight *= slope;
        }
    }

    /// Multiplies numbers of rows by the weights of those that count.
    #[inline(always)]
    pub(super) fn weigh(&self, rows: Range<usize>, targets: &RowTargets<T::Acc>, values: &mut [T::Acc; LANES]) {
        let Some(weights) = &self.row_weight else { return };
        for ((value, &weight), live) in values.iter_mut().zip(&weights[rows]).zip(targets.live) {
            *value = if live { weight * *value } else { T::Acc::ZERO };
        }
    }

    /// The losses of up to [`LANES`] adjacent rows, and with a row transform its slopes.
    ///
    /// # Safety
    /// Where the logits are replaced in place, nobody writes those of the rows meanwhile.
    pub(super) unsafe fn losses(
        &self,
        rows: Range<usize>,
        targets: &RowTargets<T::Acc>,
        states: &States<T::Acc>,
    ) -> ([T::Acc; LANES], Option<[T::Acc; LANES]>) {
        // SAFETY: this function has the same contract
        let own = unsafe { self.logits.pick(rows.clone(), &targets.class) };
        let (has_q, z_loss) = (!self.q.is_none(), T::Acc::of(self.options.z_loss));
        let transformed = self.options.row_transform.map(|transform| transformed(transform, states, &own, rows.len()));
        let (values, slopes) = transformed.unzip();
        let mut losses = dispatch(RowLosses { states, targets, own: &own, nll: values.as_ref(), has_q, z_loss });
        self.weigh(rows, targets, &mut losses);
        (losses, slopes)
    }

    /// The numbers of which the gradient of up to [`LANES`] adjacent rows is made, from what the rows were reduced to.
    /// The upstream gradient is over the denominator already.
    pub(super) fn gradient_scalars(
        &self,
        rows: Range<usize>,
        targets: &RowTargets<T::Acc>,
        max: &[T::Acc],
        rest: &[T::Acc],
        mass: &[T::Acc],
        mut upstream: [T::Acc; LANES],
    ) -> RowScalars<[T::Acc; LANES]> {
        self.weigh(rows, targets, &mut upstream);
        let mut scalars = RowScalars::of_softmax(max, rest);
        for (lane, ((&max, &rest), &mass)) in max.iter().zip(rest).zip(mass).enumerate() {
            let of_z_loss = match self.options.z_loss {
                0.0 => T::Acc::ZERO,
                z => T::Acc::of(2.0 * z) * (self.logits.factor * max + log_sum(max, rest)),
            };
            let upstream = upstream[lane] * T::Acc::of(self.options.logit_scale);
            scalars.set_gradient(lane, targets.weight[lane] + mass, of_z_loss, upstream);
        }
        scalars
    }

    /// The sum of a row's q where it is the same in all rows.
    pub(super) fn uniform_mass(&self) -> T::Acc {
        match &self.q {
            TargetDistribution::Constant(_) => T::Acc::of(self.options.label_smoothing),
            TargetDistribution::Weights { factor, weight } => T::Acc::of(factor.to_f64() * sum_in_order(weight)),
            TargetDistribution::None | TargetDistribution::Dense { .. } => T::Acc::ZERO,
        }
    }

    /// The first class of the largest probability in a target row.
    pub(super) fn most_probable(&self, row: usize) -> usize {
        let TargetDistribution::Dense { source, .. } = &self.q else { return 0 };
        let rows = self.rows();
        let (start, stride) = (rows.written_start(row), rows.written_stride());
        let mut best = (T::Acc::NEG_INFINITY, 0);
        for class in 0..rows.classes {
            let mut t = [T::Acc::ZERO];
            source.load(start + class * stride, &mut t);
            if t[0] > best.0 {
                best = (t[0], class);
            }
        }
        best.1
    }
}

/// Values and slopes of a transform of the negative log-likelihoods of some rows' own classes, of which these are the
/// logits.
fn transformed<A: Real>(
    transform: RowTransform,
    states: &States<A>,
    own: &[A; LANES],
    rows: usize,
) -> ([A; LANES], [A; LANES]) {
    let (mut values, mut slopes) = ([A::ZERO; LANES], [A::ZERO; LANES]);
    for lane in 0..rows.min(LANES) {
        let nll = states.log_sum[lane] - states.scale * (own[lane] - states.max[lane]);
        let (value, slope) = transform.at(nll.to_f64());
        (values[lane], slopes[lane]) = (A::of(value), A::of(slope));
    }
    (values, slopes)
}
