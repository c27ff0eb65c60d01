//! The logistic family on the CPU: one loop over blocks of elements for every loss, pass, dtype and layout.
//!
//! A unit of work is a whole number of groups (elements that are averaged into one loss; single elements but for
//! multi-label soft margin), about [`BLOCK`] elements. Its operands are read into scratch blocks of the arithmetic type, the
//! [`Term`] is mapped over them, and what is needed of the result is summed or written.

use super::element::{Element, Input, Output, Source, Strided, source, with_room};
use super::math::{Isa, Kernel, LANES, Real, dispatch, sum_of};
use super::softmax::{acc_slice, with_floats};
use super::terms::{Bce, BceWithLogits, Focal, Term};
use super::{for_each_task, sum_in_order};
use crate::logistic::{Logistic, Term as Formula};
use crate::reduction::Reduction;
use crate::softmax::{Arg, Operand};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements in a block, a multiple of the lanes that [`sum_of`] adds at a time.
const BLOCK: usize = 2048;

/// The operands of one call.
struct Problem<'a, T: Element> {
    options: &'a Logistic,
    x: Input<'a, T>,
    x_order: Strided,
    target: Box<dyn Source<T::Acc> + 'a>,
    weight: Option<Box<dyn Source<T::Acc> + 'a>>,
    pos_weight: Option<Box<dyn Source<T::Acc> + 'a>>,
    mask: Option<Box<dyn Source<T::Acc> + 'a>>,
    len: usize,
    group: usize,
    /// Target smoothing: `keep * t + spread`.
    keep: T::Acc,
    spread: T::Acc,
}

/// The optional operands, locked for the time of a call.
struct Guards<'a> {
    weight: Option<(StorageRef<'a>, &'a Layout)>,
    pos_weight: Option<(StorageRef<'a>, &'a Layout)>,
    mask: Option<(StorageRef<'a>, &'a Layout)>,
}

impl<'a> Guards<'a> {
    fn new(options: &'a Logistic) -> Self {
        let lock = |tensor: &'a Option<Tensor>| tensor.as_ref().map(Tensor::storage_and_layout);
        Guards { weight: lock(&options.weight), pos_weight: lock(&options.pos_weight), mask: lock(&options.mask) }
    }
}

fn guarded<'a, A: Real>(guard: &'a Option<(StorageRef<'a>, &'a Layout)>) -> Result<Option<Box<dyn Source<A> + 'a>>> {
    let Some((storage, layout)) = guard else { return Ok(None) };
    match &**storage {
        Storage::Cpu(storage) => Ok(Some(source(storage, Strided::of(layout))?)),
        other => bail!("an operand on {:?}, expected it on the CPU", other.device().location()),
    }
}

struct Scratch<A> {
    x: [A; BLOCK],
    t: [A; BLOCK],
    p: [A; BLOCK],
    w: [A; BLOCK],
    mask: [A; BLOCK],
    value: [A; BLOCK],
}

impl<A: Real> Scratch<A> {
    fn new() -> Self {
        let block = [A::ZERO; BLOCK];
        Scratch { x: block, t: block, p: block, w: block, mask: block, value: block }
    }
}

