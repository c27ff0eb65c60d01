//! The entry points: the passes of which each call is made.

use super::engine::{Engine, RowGroup};
use super::kernels::{
    LogProbs, LogitsGradient, RowDetail, RowScalars, RowTargets, States, TargetGradient, Unscaled, log_sum, with_scale,
};
use super::logits::{Logits, TargetDistribution};
use super::targets::RowProblem;
use crate::cpu::element::{Element, Input, Output, PerRow, Source, Strided, source, with_room};
use crate::cpu::math::{LANES, Real};
use crate::cpu::{own_slice, sum_in_order, with_floats};
use crate::custom_op::{Arg, Argument, DeviceStorage};
use crate::reduction::LossForm;
use crate::rows::cpu::over_denominator;
use crate::rows::layout::Rows;
use crate::softmax::problem::{CrossEntropy, STATISTICS, Saved, SoftmaxKernels, target_gradient_dtype};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Tensor, WithDType, bail};
use std::ops::Range;

/// Calls `body` with the rows of a problem on its tensors.
macro_rules! with_rows {
    ($problem:expr, $logits:expr, $target:expr, $rows:ident => $body:expr) => {{
        let locked = $problem.options.rows.lock(&$problem.form);
        with_floats!($problem.name, $logits.0, data => {
            let (x, layout) = (Input::Shared(data), $problem.rows($logits.1)?);
            let $rows = RowProblem::new($problem, x, layout, $target, &locked)?;
            $body
        })
    }};
}

impl SoftmaxKernels for CpuStorage {
    fn forward(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)> {
        with_rows!(problem, logits, target, rows => {
            let (mut loss, mut numbers) = (vec![Real::ZERO; rows.rows().count()], rows.numbers());
            rows.engine().reduce(RowDetail::Loss, rows.writer(&mut loss, &mut numbers));
            Ok((rows.reduced(loss), saved(numbers)))
        })
    }

    fn backward(
        problem: &CrossEntropy,
        saved: &Saved,
        of: Argument,
        logits: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        with_rows!(problem, logits, target, rows => {
            // a target that was overwritten since the forward is checked again: it must not lead outside of its row
            let (numbers, count) = (saved.0.to_vec1()?, rows.rows().count());
            let (denominator, statistics) = match numbers.split_last() {
                Some((&denominator, statistics)) if statistics.len() == count * rows.kinds() => {
                    (denominator, statistics)
                }
                _ => bail!("{}: statistics of other rows than the logits'", problem.name),
            };
            let forward = ForwardResults { statistics, count, denominator, upstream: own_slice(upstream)? };
            Ok(match of {
                Argument::Input => rows.logits_gradient(&forward),
                Argument::Target => rows.target_gradient(&forward, target.0.dtype()),
            })
        })
    }

    fn loss_and_grad(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        with_rows!(problem, logits, target, rows => {
            let len = logits.1.shape().elem_count();
            let mut grad = with_room(len);
            // SAFETY: the output is a buffer of its own, with an element for each logit
            let loss = unsafe { rows.loss_and_grad(&Output::new(&mut grad, len)) }?;
            // SAFETY: the capacity is `len`, and without an error every row was emitted whole
            unsafe { grad.set_len(len) };
            Ok((loss, WithDType::to_cpu_storage_owned(grad)))
        })
    }

    fn loss_and_grad_inplace(
        problem: &CrossEntropy,
        logits: &mut Self,
        layout: &Layout,
        target: Arg<Self>,
    ) -> Result<Self> {
        let locked = problem.options.rows.lock(&problem.form);
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(crate::check::not_contiguous(problem.name, layout));
        };
        let rows = Rows { offset: 0, ..problem.rows(layout)? };
        with_floats!(problem.name, logits, data => {
            let (input, output) = Output::in_place(&mut data[start..end]);
            let rows = RowProblem::new(problem, input, rows, target, &locked)?;
            // SAFETY: input and output are the only ones of the logits, which are contiguous: an element for each of
            // them
            unsafe { rows.loss_and_grad(&output) }
        })
    }

    fn forward_with_statistics(
        problem: &CrossEntropy,
        logits: Arg<Self>,
        target: Arg<Self>,
    ) -> Result<(Self, Saved, [Self; STATISTICS])> {
        with_rows!(problem, logits, target, rows => rows.forward_with_statistics())
    }

    fn log_softmax(name: &str, logits: &Self, rows: &Rows, save: bool) -> Result<(Self, Option<Self>)> {
        Ok(with_floats!(name, logits, data => log_softmax(data, rows, save)))
    }

    fn log_softmax_backward(
        name: &str,
        (logits, rows): (&Self, &Rows),
        statistics: &Tensor,
        (upstream, upstream_rows): (&Self, &Rows),
    ) -> Result<Self> {
        let order = Strided::new(upstream_rows.offset, upstream_rows.axes(rows.class_last()));
        with_floats!(name, logits, data => log_softmax_backward(data, rows, statistics, source(upstream, order)?))
    }
}

