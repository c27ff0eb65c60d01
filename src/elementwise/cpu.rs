//! The logistic family on the CPU: one loop over blocks of elements for every loss, pass, dtype and layout.
//!
//! A unit of work is a whole number of groups (elements that are averaged into one loss; single elements but for
//! multi-label soft margin), about [`BLOCK`] elements. Its operands are read in blocks of the arithmetic type, the [`Term`] is
//! mapped over them, and what is needed of the result is summed or written.

use super::problem::{ElementKernels, Elements, Term as Formula};
use super::terms::{Bce, BceWithLogits, Focal, Term};
use crate::check;
use crate::cpu::element::{Element, Output, Source, Strided, source, with_room};
use crate::cpu::math::{Isa, LANES, Real, Vectorized, dispatch, sum_of};
use crate::cpu::own_slice;
use crate::cpu::parallel::for_each_task;
use crate::cpu::sum_in_order;
use crate::custom_op::{Arg, Argument, Locked};
use crate::reduction::Reduction;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, Tensor, WithDType, bail};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements in a block, a multiple of the lanes that [`sum_of`] adds at a time.
const BLOCK: usize = 1024;
/// The work of an element: an exponential and a logarithm, 0.7 ns.
const ELEMENT_WORK: usize = 3;

/// The operands of one call.
struct Problem<'a, A> {
    options: &'a Elements,
    x: Box<dyn Source<A> + 'a>,
    target: Box<dyn Source<A> + 'a>,
    weight: Option<Box<dyn Source<A> + 'a>>,
    pos_weight: Option<Box<dyn Source<A> + 'a>>,
    mask: Option<Box<dyn Source<A> + 'a>>,
    len: usize,
    group: usize,
    /// Target smoothing: `keep * t + spread`.
    keep: A,
    spread: A,
}

/// The optional operands, locked for the time of a call.
struct Guards<'a> {
    weight: Option<Locked<'a>>,
    pos_weight: Option<Locked<'a>>,
    mask: Option<Locked<'a>>,
}

impl<'a> Guards<'a> {
    fn new(problem: &'a Elements) -> Self {
        let lock = |tensor: &'a Option<Tensor>| tensor.as_ref().map(Locked::new);
        let o = &problem.options;
        Guards { weight: lock(&o.weight), pos_weight: lock(&o.pos_weight), mask: lock(&o.mask) }
    }
}

/// A block of a term's operands; without `p`, all positive weights are 1.
#[derive(Clone, Copy)]
struct Block<'s, A> {
    x: &'s [A],
    t: &'s [A],
    p: Option<&'s [A]>,
}

/// Room for the operands of a block that can't be read where they are, and for what is computed of it.
struct Scratch<A> {
    x: [A; BLOCK],
    t: [A; BLOCK],
    p: [A; BLOCK],
    factor: [A; BLOCK],
    value: [A; BLOCK],
}

impl<A: Real> Scratch<A> {
    fn new() -> Self {
        let block = [A::ZERO; BLOCK];
        Scratch { x: block, t: block, p: block, factor: block, value: block }
    }
}

impl<'a, A: Real + Element<Acc = A>> Problem<'a, A> {
    fn new(
        options: &'a Elements,
        input: Arg<'a, CpuStorage>,
        target: Arg<'a, CpuStorage>,
        guards: &'a Guards<'a>,
    ) -> Result<Self> {
        let guarded = |guard: &'a Option<Locked>| -> Result<Option<Box<dyn Source<A> + 'a>>> {
            let Some(guard) = guard else { return Ok(None) };
            let (storage, layout) = guard.arg::<CpuStorage>(options.name)?;
            source(storage, Strided::of(layout)).map(Some)
        };
        Ok(Problem {
            x: source(input.0, Strided::of(input.1))?,
            target: source(target.0, Strided::of(target.1))?,
            weight: guarded(&guards.weight)?,
            pos_weight: guarded(&guards.pos_weight)?,
            mask: guarded(&guards.mask)?,
            len: input.1.shape().elem_count(),
            group: options.group(input.1),
            keep: A::of(1.0 - options.options.label_smoothing),
            spread: A::of(options.options.label_smoothing / 2.0),
            options,
        })
    }

    /// The groups of a unit: as many as fit into a block, at least one.
    fn groups_per_unit(&self) -> usize {
        (BLOCK / self.group.max(1)).max(1)
    }

    fn groups(&self) -> usize {
        self.len.checked_div(self.group).unwrap_or(0)
    }

    fn units(&self) -> usize {
        self.groups().div_ceil(self.groups_per_unit())
    }