impl<'a, T: Element> Problem<'a, T> {
    fn new(
        options: &'a Logistic,
        data: &'a [T],
        layout: &Layout,
        target: Arg<'a, CpuStorage>,
        guards: &'a Guards<'a>,
    ) -> Result<Self> {
        let of = <T::Acc as Real>::of;
        Ok(Problem {
            x: Input::new(data),
            x_order: Strided::of(layout),
            target: source(target.0, Strided::of(target.1))?,
            weight: guarded(&guards.weight)?,
            pos_weight: guarded(&guards.pos_weight)?,
            mask: guarded(&guards.mask)?,
            len: layout.shape().elem_count(),
            group: options.group(layout),
            keep: of(1.0 - options.label_smoothing),
            spread: of(options.label_smoothing / 2.0),
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

    /// Reads the operands of the elements `at .. at + len`, a block at most.
    #[inline(always)]
    fn load(&self, at: usize, len: usize, s: &mut Scratch<T::Acc>) {
        self.x_order.load(&self.x, at, &mut s.x[..len]);
        self.target.load(at, &mut s.t[..len]);
        if self.spread != T::Acc::ZERO {
            for t in &mut s.t[..len] {
                *t = self.keep * *t + self.spread;
            }
        }
        match &self.pos_weight {
            Some(p) => p.load(at, &mut s.p[..len]),
            None => s.p[..len].fill(T::Acc::ONE),
        }
        if let Some(w) = &self.weight {
            w.load(at, &mut s.w[..len]);
        }
        if let Some(mask) = &self.mask {
            mask.load(at, &mut s.mask[..len]);
        }
    }

    /// Applies weight and mask to a block of values.
    #[inline(always)]
    fn weigh(&self, len: usize, s: &mut Scratch<T::Acc>) {
        if self.weight.is_some() {
            for (v, &w) in s.value[..len].iter_mut().zip(&s.w) {
                *v *= w;
            }
        }
        if self.mask.is_some() {
            for (v, &m) in s.value[..len].iter_mut().zip(&s.mask) {
                *v = if m == T::Acc::ZERO { T::Acc::ZERO } else { *v };
            }
        }
    }

    /// What the sum of the losses is divided by.
    fn denominator(&self) -> f64 {
        if self.options.reduction != Reduction::Mean {
            return 1.0;
        }
        let Some(mask) = &self.mask else { return self.groups() as f64 };
        let mut count = 0usize;
        let mut block = [T::Acc::ZERO; 256];
        for at in (0..self.len).step_by(block.len()) {
            let block = &mut block[..(self.len - at).min(256)];
            mask.load(at, block);
            count += block.iter().filter(|&&m| m != T::Acc::ZERO).count();
        }
        count as f64
    }

    /// What each element's loss is multiplied by before the reduction: groups are averaged.
    fn share(&self) -> T::Acc {
        T::Acc::of(1.0 / self.group as f64)
    }
}

/// What a pass computes of the elements.
#[derive(Clone, Copy)]
enum Values<'p, A> {
    None,
    /// The gradient of an operand: the upstream gradient of all or of each group, and what the sum is divided by.
    Gradient {
        of: Operand,
        upstream: &'p [A],
        denominator: A,
    },
}

/// Which function of a term is mapped over a block.
#[derive(Clone, Copy)]
enum Function {
    Loss,
    Gradient(Operand),
}

/// `value = term(x, t, p)` over a block; for the loss of probabilities, whether all of them are in [0, 1].
struct Map<'k, A, F> {
    term: F,
    function: Function,
    len: usize,
    scratch: &'k mut Scratch<A>,
}

impl<A: Real, F: Term<A>> Kernel for Map<'_, A, F> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let Map { term, function, len, scratch: Scratch { x, t, p, value, .. } } = self;
        let operands = value[..len].iter_mut().zip(&*x).zip(&*t).zip(&*p);
        match function {
            Function::Loss => {
                for (((v, &x), &t), &p) in operands {
                    *v = term.loss::<I>(x, t, p);
                }
                !F::PROBABILITIES
                    || x[..len]
                        .iter()
                        .zip(&*t)
                        .fold(true, |good, (&x, &t)| good & is_probability(x) & is_probability(t))
            }
            Function::Gradient(Operand::Logits) => {
                for (((v, &x), &t), &p) in operands {
                    *v = term.grad::<I>(x, t, p);
                }
                true
            }
            Function::Gradient(Operand::Target) => {
                for (((v, &x), &t), &p) in operands {
                    *v = term.target_grad::<I>(x, t, p);
                }
                true
            }
        }
    }
}

#[inline(always)]
fn is_probability<A: Real>(v: A) -> bool {
    (v >= A::ZERO) & (v <= A::ONE)
}

impl<A: Real> Scratch<A> {
    /// Maps a function of the options' term over the first `len` elements.
    fn map(&mut self, formula: Formula, function: Function, len: usize) -> bool {
        let scratch = self;
        match formula {
            Formula::Bce => dispatch(Map { term: Bce, function, len, scratch }),
            Formula::BceWithLogits => dispatch(Map { term: BceWithLogits, function, len, scratch }),
            Formula::Focal { alpha, gamma } => {
                let term = Focal { alpha: alpha.map(A::of), gamma: A::of(gamma) };
                dispatch(Map { term, function, len, scratch })
            }
        }
    }

    fn sum(&mut self, len: usize) -> A {
        let padded = len.next_multiple_of(LANES);
        self.value[len..padded].fill(A::ZERO);
        sum_of(&self.value[..padded])
    }
}

/// One pass over the elements.
struct Pass<'p, 'a, T: Element, O> {
    problem: &'p Problem<'a, T>,
    /// One loss for each group if the reduction is none, else one partial sum for each unit; absent in a backward.
    losses: Option<&'p Output<'p, T::Acc>>,
    values: Values<'p, T::Acc>,
    out: &'p Output<'p, O>,
    /// The first element that is no probability.
    bad: AtomicUsize,
}

