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

use crate::cpu::element::{Element, Input, Output, Source, Strided, build, source, with_room};
use crate::cpu::math::{Real, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::softmax::op::{Arg, CrossEntropy, Operand, Rows, Saved, Statistics, cpu_tensor};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType, bail};
use kernels::{AddToLanes, Detail, LogProbs, LogProbsGradient, RowScalars, States, TargetGradient, log_sum};
use passes::{EmitAll, Finish, PerRow, Reduce, ReduceAndEmit};
use problem::{Problem, RowResults, upstream_of};
use rows::{BLOCK, Engine, Extra, LANES, Logits};
use std::ops::Range;
use units::Operands;

/// Calls `body` with the storage's elements as a slice of their own type.
macro_rules! with_floats {
    ($name:expr, $storage:expr, $data:ident => $body:expr) => {
        match $storage {
            CpuStorage::F16($data) => $body,
            CpuStorage::BF16($data) => $body,
            CpuStorage::F32($data) => $body,
            CpuStorage::F64($data) => $body,
            other => bail!("{}: unsupported dtype {:?}, expected f16, bf16, f32 or f64", $name, other.dtype()),
        }
    };
}

/// A slice of a tensor of this crate's own, contiguous and in the arithmetic type.
pub(crate) fn acc_slice<'a, A: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [A]> {
    let data = A::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => {
            bail!("a contiguous tensor was expected, got strides {:?} of shape {:?}", layout.stride(), layout.dims())
        }
    }
}

/// Calls `body` with the class weights as a slice.
fn with_weight<A: Real, R>(weight: &Option<Tensor>, body: impl FnOnce(Option<&[A]>) -> Result<R>) -> Result<R> {
    let Some(weight) = weight else { return body(None) };
    let (storage, layout) = weight.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => body(Some(acc_slice(storage, layout)?)),
        _ => bail!("class weights on {:?}, expected them on the CPU", weight.device().location()),
    }
}