    /// Reads a block of the term's operands, in the memory given unless they can be read where they are.
    fn load<'s>(&'s self, at: usize, x: &'s mut [A], t: &'s mut [A], p: &'s mut [A]) -> Block<'s, A> {
        let t = if self.spread == A::ZERO {
            self.target.read(at, t)
        } else {
            self.target.load(at, t);
            t.iter_mut().for_each(|t| *t = self.keep * *t + self.spread);
            t
        };
        Block { x: self.x.read(at, x), t, p: self.pos_weight.as_ref().map(|source| source.read(at, p)) }
    }

    /// Applies weight and mask to the values of a block.
    fn weigh(&self, at: usize, values: &mut [A], factor: &mut [A]) {
        let factor = &mut factor[..values.len()];
        if let Some(weight) = &self.weight {
            values.iter_mut().zip(weight.read(at, factor)).for_each(|(v, &w)| *v *= w);
        }
        if let Some(mask) = &self.mask {
            let apply = |(v, &m): (&mut A, &A)| *v = if m == A::ZERO { A::ZERO } else { *v };
            values.iter_mut().zip(mask.read(at, factor)).for_each(apply);
        }
    }

    /// What the sum of the losses is divided by.
    fn denominator(&self) -> f64 {
        if self.options.options.reduction != Reduction::Mean {
            return 1.0;
        }
        let Some(mask) = &self.mask else { return self.groups() as f64 };
        let mut count = 0usize;
        let mut block = [A::ZERO; 256];
        for at in (0..self.len).step_by(block.len()) {
            let block = &mut block[..(self.len - at).min(256)];
            count += mask.read(at, block).iter().filter(|&&m| m != A::ZERO).count();
        }
        count as f64
    }

    /// What each element's loss is multiplied by before the reduction: groups are averaged.
    fn share(&self) -> A {
        A::of(1.0 / self.group as f64)
    }
}

/// What a pass computes of the elements.
#[derive(Clone, Copy)]
enum Values<'p, A> {
    None,
    /// The gradient of an operand: the upstream gradient of all or of each group, and what the sum is divided by.
    Gradient {
        of: Argument,
        upstream: &'p [A],
        denominator: A,
    },
}

/// Which function of a term is mapped over a block.
#[derive(Clone, Copy)]
enum Function {
    Loss,
    Gradient(Argument),
}

/// `value = term(x, t, p)` over a block; for the loss of probabilities, whether all of them are in [0, 1].
struct Map<'k, A, F> {
    term: F,
    function: Function,
    block: Block<'k, A>,
    values: &'k mut [A],
}

impl<A: Real, F: Term<A>> Vectorized for Map<'_, A, F> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let Map { term, function, block: Block { x, t, p }, values } = self;
        // loops, not closures: a closure that isn't inlined is compiled without the instruction set of this function
        macro_rules! map {
            ($method:ident) => {
                match p {
                    None => {
                        for ((v, &x), &t) in values.iter_mut().zip(x).zip(t) {
                            *v = term.$method::<I>(x, t, A::ONE);
                        }
                    }
                    Some(p) => {
                        for (((v, &x), &t), &p) in values.iter_mut().zip(x).zip(t).zip(p) {
                            *v = term.$method::<I>(x, t, p);
                        }
                    }
                }
            };
        }
        let mut good = true;
        match function {
            Function::Loss => {
                map!(loss);
                if F::PROBABILITIES {
                    for (&x, &t) in x.iter().zip(t) {
                        good &= is_probability(x) & is_probability(t);
                    }
                }
            }
            Function::Gradient(Argument::Input) => map!(grad),
            Function::Gradient(Argument::Target) => map!(target_grad),
        }
        good
    }
}

impl<A: Real> Block<'_, A> {
    /// Maps a function of the options' term over the block.
    fn values(self, formula: Formula, function: Function, values: &mut [A]) -> bool {
        let block = self;
        match formula {
            Formula::Bce => dispatch(Map { term: Bce, function, block, values }),
            Formula::BceWithLogits => dispatch(Map { term: BceWithLogits, function, block, values }),
            Formula::Focal { alpha, gamma } => {
                let (alpha, gamma) = (alpha.map(A::of), A::of(gamma));
                if gamma == A::of(2.0) {
                    dispatch(Map { term: Focal::<A, true> { alpha, gamma }, function, block, values })
                } else {
                    dispatch(Map { term: Focal::<A, false> { alpha, gamma }, function, block, values })
                }
            }
        }
    }
}

#[inline(always)]
fn is_probability<A: Real>(v: A) -> bool {
    (v >= A::ZERO) & (v <= A::ONE)
}

/// The sum of the first `len` of a block's values, in vectors.
struct Sum<'k, A> {
    values: &'k mut [A; BLOCK],
    len: usize,
}