impl<T: Element, O: Element<Acc = T::Acc>> Pass<'_, '_, T, O> {
    fn unit(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        let problem = self.problem;
        let groups = unit * problem.groups_per_unit()..((unit + 1) * problem.groups_per_unit()).min(problem.groups());
        let elements = groups.start * problem.group..groups.end * problem.group;
        let mut sum = T::Acc::ZERO;
        for at in elements.clone().step_by(BLOCK) {
            let len = (elements.end - at).min(BLOCK);
            problem.load(at, len, scratch);
            if let Some(losses) = self.losses {
                sum += self.block_losses(losses, &groups, at, len, scratch);
            }
            if let Values::Gradient { of, upstream, denominator } = self.values {
                self.block_gradient(of, upstream, denominator, at, len, scratch);
            }
        }
        let Some(losses) = self.losses else { return };
        let reduced = problem.options.reduction != Reduction::None;
        if reduced || problem.group > BLOCK {
            let share = if reduced { T::Acc::ONE } else { problem.share() };
            // SAFETY: this unit alone writes its element
            unsafe { losses.slice(unit, 1)[0].write(sum * share) };
        }
    }

    /// The losses of a block: written, or their sum.
    fn block_losses(
        &self,
        losses: &Output<T::Acc>,
        groups: &Range<usize>,
        at: usize,
        len: usize,
        scratch: &mut Scratch<T::Acc>,
    ) -> T::Acc {
        let problem = self.problem;
        if !scratch.map(problem.options.term, Function::Loss, len) {
            let bad = |(&x, &t): (&T::Acc, &T::Acc)| !(is_probability(x) & is_probability(t));
            let first = scratch.x[..len].iter().zip(&scratch.t).position(bad);
            self.bad.fetch_min(at + first.unwrap_or(0), Ordering::Relaxed);
        }
        problem.weigh(len, scratch);
        if problem.options.reduction != Reduction::None || problem.group > BLOCK {
            return scratch.sum(len);
        }
        if problem.group == 1 {
            // SAFETY: a group is written by the unit it belongs to
            T::Acc::narrow(&scratch.value[..len], unsafe { losses.slice(at, len) });
            return T::Acc::ZERO;
        }
        for (group, values) in groups.clone().zip(scratch.value[..len].chunks(problem.group)) {
            let sum = values.iter().fold(0f64, |sum, v| sum + v.to_f64());
            // SAFETY: as above
            unsafe { losses.slice(group, 1)[0].write(T::Acc::of(sum / problem.group as f64)) };
        }
        T::Acc::ZERO
    }

    /// Writes the gradient of a block.
    fn block_gradient(
        &self,
        of: Operand,
        upstream: &[T::Acc],
        denominator: T::Acc,
        at: usize,
        len: usize,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let problem = self.problem;
        scratch.map(problem.options.term, Function::Gradient(of), len);
        let chain = if of == Operand::Target { problem.keep } else { T::Acc::ONE };
        let factor = chain * problem.share() / denominator;
        let values = &mut scratch.value[..len];
        match upstream {
            [upstream] => values.iter_mut().for_each(|v| *v *= *upstream * factor),
            _ if problem.group == 1 => {
                values.iter_mut().zip(&upstream[at..at + len]).for_each(|(v, &g)| *v *= g * factor)
            }
            _ => values.iter_mut().enumerate().for_each(|(i, v)| *v *= upstream[(at + i) / problem.group] * factor),
        }
        problem.weigh(len, scratch);
        // SAFETY: an element is written by the unit it belongs to
        O::narrow(&scratch.value[..len], unsafe { self.out.slice(at, len) });
    }
}

impl<'a, T: Element> Problem<'a, T> {
    /// Runs a pass.
    fn run<O: Element<Acc = T::Acc>>(
        &self,
        losses: Option<&Output<T::Acc>>,
        values: Values<T::Acc>,
        out: &Output<O>,
    ) -> Result<()> {
        let pass = Pass { problem: self, losses, values, out, bad: AtomicUsize::new(usize::MAX) };
        for_each_task(self.units(), self.groups_per_unit() * self.group, |units| {
            let mut scratch = Scratch::new();
            units.for_each(|unit| pass.unit(unit, &mut scratch));
        });
        let at = pass.bad.into_inner();
        if at == usize::MAX {
            return Ok(());
        }
        let (mut x, mut t) = ([T::Acc::ZERO], [T::Acc::ZERO]);
        self.x_order.load(&self.x, at, &mut x);
        self.target.load(at, &mut t);
        let (what, value) = if is_probability(x[0]) { ("target", t[0]) } else { ("probability", x[0]) };
        bail!("{}: {what} {value} at element {at}, expected a number in [0, 1]", self.options.name)
    }