/// The loss, and what the backward needs.
pub(crate) fn forward(
    options: &CrossEntropy,
    logits: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, Saved)> {
    fn run<T: Element>(
        options: &CrossEntropy,
        data: &[T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<(CpuStorage, Saved)> {
        with_weight(&options.weight, |weight| {
            let problem = Problem::new(options, Input::new(data), options.rows(layout)?, target, weight)?;
            let denominator = problem.denominator()?;
            let RowResults { loss, statistics } = problem.reduce();
            let (kinds, rows) = (problem.kinds(), problem.rows().count());
            let saved = Saved {
                statistics: (kinds > 0).then(|| cpu_tensor(T::Acc::to_cpu_storage_owned(statistics), (kinds, rows))),
                denominator: cpu_tensor(T::Acc::to_cpu_storage_owned(vec![T::Acc::of(denominator)]), ()),
            };
            Ok((problem.reduced(loss, denominator), saved))
        })
    }
    with_floats!(options.name, logits.0, data => run(options, data, logits.1, target))
}

/// The gradient of the logits or of probability targets, in the order that [`Rows::class_last`] says.
pub(crate) fn backward(
    options: &CrossEntropy,
    saved: &Saved,
    of: Operand,
    logits: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
    upstream: Arg<CpuStorage>,
) -> Result<CpuStorage> {
    fn run<T: Element>(
        options: &CrossEntropy,
        saved: &Saved,
        of: Operand,
        (data, layout): (&[T], &Layout),
        target: Arg<CpuStorage>,
        upstream: Arg<CpuStorage>,
    ) -> Result<CpuStorage> {
        let statistics = match &saved.statistics {
            Some(statistics) => statistics.flatten_all()?.to_vec1::<T::Acc>()?,
            None => vec![],
        };
        let denominator = saved.denominator.to_scalar::<T::Acc>()?;
        let upstream = acc_slice::<T::Acc>(upstream.0, upstream.1)?;
        with_weight(&options.weight, |weight| {
            let problem = Problem::new(options, Input::new(data), options.rows(layout)?, target, weight)?;
            let rows = problem.rows().count();
            // a target that was overwritten since the forward must not lead outside of its row
            problem.targets.check(options.name, rows)?;
            if of == Operand::Logits {
                // SAFETY: every row is emitted whole
                let grad = unsafe {
                    build(rows * problem.rows().classes, |out| {
                        problem.emit_gradient(&statistics, upstream, denominator, out)
                    })
                };
                return Ok(T::to_cpu_storage_owned(grad));
            }
            let keep = problem.targets.keep;
            let extra = match weight {
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
            let grad: Vec<T::Acc> =
                EmitAll::run(Operands { extra: &extra, ..problem.operands() }, TargetGradient, scalars);
            Ok(T::Acc::to_cpu_storage_owned(grad))
        })
    }
    with_floats!(options.name, logits.0, data => run(options, saved, of, (data, logits.1), target, upstream))
}

pub(crate) fn loss_and_grad(
    options: &CrossEntropy,
    logits: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    fn run<T: Element>(
        options: &CrossEntropy,
        data: &[T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<(CpuStorage, CpuStorage)> {
        with_weight(&options.weight, |weight| {
            let problem = Problem::new(options, Input::new(data), options.rows(layout)?, target, weight)?;
            let len = layout.shape().elem_count();
            let mut grad = with_room(len);
            let loss = problem.loss_and_grad(&Output::new(&mut grad, len))?;
            // SAFETY: the capacity is `len`, and without an error every row was emitted whole
            unsafe { grad.set_len(len) };
            Ok((loss, T::to_cpu_storage_owned(grad)))
        })
    }
    with_floats!(options.name, logits.0, data => run(options, data, logits.1, target))
}

/// As [`loss_and_grad`]; the gradient replaces the logits, which are contiguous.
pub(crate) fn loss_and_grad_inplace(
    options: &CrossEntropy,
    logits: &mut CpuStorage,
    layout: &Layout,
    target: Arg<CpuStorage>,
) -> Result<CpuStorage> {
    fn run<T: Element>(
        options: &CrossEntropy,
        data: &mut [T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<CpuStorage> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!(
                "{}: strides {:?} of shape {:?}, expected contiguous logits",
                options.name,
                layout.stride(),
                layout.dims()
            )
        };
        with_weight(&options.weight, |weight| {
            let (input, output) = Output::in_place(&mut data[start..end]);
            let rows = Rows { offset: 0, ..options.rows(layout)? };
            let mut problem = Problem::new(options, input, rows, target, weight)?;
            problem.logits.in_place = true;
            problem.loss_and_grad(&output)
        })
    }
    with_floats!(options.name, logits, data => run(options, data, layout, target))
}

struct StatisticsWriter<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
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
            if problem.options.z_loss != 0.0 {
                z_loss[lane] = T::Acc::of(problem.options.z_loss) * lse[lane] * lse[lane];
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

impl<T: Element> Problem<'_, T> {
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

/// The rows' losses and statistics in one pass.
pub(crate) fn statistics(
    options: &CrossEntropy,
    logits: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, Statistics<CpuStorage>)> {
    fn run<T: Element>(
        options: &CrossEntropy,
        data: &[T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<(CpuStorage, Statistics<CpuStorage>)> {
        with_weight(&options.weight, |weight| {
            let problem = Problem::new(options, Input::new(data), options.rows(layout)?, target, weight)?;
            let rows = problem.rows().count();
            problem.targets.check(options.name, rows)?;
            let zeros = || vec![T::Acc::ZERO; rows];
            let (mut loss, mut lse, mut z_loss, mut entropy) = (zeros(), zeros(), zeros(), zeros());
            let (mut argmax, mut correct) = (vec![0u32; rows], vec![0u8; rows]);
            let writer = StatisticsWriter {
                problem: &problem,
                loss: PerRow::new(&mut loss),
                lse: PerRow::new(&mut lse),
                z_loss: PerRow::new(&mut z_loss),
                entropy: PerRow::new(&mut entropy),
                argmax: PerRow::new(&mut argmax),
                correct: PerRow::new(&mut correct),
            };
            Reduce::run(problem.operands(), Detail::Statistics, writer);
            let storage = T::Acc::to_cpu_storage_owned;
            let rest = Statistics {
                lse: storage(lse),
                z_loss: storage(z_loss),
                entropy: storage(entropy),
                argmax: CpuStorage::U32(argmax),
                correct: CpuStorage::U8(correct),
            };
            Ok((storage(loss), rest))
        })
    }
    with_floats!(options.name, logits.0, data => run(options, data, logits.1, target))
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
pub(crate) fn log_softmax(name: &str, logits: &CpuStorage, rows: &Rows) -> Result<CpuStorage> {
    fn run<T: Element>(data: &[T], rows: &Rows) -> CpuStorage {
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
    Ok(with_floats!(name, logits, data => run(data, rows)))
}

/// `g - exp(y) sum(g)` of each row, in the order of the log-probabilities y.
pub(crate) fn log_softmax_backward(
    name: &str,
    (out, rows): (&CpuStorage, &Rows),
    (upstream, upstream_rows): (&CpuStorage, &Rows),
) -> Result<CpuStorage> {
    fn run<T: Element>(data: &[T], rows: &Rows, source: Box<dyn Source<T::Acc> + '_>) -> CpuStorage {
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
    let order = Strided::new(upstream_rows.offset, upstream_rows.axes(rows.class_last()));
    Ok(with_floats!(name, out, data => run(data, rows, source(upstream, order)?)))
}