impl<A: Real> Vectorized for Sum<'_, A> {
    type Output = A;

    #[inline(always)]
    fn run<I: Isa>(self) -> A {
        let padded = self.len.next_multiple_of(LANES);
        self.values[self.len..padded].fill(A::ZERO);
        sum_of(&self.values[..padded])
    }
}

/// One pass over the elements.
struct Pass<'p, 'a, A, O> {
    problem: &'p Problem<'a, A>,
    /// One loss for each group if the reduction is none, else one partial sum for each unit; absent in a backward.
    losses: Option<&'p Output<'p, A>>,
    values: Values<'p, A>,
    out: &'p Output<'p, O>,
    /// The first element that is no probability.
    bad: AtomicUsize,
}

impl<A: Real + Element<Acc = A>, O: Element<Acc = A>> Pass<'_, '_, A, O> {
    fn unit(&self, unit: usize, scratch: &mut Scratch<A>) {
        let problem = self.problem;
        let groups = unit * problem.groups_per_unit()..((unit + 1) * problem.groups_per_unit()).min(problem.groups());
        let elements = groups.start * problem.group..groups.end * problem.group;
        let mut sum = A::ZERO;
        for at in elements.clone().step_by(BLOCK) {
            let len = (elements.end - at).min(BLOCK);
            let Scratch { x, t, p, factor, value } = scratch;
            let block = problem.load(at, &mut x[..len], &mut t[..len], &mut p[..len]);
            if let Some(losses) = self.losses {
                if !block.values(problem.options.term, Function::Loss, &mut value[..len]) {
                    let bad = |(&x, &t): (&A, &A)| !(is_probability(x) & is_probability(t));
                    let first = block.x.iter().zip(block.t).position(bad);
                    self.bad.fetch_min(at + first.unwrap_or(0), Ordering::Relaxed);
                }
                problem.weigh(at, &mut value[..len], factor);
                sum += self.reduce(losses, &groups, at, len, value);
            }
            if let Values::Gradient { of, upstream, denominator } = self.values {
                let values = &mut value[..len];
                block.values(problem.options.term, Function::Gradient(of), values);
                self.chain(of, upstream, denominator, at, values);
                problem.weigh(at, values, factor);
                // SAFETY: an element is written by the unit it belongs to
                O::narrow(values, unsafe { self.out.slice(at, len) });
            }
        }
        let Some(losses) = self.losses else { return };
        let reduced = problem.options.options.reduction != Reduction::None;
        if reduced || problem.group > BLOCK {
            let share = if reduced { A::ONE } else { problem.share() };
            // SAFETY: this unit alone writes its element
            unsafe { losses.slice(unit, 1)[0].write(sum * share) };
        }
    }

    /// The losses of a block: written, or their sum.
    fn reduce(&self, losses: &Output<A>, groups: &Range<usize>, at: usize, len: usize, values: &mut [A; BLOCK]) -> A {
        let problem = self.problem;
        if problem.options.options.reduction != Reduction::None || problem.group > BLOCK {
            return dispatch(Sum { values, len });
        }
        if problem.group == 1 {
            // SAFETY: a group is written by the unit it belongs to
            A::narrow(&values[..len], unsafe { losses.slice(at, len) });
            return A::ZERO;
        }
        for (group, values) in groups.clone().zip(values[..len].chunks(problem.group)) {
            let sum = values.iter().fold(0f64, |sum, v| sum + v.to_f64());
            // SAFETY: as above
            unsafe { losses.slice(group, 1)[0].write(A::of(sum / problem.group as f64)) };
        }
        A::ZERO
    }

    /// Multiplies the derivatives of a block by those of what comes after the term.
    fn chain(&self, of: Argument, upstream: &[A], denominator: A, at: usize, values: &mut [A]) {
        let problem = self.problem;
        let smoothing = if of == Argument::Target { problem.keep } else { A::ONE };
        let factor = smoothing * problem.share() / denominator;
        match upstream {
            [upstream] => values.iter_mut().for_each(|v| *v *= *upstream * factor),
            _ if problem.group == 1 => values.iter_mut().zip(&upstream[at..]).for_each(|(v, &g)| *v *= g * factor),
            _ => values.iter_mut().enumerate().for_each(|(i, v)| *v *= upstream[(at + i) / problem.group] * factor),
        }
    }
}