    /// Computes the losses, and what else `values` asks for, and reduces the losses.
    fn losses<O: Element<Acc = T::Acc>>(
        &self,
        denominator: f64,
        values: Values<T::Acc>,
        out: &Output<O>,
    ) -> Result<CpuStorage> {
        let none = self.options.reduction == Reduction::None;
        let count = if none { self.groups() } else { self.units() };
        let mut losses = vec![T::Acc::ZERO; count];
        self.run(Some(&Output::in_place(&mut losses).1), values, out)?;
        Ok(T::Acc::to_cpu_storage_owned(if none {
            losses
        } else {
            let sum = sum_in_order(&losses) / self.group.max(1) as f64;
            vec![T::Acc::of(sum / denominator)]
        }))
    }
}

/// The loss, and what its sum was divided by.
pub(crate) fn forward(
    options: &Logistic,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    fn run<T: Element>(
        options: &Logistic,
        data: &[T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<(CpuStorage, CpuStorage)> {
        let guards = Guards::new(options);
        let problem = Problem::new(options, data, layout, target, &guards)?;
        let denominator = problem.denominator();
        let loss = problem.losses(denominator, Values::None, &Output::<T>::new(&mut vec![], 0))?;
        Ok((loss, T::Acc::to_cpu_storage_owned(vec![T::Acc::of(denominator)])))
    }
    with_floats!(options.name, input.0, data => run(options, data, input.1, target))
}

/// The gradient of the input in its dtype, or of the target in the arithmetic dtype, in row-major order.
pub(crate) fn backward(
    options: &Logistic,
    denominator: &Tensor,
    of: Operand,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
    upstream: Arg<CpuStorage>,
) -> Result<CpuStorage> {
    fn gradient<T: Element, O: Element<Acc = T::Acc>>(
        problem: &Problem<T>,
        values: Values<T::Acc>,
    ) -> Result<CpuStorage> {
        let mut grad = with_room(problem.len);
        problem.run(None, values, &Output::<O>::new(&mut grad, problem.len))?;
        // SAFETY: the capacity is `len`, and the pass wrote every element
        unsafe { grad.set_len(problem.len) };
        Ok(O::to_cpu_storage_owned(grad))
    }
    fn run<T: Element>(
        options: &Logistic,
        denominator: &Tensor,
        of: Operand,
        (data, layout): (&[T], &Layout),
        target: Arg<CpuStorage>,
        upstream: Arg<CpuStorage>,
    ) -> Result<CpuStorage> {
        let guards = Guards::new(options);
        let problem = Problem::new(options, data, layout, target, &guards)?;
        let upstream = acc_slice(upstream.0, upstream.1)?;
        let values = Values::Gradient { of, upstream, denominator: denominator.to_scalar()? };
        match of {
            Operand::Logits => gradient::<T, T>(&problem, values),
            Operand::Target => gradient::<T, T::Acc>(&problem, values),
        }
    }
    with_floats!(options.name, input.0, data => run(options, denominator, of, (data, input.1), target, upstream))
}

/// The loss and the gradient of the input, in row-major order.
pub(crate) fn loss_and_grad(
    options: &Logistic,
    input: Arg<CpuStorage>,
    target: Arg<CpuStorage>,
) -> Result<(CpuStorage, CpuStorage)> {
    fn run<T: Element>(
        options: &Logistic,
        data: &[T],
        layout: &Layout,
        target: Arg<CpuStorage>,
    ) -> Result<(CpuStorage, CpuStorage)> {
        let guards = Guards::new(options);
        let problem = Problem::new(options, data, layout, target, &guards)?;
        let denominator = problem.denominator();
        let values =
            Values::Gradient { of: Operand::Logits, upstream: &[T::Acc::ONE], denominator: T::Acc::of(denominator) };
        let mut grad = with_room(problem.len);
        let loss = problem.losses(denominator, values, &Output::<T>::new(&mut grad, problem.len))?;
        // SAFETY: the capacity is `len`, and the pass wrote every element
        unsafe { grad.set_len(problem.len) };
        Ok((loss, T::to_cpu_storage_owned(grad)))
    }
    with_floats!(options.name, input.0, data => run(options, data, input.1, target))
}
