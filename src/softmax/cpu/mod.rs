//! The softmax family on the CPU.
//!
//! A pass over the logits either *reduces* each row to a few numbers or *emits* a value for each logit from them (the
//! gradient, the log-probabilities). Both come in two shapes, chosen by [`Engine`]: rows of many adjacent classes are
//! worked through in blocks along the classes, several short rows at a time, everything else (few classes, a class axis that
//! is not innermost, strides) in tiles of [`LANES`] rows, one row in each SIMD lane. A block and a tile are the same piece
//! of scratch memory, small enough for the first-level cache, and both merge their results into the rows' states by
//! [`State::absorb`].
//!
//! The sum of a row is kept without the term of its maximum, which is exp(0) = 1: `rest = sum exp(x - m) - 1`. Then
//! `log sum exp(x - m) = log1p(rest)` and `1 - p = rest / (1 + rest)` for the most probable class keep their relative
//! accuracy however small they are.

mod kernels;
mod passes;
mod problem;
mod rows;
mod units;

use super::problem::{CrossEntropy, RowStatistics, Saved, SoftmaxKernels};
use crate::cpu::element::{Element, Input, Output, Source, Strided, build, source, with_room};
use crate::cpu::math::{Real, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::cpu::{own_slice, with_floats};
use crate::custom_op::{Arg, Argument, DeviceStorage, Locked};
use crate::rows::Rows;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use kernels::{AddToLanes, Detail, LogProbs, LogProbsGradient, RowScalars, States, TargetGradient, log_sum};
use passes::{EmitAll, Finish, PerRow, Reduce, ReduceAndEmit};
use problem::{RowProblem, RowResults, upstream_of};
use rows::{BLOCK, Engine, Extra, LANES, Logits};
use std::ops::Range;
use units::Operands;

impl SoftmaxKernels for CpuStorage {
    fn forward(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            RowProblem::new(problem, Input::new(data), problem.rows(logits.1)?, target, &weight)?.forward()
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
            RowProblem::new(problem, Input::new(data), problem.rows(logits.1)?, target, &weight)?.backward(saved, of, upstream)
        })
    }

    fn loss_and_grad(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            let problem = RowProblem::new(problem, Input::new(data), problem.rows(logits.1)?, target, &weight)?;
            let len = logits.1.shape().elem_count();
            let mut grad = with_room(len);
            let loss = problem.loss_and_grad(&Output::new(&mut grad, len))?;
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
            let mut problem = RowProblem::new(problem, input, rows, target, &weight)?;
            problem.logits.in_place = true;
            problem.loss_and_grad(&output)
        })
    }

    fn statistics(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<RowStatistics<Self>> {
        let weight = problem.options.rows.weight.as_ref().map(Locked::new);
        with_floats!(problem.name, logits.0, data => {
            RowProblem::new(problem, Input::new(data), problem.rows(logits.1)?, target, &weight)?.statistics()
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

impl<T: Element> RowProblem<'_, T> {
    fn forward(&self) -> Result<(CpuStorage, Saved)> {
        let denominator = self.denominator()?;
        let RowResults { loss, statistics } = self.reduce();
        let saved = Saved {
            statistics: T::Acc::to_cpu_storage_owned(statistics).into_tensor((self.kinds(), self.rows().count())),
            denominator: T::Acc::to_cpu_storage_owned(vec![T::Acc::of(denominator)]).into_tensor(()),
        };
        Ok((self.reduced(loss, denominator), saved))
    }

    fn backward(&self, saved: &Saved, of: Argument, upstream: Arg<CpuStorage>) -> Result<CpuStorage> {
        let statistics = saved.statistics.flatten_all()?.to_vec1::<T::Acc>()?;
        let denominator = saved.denominator.to_scalar::<T::Acc>()?;
        let upstream = own_slice::<T::Acc>(upstream)?;
        let rows = self.rows().count();
        // a target that was overwritten since the forward must not lead outside of its row
        self.targets.check(self.options.name, rows)?;
        if of == Argument::Input {
            // SAFETY: every row is emitted whole
            let grad = unsafe {
                build(rows * self.rows().classes, |out| self.emit_gradient(&statistics, upstream, denominator, out))
            };
            return Ok(T::to_cpu_storage_owned(grad));
        }
        let keep = self.targets.keep;
        let extra = match self.targets.weight {
            None => Extra::Constant(keep),
            Some(weight) => Extra::Weights { factor: keep, weight },
        };
        let scalars = |_, row: usize| {
            let (max, rest) = (statistics[row], statistics[rows + row]);
            let mut scalars = RowScalars::new(max, rest);
            scalars.log_sum = log_sum(max, rest);
            scalars.upstream = upstream_of(upstream, row, denominator);
            scalars
        };
        let scalars = |rows: Range<usize>, _: &States<T::Acc>| RowScalars::of_rows(rows, scalars);
        let grad: Vec<T::Acc> = EmitAll::run(Operands { extra: &extra, ..self.operands() }, TargetGradient, scalars);
        Ok(T::Acc::to_cpu_storage_owned(grad))
    }

    fn statistics(&self) -> Result<RowStatistics<CpuStorage>> {
        let rows = self.rows().count();
        self.targets.check(self.options.name, rows)?;
        let zeros = || vec![T::Acc::ZERO; rows];
        let (mut loss, mut lse, mut z_loss, mut entropy) = (zeros(), zeros(), zeros(), zeros());
        let (mut argmax, mut correct) = (vec![0u32; rows], vec![0u8; rows]);
        let writer = StatisticsWriter {
            problem: self,
            loss: PerRow::new(&mut loss),
            lse: PerRow::new(&mut lse),
            z_loss: PerRow::new(&mut z_loss),
            entropy: PerRow::new(&mut entropy),
            argmax: PerRow::new(&mut argmax),
            correct: PerRow::new(&mut correct),
        };
        Reduce::run(self.operands(), Detail::Statistics, writer);
        let storage = T::Acc::to_cpu_storage_owned;
        Ok(RowStatistics {
            loss: storage(loss),
            lse: storage(lse),
            z_loss: storage(z_loss),
            entropy: storage(entropy),
            argmax: CpuStorage::U32(argmax),
            correct: CpuStorage::U8(correct),
        })
    }
}

struct StatisticsWriter<'p, 'a, T: Element> {
    problem: &'p RowProblem<'a, T>,
    loss: PerRow<'p, T::Acc>,
    lse: PerRow<'p, T::Acc>,
    z_loss: PerRow<'p, T::Acc>,
    entropy: PerRow<'p, T::Acc>,
    argmax: PerRow<'p, u32>,
    correct: PerRow<'p, u8>,
}

impl<T: Element> Finish<T::Acc> for StatisticsWriter<'_, '_, T> {
    fn finish(&self, rows: Range<usize>, states: &States<T::Acc>) {
        let problem = self.problem;
        let targets = problem.targets.rows(rows.clone());
        self.loss.set(rows.clone(), &problem.losses(rows.clone(), &targets, states));
        self.argmax.set(rows.clone(), &states.argmax);
        // an ignored row's are 0
        let (mut lse, mut z_loss, mut entropy) = ([T::Acc::ZERO; LANES], [T::Acc::ZERO; LANES], [T::Acc::ZERO; LANES]);
        let mut correct = [0u8; LANES];
        for (lane, row) in rows.clone().enumerate().filter(|(lane, _)| targets.live[*lane]) {
            let state = states.get(lane);
            lse[lane] = state.max + state.log_sum;
            if problem.options.options.z_loss != 0.0 {
                z_loss[lane] = T::Acc::of(problem.options.options.z_loss) * lse[lane] * lse[lane];
            }
            entropy[lane] = state.log_sum - state.moment / (T::Acc::ONE + state.rest);
            let class = match &problem.targets.indices {
                Some(_) => targets.class[lane],
                None => problem.most_probable(row),
            };
            correct[lane] = (class == state.argmax as usize) as u8;
        }
        self.lse.set(rows.clone(), &lse);
        self.z_loss.set(rows.clone(), &z_loss);
        self.entropy.set(rows.clone(), &entropy);
        self.correct.set(rows, &correct);
    }
}

impl<T: Element> RowProblem<'_, T> {
    /// The first class of the largest probability in a target row.
    fn most_probable(&self, row: usize) -> usize {
        let Extra::Dense { source, .. } = &self.targets.extra else { return 0 };
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

fn log_probs_scalars<A: Real>(rows: Range<usize>, states: &States<A>) -> [RowScalars<A>; LANES] {
    RowScalars::of_rows(rows, |lane, _| {
        let state = states.get(lane);
        RowScalars { log_sum: state.log_sum, ..RowScalars::new(state.max, state.rest) }
    })
}

struct KeepScalars<'p, A>(PerRow<'p, RowScalars<A>>);

impl<A: Real> Finish<A> for KeepScalars<'_, A> {
    fn finish(&self, rows: Range<usize>, states: &States<A>) {
        self.0.set(rows.clone(), &log_probs_scalars(rows, states));
    }
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says.
fn log_softmax<T: Element>(data: &[T], rows: &Rows) -> CpuStorage {
    let logits = Logits::new(Input::new(data), *rows);
    let operands = Operands { logits: &logits, extra: &Extra::None };
    T::to_cpu_storage_owned(match logits.engine() {
        Engine::Blocks { segments: 2.., .. } => {
            let mut scalars = vec![RowScalars::DEAD; rows.count()];
            Reduce::run(operands, Detail::Loss, KeepScalars(PerRow::new(&mut scalars)));
            let scalars = |rows: Range<usize>, _: &States<T::Acc>| RowScalars::of_rows(rows, |_, row| scalars[row]);
            EmitAll::run(operands, LogProbs, scalars)
        }
        _ => ReduceAndEmit::run(operands, LogProbs, log_probs_scalars),
    })
}

/// `g - exp(y) sum(g)` of each row, in the order of the log-probabilities y.
fn log_softmax_backward<T: Element>(data: &[T], rows: &Rows, source: Box<dyn Source<T::Acc> + '_>) -> CpuStorage {
    let one = T::Acc::ONE;
    let extra = Extra::Dense { source, keep: one, spread: T::Acc::ZERO, weight: None };
    let logits = Logits::new(Input::new(data), *rows);
    let mass = |row: usize| {
        let (start, stride) = (rows.written_start(row), rows.written_stride());
        let mut block = [T::Acc::ZERO; BLOCK];
        let mut lanes = [0f64; LANES];
        for class in (0..rows.classes).step_by(BLOCK) {
            let block = &mut block[..(rows.classes - class).min(BLOCK)];
            extra.load_apart(start + class * stride, stride, class, block);
            dispatch(AddToLanes { lanes: &mut lanes, block });
        }
        T::Acc::of(lanes.iter().sum())
    };
    // a row that several tasks emit is added up once, ahead of them
    let masses = match logits.engine() {
        Engine::Blocks { segments: 2.., .. } => {
            let mut masses = vec![T::Acc::ZERO; rows.count()];
            let written = PerRow::new(&mut masses);
            let set = |row: usize| written.set(row..row + 1, &[mass(row)]);
            for_each_task(rows.count(), rows.classes, |rows| rows.for_each(set));
            Some(masses)
        }
        _ => None,
    };
    let scalars = |rows: Range<usize>, _: &States<T::Acc>| {
        RowScalars::of_rows(rows, |_, row| {
            let mass = masses.as_ref().map_or_else(|| mass(row), |masses| masses[row]);
            RowScalars { mass, ..RowScalars::new(T::Acc::ZERO, T::Acc::ZERO) }
        })
    };
    let grad: Vec<T> = EmitAll::run(Operands { logits: &logits, extra: &extra }, LogProbsGradient, scalars);
    T::to_cpu_storage_owned(grad)
}
