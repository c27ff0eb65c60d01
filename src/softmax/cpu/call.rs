//! The entry points: the passes of which each call is made.

use super::engine::{Engine, PerRow, RowGroup};
use super::kernels::{
    LogProbs, LogProbsGradient, LogitsGradient, RowDetail, RowScalars, RowTargets, States, TargetGradient, log_sum,
};
use super::logits::{Logits, TargetDistribution};
use super::targets::RowProblem;
use crate::cpu::element::{Element, Input, Output, Source, Strided, build, source, with_room};
use crate::cpu::math::{LANES, Real};
use crate::cpu::{own_slice, sum_in_order, with_floats};
use crate::custom_op::{Arg, Argument, DeviceStorage, Locked};
use crate::reduction::Reduction;
use crate::rows::layout::Rows;
use crate::softmax::problem::{CrossEntropy, RowStatistics, Saved, SoftmaxKernels};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use std::ops::Range;

impl SoftmaxKernels for CpuStorage {
    fn forward(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            let rows = RowProblem::new(problem, Input::Shared(data), problem.rows(logits.1)?, target, &weight)?;
            let denominator = rows.denominator()?;
            let mut results = RowResults::new(&rows);
            rows.engine().reduce(RowDetail::Loss, results.writer(&rows));
            Ok((rows.reduced(results.loss, denominator), rows.saved(results.statistics, denominator)))
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
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            let rows = RowProblem::new(problem, Input::Shared(data), problem.rows(logits.1)?, target, &weight)?;
            // a target that was overwritten since the forward must not lead outside of its row
            rows.check()?;
            let forward = ForwardResults::new(saved, upstream, rows.rows().count())?;
            Ok(match of {
                Argument::Input => rows.logits_gradient(&forward),
                Argument::Target => rows.target_gradient(&forward),
            })
        })
    }

    fn loss_and_grad(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            let rows = RowProblem::new(problem, Input::Shared(data), problem.rows(logits.1)?, target, &weight)?;
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
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!(
                "{}: strides {:?} of shape {:?}, expected contiguous logits",
                problem.name,
                layout.stride(),
                layout.dims()
            )
        };
        let rows = Rows { offset: 0, ..problem.rows(layout)? };
        with_floats!(problem.name, logits, data => {
            let (input, output) = Output::in_place(&mut data[start..end]);
            let rows = RowProblem::new(problem, input, rows, target, &weight)?;
            // SAFETY: input and output are the only ones of the logits, which are contiguous: an element for each of them
            unsafe { rows.loss_and_grad(&output) }
        })
    }

    fn statistics(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<RowStatistics<Self>> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            let rows = RowProblem::new(problem, Input::Shared(data), problem.rows(logits.1)?, target, &weight)?;
            rows.check()?;
            Ok(rows.statistics())
        })
    }

    fn log_softmax(name: &str, logits: &Self, rows: &Rows) -> Result<Self> {
        Ok(with_floats!(name, logits, data => log_softmax(data, rows)))
    }

    fn log_softmax_backward(
        name: &str,
        (out, rows): (&Self, &Rows),
        (upstream, upstream_rows): (&Self, &Rows),
    ) -> Result<Self> {
        let order = Strided::new(upstream_rows.offset, upstream_rows.axes(rows.class_last()));
        Ok(with_floats!(name, out, data => log_softmax_backward(data, rows, source(upstream, order)?)))
    }
}

/// Each row's loss, and what the backward needs of it.
struct RowResults<A> {
    loss: Vec<A>,
    /// max, rest and, with probability targets, mass of all rows: see [`States`]
    statistics: Vec<A>,
}

impl<A: Real + Element<Acc = A>> RowResults<A> {
    fn new<T: Element<Acc = A>>(problem: &RowProblem<T>) -> Self {
        let rows = problem.rows().count();
        RowResults { loss: vec![A::ZERO; rows], statistics: vec![A::ZERO; rows * problem.kinds()] }
    }

    /// Writes the results of rows that are reduced.
    fn writer<'p, T: Element<Acc = A>>(
        &'p mut self,
        problem: &'p RowProblem<'_, T>,
    ) -> impl Fn(Range<usize>, &States<A>) + Sync {
        let (loss, statistics) = (PerRow::new(&mut self.loss), PerRow::new(&mut self.statistics));
        move |rows: Range<usize>, states: &States<A>| {
            let count = problem.rows().count();
            let targets = problem.targets.rows(rows.clone());
            // SAFETY: nobody writes to the logits in a forward
            let losses = unsafe { problem.losses(rows.clone(), &targets, states) };
            // SAFETY: a row is finished once
            unsafe { loss.set(rows.clone(), &losses) };
            let kinds = [&states.max, &states.rest, &states.mass];
            for (kind, values) in kinds[..problem.kinds()].iter().enumerate() {
                // SAFETY: a row is finished once
                unsafe { statistics.set(kind * count + rows.start..kind * count + rows.end, values.as_slice()) };
            }
        }
    }
}

/// What a backward starts from: the forward's results and the upstream gradient.
struct ForwardResults<'a, A> {
    statistics: Vec<A>,
    denominator: A,
    upstream: &'a [A],
    rows: usize,
}