/// What a backward starts from: the forward's results and the upstream gradient.
struct ForwardResults<'a, A> {
    /// As in [`Saved`], without the denominator.
    statistics: &'a [A],
    /// Of the rows.
    count: usize,
    denominator: A,
    upstream: &'a [A],
}

impl<A: Real> ForwardResults<'_, A> {
    /// One of the statistics of some rows: 0 is max, 1 rest, 2 mass or slope.
    fn kind(&self, kind: usize, rows: &Range<usize>) -> &[A] {
        &self.statistics[kind * self.count..][rows.clone()]
    }

    /// The upstream gradients of some rows over the denominator.
    fn upstream(&self, rows: &Range<usize>) -> [A; LANES] {
        let mut lanes = [A::ZERO; LANES];
        for (lane, row) in lanes.iter_mut().zip(rows.clone()) {
            *lane = over_denominator(self.upstream[if self.upstream.len() == 1 { 0 } else { row }], self.denominator);
        }
        lanes
    }
}

fn saved<A: Real>(numbers: Vec<A>) -> Saved {
    let count = numbers.len();
    Saved(A::to_cpu_storage_owned(numbers).into_tensor(count))
}

impl<'a, T: Element> RowProblem<'a, T> {
    fn engine(&self) -> Engine<'_, 'a, T> {
        Engine::new(&self.logits, &self.q)
    }

    /// How many numbers of a row the backward needs: maximum and rest, and the mass of a probability target or the
    /// slope of a transform.
    fn kinds(&self) -> usize {
        if self.indices.is_some() && self.options.row_transform.is_none() { 2 } else { 3 }
    }