impl<'a, A: Real + Element<Acc = A>> Problem<'a, A> {
    /// Runs a pass.
    fn run<O: Element<Acc = A>>(&self, losses: Option<&Output<A>>, values: Values<A>, out: &Output<O>) -> Result<()> {
        let pass = Pass { problem: self, losses, values, out, bad: AtomicUsize::new(usize::MAX) };
        for_each_task(self.units(), self.groups_per_unit() * self.group * ELEMENT_WORK, |units| {
            let mut scratch = Scratch::new();
            units.for_each(|unit| pass.unit(unit, &mut scratch));
        });
        let at = pass.bad.into_inner();
        if at == usize::MAX {
            return Ok(());
        }
        let (mut x, mut t) = ([A::ZERO], [A::ZERO]);
        self.x.load(at, &mut x);
        self.target.load(at, &mut t);
        let (what, value) = if is_probability(x[0]) { ("target", t[0]) } else { ("probability", x[0]) };
        Err(check::not_in_unit_interval(self.options.name, what, value, at))
    }

    /// Computes the losses, and what else `values` asks for, and reduces the losses.
    fn losses<O: Element<Acc = A>>(&self, denominator: f64, values: Values<A>, out: &Output<O>) -> Result<CpuStorage> {
        let none = self.options.options.reduction == Reduction::None;
        let count = if none { self.groups() } else { self.units() };
        let mut losses = vec![A::ZERO; count];
        self.run(Some(&Output::in_place(&mut losses).1), values, out)?;
        Ok(A::to_cpu_storage_owned(if none {
            losses
        } else {
            let sum = sum_in_order(&losses) / self.group.max(1) as f64;
            vec![A::of(sum / denominator)]
        }))
    }
}

/// Calls `body::<T>` for the storage's dtype.
macro_rules! for_dtype {
    ($name:expr, $storage:expr, $body:ident ( $($argument:expr),* )) => {
        match $storage.dtype() {
            DType::F16 => $body::<f16>($($argument),*),
            DType::BF16 => $body::<bf16>($($argument),*),
            DType::F32 => $body::<f32>($($argument),*),
            DType::F64 => $body::<f64>($($argument),*),
            other => bail!("{}: unsupported dtype {other:?}, expected f16, bf16, f32 or f64", $name),
        }
    };
}

impl ElementKernels for CpuStorage {
    fn forward(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        for_dtype!(problem.name, input.0, forward(problem, input, target))
    }

    fn backward(
        problem: &Elements,
        denominator: &Tensor,
        of: Argument,
        input: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        for_dtype!(problem.name, input.0, backward(problem, denominator, of, input, target, upstream))
    }

    fn loss_and_grad(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        for_dtype!(problem.name, input.0, loss_and_grad(problem, input, target))
    }
}

fn forward<T: Element>(
    problem: &Elements,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    let guards = Guards::new(problem);
    let problem = Problem::<T::Acc>::new(problem, input, target, &guards)?;
    let denominator = problem.denominator();
    let loss = problem.losses(denominator, Values::None, &Output::<T>::new(&mut vec![], 0))?;
    Ok((loss, T::Acc::to_cpu_storage_owned(vec![T::Acc::of(denominator)])))
}

fn gradient<A: Real + Element<Acc = A>, O: Element<Acc = A>>(
    problem: &Problem<A>,
    values: Values<A>,
) -> Result<CpuStorage> {
    let mut grad = with_room(problem.len);
    problem.run(None, values, &Output::<O>::new(&mut grad, problem.len))?;
    // SAFETY: the capacity is `len`, and the pass wrote every element
    unsafe { grad.set_len(problem.len) };
    Ok(O::to_cpu_storage_owned(grad))
}

fn backward<T: Element>(
    problem: &Elements,
    denominator: &Tensor,
    of: Argument,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
    upstream: Arg<CpuStorage>,
) -> Result<CpuStorage> {
    let guards = Guards::new(problem);
    let problem = Problem::<T::Acc>::new(problem, input, target, &guards)?;
    let values = Values::Gradient { of, upstream: own_slice(upstream)?, denominator: denominator.to_scalar()? };
    match of {
        Argument::Input => gradient::<T::Acc, T>(&problem, values),
        Argument::Target => gradient::<T::Acc, T::Acc>(&problem, values),
    }
}

fn loss_and_grad<T: Element>(
    problem: &Elements,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    let guards = Guards::new(problem);
    let problem = Problem::<T::Acc>::new(problem, input, target, &guards)?;
    let denominator = problem.denominator();
    let values =
        Values::Gradient { of: Argument::Input, upstream: &[T::Acc::ONE], denominator: T::Acc::of(denominator) };
    let mut grad = with_room(problem.len);
    let loss = problem.losses(denominator, values, &Output::<T>::new(&mut grad, problem.len))?;
    // SAFETY: the capacity is `len`, and the pass wrote every element
    unsafe { grad.set_len(problem.len) };
    Ok((loss, T::to_cpu_storage_owned(grad)))
}