impl<'a, A: Real> ForwardResults<'a, A> {
    fn new(saved: &Saved, upstream: Arg<'a, CpuStorage>, rows: usize) -> Result<Self> {
        Ok(ForwardResults {
            statistics: saved.statistics.flatten_all()?.to_vec1()?,
            denominator: saved.denominator.to_scalar()?,
            upstream: own_slice(upstream)?,
            rows,
        })
    }

    /// The numbers of some rows: 0 is max, 1 rest, 2 mass.
    fn kind(&self, kind: usize, rows: &Range<usize>) -> &[A] {
        &self.statistics[kind * self.rows + rows.start..kind * self.rows + rows.end]
    }

    /// The upstream gradients of some rows over the denominator.
    fn upstream(&self, rows: &Range<usize>) -> [A; LANES] {
        let mut lanes = [A::ZERO; LANES];
        for (lane, row) in lanes.iter_mut().zip(rows.clone()) {
            *lane = self.upstream[if self.upstream.len() == 1 { 0 } else { row }] / self.denominator;
        }
        lanes
    }
}

impl<'a, T: Element> RowProblem<'a, T> {
    fn engine(&self) -> Engine<'_, 'a, T> {
        Engine::new(&self.logits, &self.targets.q)
    }

    /// How many numbers of a row the backward needs.
    fn kinds(&self) -> usize {
        if self.targets.indices.is_some() { 2 } else { 3 }
    }

    fn saved(&self, statistics: Vec<T::Acc>, denominator: f64) -> Saved {
        let storage = T::Acc::to_cpu_storage_owned;
        Saved {
            statistics: storage(statistics).into_tensor((self.kinds(), self.rows().count())),
            denominator: storage(vec![T::Acc::of(denominator)]).into_tensor(()),
        }
    }

    /// The loss, from the rows' losses.
    fn reduced(&self, loss: Vec<T::Acc>, denominator: f64) -> CpuStorage {
        T::Acc::to_cpu_storage_owned(match self.options.rows.reduction {
            Reduction::None => loss,
            Reduction::Mean | Reduction::Sum => vec![T::Acc::of(sum_in_order(&loss) / denominator)],
        })
    }

    fn logits_gradient(&self, forward: &ForwardResults<T::Acc>) -> CpuStorage {
        let uniform_mass = [self.uniform_mass(); LANES];
        let group = |rows: Range<usize>, _: &States<T::Acc>| {
            let targets = self.targets.rows(rows.clone());
            let mass = if self.kinds() == 3 { forward.kind(2, &rows) } else { &uniform_mass };
            let (max, rest) = (forward.kind(0, &rows), forward.kind(1, &rows));
            let scalars = self.gradient_scalars(&targets, max, rest, mass, forward.upstream(&rows));
            RowGroup { scalars, targets }
        };
        let engine = self.engine();
        // SAFETY: the output is a buffer of its own, with an element for each logit, which `emit` initialises
        let grad = unsafe {
            build(self.rows().count() * self.rows().classes, |out| engine.emit(None, &LogitsGradient, group, out))
        };
        T::to_cpu_storage_owned(grad)
    }

    fn target_gradient(&self, forward: &ForwardResults<T::Acc>) -> CpuStorage {
        let keep = self.targets.keep;
        // the derivative of q in the target
        let q = match self.targets.weight {
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
            RowGroup { scalars, targets: RowTargets::NONE }
        };
        let engine = Engine::new(&self.logits, &q);
        // SAFETY: the output is a buffer of its own, with an element for each logit, which `emit` initialises
        let grad: Vec<T::Acc> = unsafe {
            build(self.rows().count() * self.rows().classes, |out| engine.emit(None, &TargetGradient, group, out))
        };
        T::Acc::to_cpu_storage_owned(grad)
    }

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    ///
    /// # Safety
    /// Nobody else reads or writes the output, or the logits where it replaces them, and it has an element for each logit. All
    /// are initialised then, unless there is an error.
    unsafe fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let denominator = self.denominator()?;
        let upstream = [T::Acc::ONE / T::Acc::of(denominator); LANES];
        let mut loss = vec![T::Acc::ZERO; self.rows().count()];
        let losses = PerRow::new(&mut loss);
        let group = |rows: Range<usize>, states: &States<T::Acc>| {
            let targets = self.targets.rows(rows.clone());
            // SAFETY: the values of the rows are emitted later
            let values = unsafe { self.losses(rows.clone(), &targets, states) };
            // SAFETY: a row's group is made once
            unsafe { losses.set(rows.clone(), &values) };
            let count = rows.len();
            let (max, rest, mass) = (&states.max[..count], &states.rest[..count], &states.mass[..count]);
            RowGroup { scalars: self.gradient_scalars(&targets, max, rest, mass, upstream), targets }
        };
        // SAFETY: this function has the same contract
        unsafe { self.engine().reduce_and_emit(RowDetail::Loss, &LogitsGradient, group, out) };
        Ok(self.reduced(loss, denominator))
    }

    fn statistics(&self) -> RowStatistics<CpuStorage> {
        let zeros = || vec![T::Acc::ZERO; self.rows().count()];
        let (mut loss, mut lse, mut z_loss, mut entropy) = (zeros(), zeros(), zeros(), zeros());
        let (mut argmax, mut correct) = (vec![0u32; loss.len()], vec![0u8; loss.len()]);
        let written = RowStatisticsWriter {
            floats: [&mut loss, &mut lse, &mut z_loss, &mut entropy].map(|values| PerRow::new(values)),
            argmax: PerRow::new(&mut argmax),
            correct: PerRow::new(&mut correct),
        };
        self.engine().reduce(RowDetail::Statistics, |rows, states| written.finish(self, rows, states));
        let storage = T::Acc::to_cpu_storage_owned;
        RowStatistics {
            loss: storage(loss),
            lse: storage(lse),
            z_loss: storage(z_loss),
            entropy: storage(entropy),
            argmax: CpuStorage::U32(argmax),
            correct: CpuStorage::U8(correct),
        }
    }
}