    /// Writes each row's loss, and what the backward needs of it, in the order of [`Saved`].
    fn writer<'p>(
        &'p self,
        loss: &'p mut [T::Acc],
        statistics: &'p mut [T::Acc],
    ) -> impl Fn(Range<usize>, &States<T::Acc>) + Sync {
        let (loss, statistics, count) = (PerRow::new(loss), PerRow::new(statistics), self.rows().count());
        move |rows, states| {
            // SAFETY: nobody writes to the logits in a forward
            let (losses, slopes) = unsafe { self.losses(rows.clone(), &self.targets(rows.clone()), states) };
            // SAFETY: a row is finished once
            unsafe { loss.set(rows.clone(), &losses) };
            let kinds = [&states.max, &states.rest, slopes.as_ref().unwrap_or(&states.mass)];
            for (kind, values) in kinds[..self.kinds()].iter().enumerate() {
                // SAFETY: a row is finished once
                unsafe { statistics.set(kind * count + rows.start..kind * count + rows.end, values.as_slice()) };
            }
        }
    }

    /// Room for what the backward needs of the rows, and behind it the denominator.
    fn numbers(&self) -> Vec<T::Acc> {
        let last = self.kinds() * self.rows().count();
        // zeros, which cost nothing until a row is finished
        let mut numbers = vec![T::Acc::ZERO; last + 1];
        numbers[last] = T::Acc::of(self.denominator);
        numbers
    }

    /// The loss, from the rows' losses.
    fn reduced(&self, loss: Vec<T::Acc>) -> CpuStorage {
        T::Acc::to_cpu_storage_owned(match self.problem.form {
            LossForm::Each => loss,
            LossForm::Scalar(_) => vec![T::Acc::of(sum_in_order(&loss) / self.denominator)],
        })
    }

    fn logits_gradient(&self, forward: &ForwardResults<T::Acc>) -> CpuStorage {
        let uniform_mass = [self.uniform_mass(); LANES];
        let group = |rows: Range<usize>, _: &States<T::Acc>| {
            let mut targets = self.targets(rows.clone());
            let kind = |kind: usize| forward.kind(kind, &rows);
            let (max, rest, mass) = (kind(0), kind(1), if self.indices.is_none() { kind(2) } else { &uniform_mass });
            Self::transform(&mut targets, self.options.row_transform.map(|_| kind(2)));
            let upstream = forward.upstream(&rows);
            let scalars = self.gradient_scalars(rows, &targets, max, rest, mass, upstream);
            RowGroup { scalars, targets }
        };
        with_scale!(self.logits.factor, scale => self.engine().emit::<T, _>(None, &LogitsGradient(scale), group))
    }

    fn target_gradient(&self, forward: &ForwardResults<T::Acc>, target: DType) -> CpuStorage {
        let keep = self.keep;
        // the derivative of q in the target
        let q = match self.weight {
            None => TargetDistribution::Constant(keep),
            Some(weight) => TargetDistribution::Weights { factor: keep, weight },
        };
        let group = |rows: Range<usize>, _: &States<T::Acc>| {
            let (max, rest) = (forward.kind(0, &rows), forward.kind(1, &rows));
            let mut scalars = RowScalars::of_softmax(max, rest);
            for (to, (&max, &rest)) in scalars.log_sum.iter_mut().zip(max.iter().zip(rest)) {
                *to = log_sum(max, rest);
            }
            scalars.upstream = forward.upstream(&rows);
            let targets = self.targets(rows.clone());
            self.weigh(rows, &targets, &mut scalars.upstream);
            RowGroup { scalars, targets }
        };
        let (engine, rule) = (Engine::new(&self.logits, &q), TargetGradient(self.logits.factor));
        match target_gradient_dtype(T::DTYPE, target) == T::DTYPE {
            true => engine.emit::<T, _>(None, &rule, group),
            false => engine.emit::<T::Acc, _>(None, &rule, group),
        }
    }

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    ///
    /// # Safety
    /// Nobody else reads or writes the output, or the logits where it replaces them, and it has an element for each
    /// logit. All are initialised then, unless there is an error.
    unsafe fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let grad_scale = T::Acc::of(self.options.rows.grad_scale);
        let upstream = [over_denominator(grad_scale, T::Acc::of(self.denominator)); LANES];
        let mut loss = vec![T::Acc::ZERO; self.rows().count()];
        let losses = PerRow::new(&mut loss);
        let group = |rows: Range<usize>, states: &States<T::Acc>| {
            let mut targets = self.targets(rows.clone());
            // SAFETY: the values of these rows are emitted later, and other tasks emit other rows only
            let (values, slopes) = unsafe { self.losses(rows.clone(), &targets, states) };
            Self::transform(&mut targets, slopes.as_ref().map(|slopes| slopes.as_slice()));
            // SAFETY: a row's group is made once
            unsafe { losses.set(rows.clone(), &values) };
            let count = rows.len();
            let (max, rest, mass) = (&states.max[..count], &states.rest[..count], &states.mass[..count]);
            RowGroup { scalars: self.gradient_scalars(rows, &targets, max, rest, mass, upstream), targets }
        };
        with_scale!(self.logits.factor, scale => {
            // SAFETY: this function has the same contract
            unsafe { self.engine().emit_to(Some(RowDetail::Loss), &LogitsGradient(scale), group, out) }
        });
        Ok(self.reduced(loss))
    }

    fn forward_with_statistics(&self) -> Result<(CpuStorage, Saved, [CpuStorage; STATISTICS])> {
        let count = self.rows().count();
        let zeros = |count: usize| vec![T::Acc::ZERO; count];
        let (mut loss, mut saved_numbers) = (zeros(count), self.numbers());
        let mut floats = [zeros(count), zeros(count), zeros(count)];
        let (mut argmax, mut flags) = (vec![0u32; count], [vec![0f32; count], vec![0f32; count]]);
        let write = self.writer(&mut loss, &mut saved_numbers);
        let to_floats = floats.each_mut().map(|values| PerRow::new(values));
        let (to_argmax, to_flags) = (PerRow::new(&mut argmax), flags.each_mut().map(|values| PerRow::new(values)));
        self.engine().reduce(RowDetail::Statistics, |rows, states| {
            write(rows.clone(), states);
            let (floats, flags) = self.row_statistics(rows.clone(), states);
            // SAFETY: a row is finished once
            to_floats.iter().zip(&floats).for_each(|(to, values)| unsafe { to.set(rows.clone(), values) });
            // SAFETY: a row is finished once
            to_flags.iter().zip(&flags).for_each(|(to, values)| unsafe { to.set(rows.clone(), values) });
            // SAFETY: a row is finished once
            unsafe { to_argmax.set(rows, &states.argmax) };
        });
        drop(write);
        let of_rows = T::Acc::to_cpu_storage_owned(loss.clone());
        let [lse, z_loss, entropy] = floats.map(T::Acc::to_cpu_storage_owned);
        let [correct, counted] = flags.map(CpuStorage::F32);
        let numbers = [of_rows, lse, z_loss, entropy, CpuStorage::U32(argmax), correct, counted];
        Ok((self.reduced(loss), saved(saved_numbers), numbers))
    }

    /// Lse, z-loss and entropy of some rows, and whether they are correct and counted. An ignored row's are 0.
    fn row_statistics(&self, rows: Range<usize>, states: &States<T::Acc>) -> ([[T::Acc; LANES]; 3], [[f32; LANES]; 2]) {
        let targets = self.targets(rows.clone());
        let [mut lse, mut z_loss, mut entropy] = [[T::Acc::ZERO; LANES]; 3];
        let [mut correct, mut counted] = [[0f32; LANES]; 2];
        for (lane, row) in rows.enumerate().filter(|(lane, _)| targets.live[*lane]) {
            lse[lane] = states.scale * states.max[lane] + states.log_sum[lane];
            if self.options.z_loss != 0.0 {
                z_loss[lane] = T::Acc::of(self.options.z_loss) * lse[lane] * lse[lane];
            }
            let mean = states.moment[lane] / (T::Acc::ONE + states.rest[lane]);
            entropy[lane] = states.log_sum[lane] - states.scale * mean;
            let class = self.indices.as_ref().map_or_else(|| self.most_probable(row), |_| targets.class[lane]);
            correct[lane] = (class == states.argmax[lane] as usize) as u8 as f32;
            counted[lane] = 1.0;
        }
        ([lse, z_loss, entropy], [correct, counted])
    }
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says, and what the backward needs.
fn log_softmax<T: Element>(data: &[T], rows: &Rows, save: bool) -> (CpuStorage, Option<CpuStorage>) {
    let (count, kinds, one) = (rows.count(), if save { 2 } else { 0 }, T::Acc::ONE);
    let mut statistics = vec![T::Acc::ZERO; kinds * count];
    let saved = PerRow::new(&mut statistics);
    let logits = Logits { x: Input::Shared(data), rows: *rows, scale: one, softcap: None, factor: one };
    let group = |rows: Range<usize>, states: &States<T::Acc>| {
        let (max, rest) = (&states.max[..rows.len()], &states.rest[..rows.len()]);
        for (kind, values) in [max, rest].into_iter().enumerate().take(kinds) {
            // SAFETY: a row's group is made once
            unsafe { saved.set(kind * count + rows.start..kind * count + rows.end, values) };
        }
        let scalars = RowScalars { log_sum: states.log_sum, ..RowScalars::of_softmax(max, rest) };
        RowGroup { scalars, targets: RowTargets::NONE }
    };
    let engine = Engine::new(&logits, &TargetDistribution::None);
    let log_probs = engine.emit::<T, _>(Some(RowDetail::Loss), &LogProbs, group);
    (log_probs, save.then(|| T::Acc::to_cpu_storage_owned(statistics)))
}

/// `g - p sum(g)` of each row, in the order of [`log_softmax`]: the gradient of cross-entropy for probabilities g, with
/// an upstream gradient of -1.
fn log_softmax_backward<T: Element>(
    data: &[T],
    rows: &Rows,
    statistics: &Tensor,
    source: Box<dyn Source<T::Acc> + '_>,
) -> Result<CpuStorage> {
    let (one, zero) = (T::Acc::ONE, T::Acc::ZERO);
    let saved = statistics.to_vec2()?;
    let logits = Logits { x: Input::Shared(data), rows: *rows, scale: one, softcap: None, factor: one };
    let upstream = TargetDistribution::Dense { source, keep: one, spread: zero, weight: None };
    let group = |rows: Range<usize>, states: &States<T::Acc>| {
        let mut scalars = RowScalars::of_softmax(&saved[0][rows.clone()], &saved[1][rows.clone()]);
        (0..rows.len()).for_each(|lane| scalars.set_gradient(lane, states.mass[lane], zero, -one));
        RowGroup { scalars, targets: RowTargets::NONE }
    };
    Ok(Engine::new(&logits, &upstream).emit::<T, _>(Some(RowDetail::Mass), &LogitsGradient(Unscaled), group))
}