struct RowStatisticsWriter<'p, A> {
    /// Loss, lse, z-loss and entropy.
    floats: [PerRow<'p, A>; 4],
    argmax: PerRow<'p, u32>,
    correct: PerRow<'p, u8>,
}

impl<A: Real + Element<Acc = A>> RowStatisticsWriter<'_, A> {
    fn finish<T: Element<Acc = A>>(&self, problem: &RowProblem<T>, rows: Range<usize>, states: &States<A>) {
        let targets = problem.targets.rows(rows.clone());
        // SAFETY: nobody writes to the logits
        let loss = unsafe { problem.losses(rows.clone(), &targets, states) };
        // an ignored row's are 0
        let (mut lse, mut z_loss, mut entropy) = ([A::ZERO; LANES], [A::ZERO; LANES], [A::ZERO; LANES]);
        let mut correct = [0u8; LANES];
        for (lane, row) in rows.clone().enumerate().filter(|(lane, _)| targets.live[*lane]) {
            lse[lane] = states.max[lane] + states.log_sum[lane];
            if problem.options.z_loss != 0.0 {
                z_loss[lane] = A::of(problem.options.z_loss) * lse[lane] * lse[lane];
            }
            entropy[lane] = states.log_sum[lane] - states.moment[lane] / (A::ONE + states.rest[lane]);
            let class = match &problem.targets.indices {
                Some(_) => targets.class[lane],
                None => problem.most_probable(row),
            };
            correct[lane] = (class == states.argmax[lane] as usize) as u8;
        }
        for (to, values) in self.floats.iter().zip([&loss, &lse, &z_loss, &entropy]) {
            // SAFETY: a row is finished once
            unsafe { to.set(rows.clone(), values) };
        }
        // SAFETY: a row is finished once
        unsafe { self.argmax.set(rows.clone(), &states.argmax) };
        // SAFETY: a row is finished once
        unsafe { self.correct.set(rows, &correct) };
    }
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says.
fn log_softmax<T: Element>(data: &[T], rows: &Rows) -> CpuStorage {
    let logits = Logits { x: Input::Shared(data), rows: *rows, scale: T::Acc::ONE, softcap: None };
    let engine = Engine::new(&logits, &TargetDistribution::None);
    let group = |rows: Range<usize>, states: &States<T::Acc>| {
        let mut scalars = RowScalars::of_softmax(&states.max[..rows.len()], &states.rest[..rows.len()]);
        scalars.log_sum = states.log_sum;
        RowGroup { scalars, targets: RowTargets::NONE }
    };
    // SAFETY: the output is a buffer of its own, with an element for each logit, which `reduce_and_emit` initialises
    let log_probs: Vec<T> = unsafe {
        build(rows.count() * rows.classes, |out| engine.reduce_and_emit(RowDetail::Loss, &LogProbs, group, out))
    };
    T::to_cpu_storage_owned(log_probs)
}

/// `g - exp(y) sum(g)` of each row, in the order of the log-probabilities y.
fn log_softmax_backward<T: Element>(data: &[T], rows: &Rows, source: Box<dyn Source<T::Acc> + '_>) -> CpuStorage {
    let (one, zero) = (T::Acc::ONE, T::Acc::ZERO);
    let logits = Logits { x: Input::Shared(data), rows: *rows, scale: one, softcap: None };
    let upstream = TargetDistribution::Dense { source, keep: one, spread: zero, weight: None };
    let engine = Engine::new(&logits, &upstream);
    let group = |_: Range<usize>, states: &States<T::Acc>| {
        let scalars = RowScalars { mass: states.mass, ..RowScalars::ZERO };
        RowGroup { scalars, targets: RowTargets::NONE }
    };
    // SAFETY: the output is a buffer of its own, with an element for each logit, which `reduce_and_emit` initialises
    let grad: Vec<T> = unsafe {
        build(rows.count() * rows.classes, |out| engine.reduce_and_emit(RowDetail::Mass, &LogProbsGradient, group, out))
    };
    T::to_cpu_storage_owned(grad)
}
