//! The element-wise family on the CPU: one loop over blocks of elements for every loss, pass, dtype and layout.
//!
//! A unit of work is a whole number of groups (elements that are averaged into one loss; single elements but for
//! multi-label soft margin), about [`BLOCK`] elements. Its operands are read in blocks of the arithmetic type, the
//! term's [`Formula`] is mapped over them, and the results are summed or written.

use super::problem::{ElementKernels, Elements, LockedOptions, UnitOperands};
use super::terms::{Formula, WithFormula, product};
use crate::cpu::element::{Element, Output, Source, Strided, as_uninit, source, with_room};
use crate::cpu::math::{Isa, LANES, Real, Vectorized, dispatch, sum_of};
use crate::cpu::parallel::for_each_task;
use crate::cpu::{own_slice, stream, sum_in_order, with_floats};
use crate::custom_op::{Arg, Argument};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, Tensor, WithDType};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements in a block, a multiple of the lanes that [`sum_of`] adds at a time.
const BLOCK: usize = 1024;
/// The work of an element: an exponential and a logarithm, 0.7 ns.
const ELEMENT_WORK: usize = 3;

/// The operands of one call.
struct ElementsOnCpu<'a, A> {
    problem: &'a Elements,
    /// Input and target, for a message about one of their elements.
    checked: [Arg<'a, CpuStorage>; 2],
    unit: UnitOperands,
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

/// A block of a term's operands and of the mask; without `p`, all positive weights are 1.
#[derive(Clone, Copy)]
struct ElementBlock<'s, A> {
    x: &'s [A],
    t: &'s [A],
    p: Option<&'s [A]>,
    mask: Option<&'s [A]>,
}

impl<A: Real> ElementBlock<'_, A> {
    /// Sets the values of the elements that the mask takes out to 0.
    fn clear_masked(&self, values: &mut [A]) {
        let Some(mask) = self.mask else { return };
        for (v, &m) in values.iter_mut().zip(mask) {
            *v = if m == A::ZERO { A::ZERO } else { *v };
        }
    }
}

/// Room for the operands of a block that can't be read where they are, and for its results.
struct ElementScratch<A, O> {
    x: [A; BLOCK],
    t: [A; BLOCK],
    p: [A; BLOCK],
    weight: [A; BLOCK],
    mask: [A; BLOCK],
    factor: [A; BLOCK],
    loss: [A; BLOCK],
    grad: [A; BLOCK],
    /// A gradient on its way past the cache.
    staged: [MaybeUninit<O>; BLOCK],
}

impl<A: Real, O: Copy> ElementScratch<A, O> {
    fn new() -> Self {
        let block = [A::ZERO; BLOCK];
        let staged = [MaybeUninit::uninit(); BLOCK];
        ElementScratch {
            x: block,
            t: block,
            p: block,
            weight: block,
            mask: block,
            factor: block,
            loss: block,
            grad: block,
            staged,
        }
    }
}

impl<'a, A: Real + Element<Acc = A>> ElementsOnCpu<'a, A> {
    fn new(
        problem: &'a Elements,
        input: Arg<'a, CpuStorage>,
        target: Arg<'a, CpuStorage>,
        locked: &'a LockedOptions,
    ) -> Result<Self> {
        let all = |arg: Option<Arg<'a, CpuStorage>>| {
            arg.map(|(storage, layout)| source(storage, Strided::of(layout))).transpose()
        };
        let [weight, pos_weight, mask, _] = locked.args(problem.name)?;
        let label_smoothing = problem.options.label_smoothing;
        Ok(ElementsOnCpu {
            x: source(input.0, Strided::of(input.1))?,
            target: source(target.0, Strided::of(target.1))?,
            weight: all(weight)?,
            pos_weight: all(pos_weight)?,
            mask: all(mask)?,
            len: input.1.shape().elem_count(),
            group: problem.group(input.1),
            keep: A::of(1.0 - label_smoothing),
            spread: A::of(label_smoothing / 2.0),
            checked: [input, target],
            unit: problem.unit_operands(target.0.dtype()),
            problem,
        })
    }

    fn is_each(&self) -> bool {
        self.problem.form.is_each()
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

    /// The number that the sum of the losses is divided by.
    fn denominator(&self) -> Result<f64> {
        self.problem.form.denominator(|| self.counted())
    }

    /// The groups, or the elements that the mask leaves.
    fn counted(&self) -> f64 {
        let Some(mask) = &self.mask else { return self.groups() as f64 };
        let mut count = 0usize;
        let mut block = [A::ZERO; 256];
        for at in (0..self.len).step_by(block.len()) {
            let block = &mut block[..(self.len - at).min(256)];
            count += mask.read(at, block).iter().filter(|&&m| m != A::ZERO).count();
        }
        count as f64
    }

    /// The factor of each element's loss before the reduction: groups are averaged.
    fn share(&self) -> A {
        A::of(1.0 / self.group as f64)
    }
}

/// What is asked of a formula over a block, and where its values go: the losses, the gradient of an argument, or the
/// losses and the gradient of the input.
struct FormulaOverBlock<'k, A> {
    block: ElementBlock<'k, A>,
    losses: Option<&'k mut [A]>,
    grads: Option<(Argument, &'k mut [A])>,
}

impl<A: Real> WithFormula<A> for FormulaOverBlock<'_, A> {
    type Output = ();

    fn with(self, formula: impl Formula<A>) {
        dispatch(FormulaMap { formula, over: self })
    }
}

struct FormulaMap<'k, A, F> {
    formula: F,
    over: FormulaOverBlock<'k, A>,
}

impl<A: Real, F: Formula<A>> Vectorized for FormulaMap<'_, A, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let FormulaMap { formula, over } = self;
        let FormulaOverBlock { block: ElementBlock { x, t, p, .. }, losses, grads } = over;
        // loops, not closures: a closure that isn't inlined is compiled without the instruction set of this function
        macro_rules! map {
            ($method:ident, $values:expr) => {
                match p {
                    None => {
                        for ((v, &x), &t) in $values.iter_mut().zip(x).zip(t) {
                            *v = formula.$method::<I>(x, t, A::ONE);
                        }
                    }
                    Some(p) => {
                        for (((v, &x), &t), &p) in $values.iter_mut().zip(x).zip(t).zip(p) {
                            *v = formula.$method::<I>(x, t, p);
                        }
                    }
                }
            };
        }
        match (losses, grads) {
            (None, None) => {}
            (Some(losses), None) => map!(loss, losses),
            (None, Some((Argument::Input, grads))) => map!(grad, grads),
            (None, Some((Argument::Target, grads))) => map!(target_grad, grads),
            (Some(losses), Some((Argument::Input, grads))) => match p {
                None => {
                    for (((loss, grad), &x), &t) in losses.iter_mut().zip(grads).zip(x).zip(t) {
                        (*loss, *grad) = formula.loss_and_grad::<I>(x, t, A::ONE);
                    }
                }
                Some(p) => {
                    for ((((loss, grad), &x), &t), &p) in losses.iter_mut().zip(grads).zip(x).zip(t).zip(p) {
                        (*loss, *grad) = formula.loss_and_grad::<I>(x, t, p);
                    }
                }
            },
            (Some(losses), Some((Argument::Target, grads))) => {
                map!(loss, losses);
                map!(target_grad, grads)
            }
        }
    }
}

/// Whether all numbers of an operand are in [0, 1], but for those that a mask of [`looked_at`] takes out.
#[derive(Clone, Copy)]
struct InUnit<'k, A> {
    values: &'k [A],
    mask: Option<&'k [A]>,
}

impl<A: Real> InUnit<'_, A> {
    /// The first one that isn't.
    fn first_bad(self) -> Option<usize> {
        if dispatch(self) {
            return None;
        }
        let counts = |i: usize| self.mask.is_none_or(|mask| mask[i] != A::ZERO);
        (0..self.values.len()).find(|&i| counts(i) && !is_unit(self.values[i]))
    }
}

impl<A: Real> Vectorized for InUnit<'_, A> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self) -> bool {
        let mut good = true;
        match self.mask {
            None => {
                for &v in self.values {
                    good &= is_unit(v);
                }
            }
            Some(mask) => {
                for (&v, &m) in self.values.iter().zip(mask) {
                    good &= is_unit(v) | (m == A::ZERO);
                }
            }
        }
        good
    }
}

#[inline(always)]
fn is_unit<A: Real>(v: A) -> bool {
    (v >= A::ZERO) & (v <= A::ONE)
}

/// The weight in front of the values of a block.
struct Weigh<'k, A> {
    weight: &'k [A],
    values: &'k mut [A],
}

impl<A: Real> Vectorized for Weigh<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        for (v, &w) in self.values.iter_mut().zip(self.weight) {
            // whatever is there
            *v = if w == A::ZERO { A::ZERO } else { product(w, *v) };
        }
    }
}

/// Applies the weight to the values of a block.
fn weigh<A: Real>(weight: Option<&[A]>, values: &mut [A]) {
    if let Some(weight) = weight {
        dispatch(Weigh { weight, values });
    }
}

/// Numbers of a block that are 0 where the mask or the weight is, and nobody looks at the element.
fn looked_at<'s, A: Real>(mask: Option<&'s [A]>, weight: Option<&'s [A]>, both: &'s mut [A]) -> Option<&'s [A]> {
    let (Some(mask), Some(weight)) = (mask, weight) else { return mask.or(weight) };
    for ((to, &m), &w) in both.iter_mut().zip(mask).zip(weight) {
        *to = if w == A::ZERO { A::ZERO } else { m };
    }
    Some(both)
}

/// The sum of the first `len` of a block's values, in vectors.
struct BlockSum<'k, A> {
    values: &'k mut [A; BLOCK],
    len: usize,
}

impl<A: Real> Vectorized for BlockSum<'_, A> {
    type Output = A;

    #[inline(always)]
    fn run<I: Isa>(self) -> A {
        let padded = self.len.next_multiple_of(LANES);
        self.values[self.len..padded].fill(A::ZERO);
        sum_of(&self.values[..padded])
    }
}

/// The derivatives of the steps behind the formula, for a block.
#[derive(Clone, Copy)]
enum ChainFactors<'k, A> {
    All(A),
    /// Their upstream gradient each, and what it is multiplied by.
    Each(&'k [A], A),
}

/// The derivatives of a block, multiplied by those of the steps behind the formula and written.
struct WriteGradient<'k, A, O> {
    values: &'k [A],
    factors: ChainFactors<'k, A>,
    mask: Option<&'k [A]>,
    out: &'k mut [MaybeUninit<O>],
}

impl<A: Real, O: Element<Acc = A>> Vectorized for WriteGradient<'_, A, O> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let WriteGradient { values, factors, mask, out } = self;
        let values = out.iter_mut().zip(values);
        match (factors, mask) {
            (ChainFactors::All(factor), None) => {
                for (out, &v) in values {
                    out.write(O::from_acc(v * factor));
                }
            }
            (ChainFactors::All(factor), Some(mask)) => {
                for ((out, &v), &m) in values.zip(mask) {
                    out.write(O::from_acc(if m == A::ZERO { A::ZERO } else { v * factor }));
                }
            }
            (ChainFactors::Each(upstream, factor), None) => {
                for ((out, &v), &g) in values.zip(upstream) {
                    out.write(O::from_acc(v * (g * factor)));
                }
            }
            (ChainFactors::Each(upstream, factor), Some(mask)) => {
                for (((out, &v), &g), &m) in values.zip(upstream).zip(mask) {
                    out.write(O::from_acc(if m == A::ZERO { A::ZERO } else { v * (g * factor) }));
                }
            }
        }
    }
}

impl<A: Real + Element<Acc = A>, O: Element<Acc = A>> WriteGradient<'_, A, O> {
    /// By way of `through` if the output's type can't be written directly.
    fn write(self, through: &mut [A]) {
        if O::INLINE {
            return dispatch(self);
        }
        let WriteGradient { values, factors, mask, out } = self;
        let through = &mut through[..values.len()];
        // SAFETY: the kernel writes values only
        dispatch(WriteGradient { values, factors, mask, out: unsafe { as_uninit(through) } });
        O::narrow(through, out);
    }
}

/// The gradient of an operand: the upstream gradient of all groups or of each, the loss's denominator, and where it
/// goes.
struct ElementGradient<'p, A, O> {
    of: Argument,
    upstream: &'p [A],
    denominator: A,
    to: &'p Output<'p, O>,
    /// Whether it is written past the cache.
    past_cache: bool,
}

/// One loss for each group if the reduction is none, else one partial sum for each unit.
struct ElementLosses<'p, A> {
    to: &'p Output<'p, A>,
    /// Whether those of single elements are written past the cache.
    past_cache: bool,
}

/// One pass over the elements.
struct ElementPass<'p, 'a, A, O> {
    elements: &'p ElementsOnCpu<'a, A>,
    /// Absent in a backward.
    losses: Option<ElementLosses<'p, A>>,
    gradient: Option<ElementGradient<'p, A, O>>,
    /// The first element that is not in [0, 1] though it has to be.
    bad: AtomicUsize,
}

impl<A: Real + Element<Acc = A>, O: Element<Acc = A>> ElementPass<'_, '_, A, O> {
    fn unit(&self, unit: usize, scratch: &mut ElementScratch<A, O>) {
        let all = self.elements;
        let groups = unit * all.groups_per_unit()..((unit + 1) * all.groups_per_unit()).min(all.groups());
        let range = groups.start * all.group..groups.end * all.group;
        let mut sum = A::ZERO;
        for at in range.clone().step_by(BLOCK) {
            let len = (range.end - at).min(BLOCK);
            let ElementScratch { x, t, p, weight, mask, factor, loss, grad, staged } = scratch;
            let mask = all.mask.as_ref().map(|source| source.read(at, &mut mask[..len]));
            let weight = all.weight.as_ref().map(|source| source.read(at, &mut weight[..len]));
            let x = all.x.read(at, &mut x[..len]);
            let t = self.load_target(at, &mut t[..len], x, looked_at(mask, weight, &mut factor[..len]));
            let p = all.pos_weight.as_ref().map(|source| source.read(at, &mut p[..len]));
            let block = ElementBlock { x, t, p, mask };
            all.problem.term.formula(FormulaOverBlock {
                block,
                losses: self.losses.as_ref().map(|_| &mut loss[..len]),
                grads: self.gradient.as_ref().map(|gradient| (gradient.of, &mut grad[..len])),
            });
            if let Some(losses) = &self.losses {
                weigh(weight, &mut loss[..len]);
                block.clear_masked(&mut loss[..len]);
                sum += self.reduce(losses, &groups, at, len, loss);
            }
            if let Some(gradient) = &self.gradient {
                weigh(weight, &mut grad[..len]);
                self.write_gradient(gradient, at, &grad[..len], mask, (factor, loss, &mut staged[..len]));
            }
        }
        let Some(losses) = &self.losses else { return };
        let reduced = !all.is_each();
        if reduced || all.group > BLOCK {
            let share = if reduced { A::ONE } else { all.share() };
            // SAFETY: this unit alone writes its element
            unsafe { losses.to.slice(unit, 1)[0].write(sum * share) };
        }
    }

    /// Reads the targets of a block, in the memory given unless they can be read where they are: checked together with
    /// the inputs if there are losses to compute, and smoothed.
    fn load_target<'s>(&'s self, at: usize, t: &'s mut [A], x: &[A], mask: Option<&[A]>) -> &'s [A] {
        let all = self.elements;
        if all.spread == A::ZERO {
            let t = all.target.read(at, t);
            self.check(at, t, x, mask);
            return t;
        }
        all.target.load(at, t);
        self.check(at, t, x, mask);
        t.iter_mut().for_each(|t| *t = all.keep * *t + all.spread);
        t
    }

    /// Notes the first element that is not in [0, 1] though it has to be.
    fn check(&self, at: usize, t: &[A], x: &[A], mask: Option<&[A]>) {
        if self.losses.is_none() {
            return;
        }
        let UnitOperands { input, target } = self.elements.unit;
        for (values, checked) in [(x, input), (t, target)] {
            if let Some(first) = checked.then(|| InUnit { values, mask }.first_bad()).flatten() {
                self.bad.fetch_min(at + first, Ordering::Relaxed);
            }
        }
    }

    /// The losses of a block: written, or their sum.
    fn reduce(
        &self,
        losses: &ElementLosses<A>,
        groups: &Range<usize>,
        at: usize,
        len: usize,
        values: &mut [A; BLOCK],
    ) -> A {
        let all = self.elements;
        if !all.is_each() || all.group > BLOCK {
            return dispatch(BlockSum { values, len });
        }
        if all.group == 1 {
            // SAFETY: a group is written by the unit it belongs to
            let to = unsafe { losses.to.slice(at, len) };
            if losses.past_cache {
                // SAFETY: they are only read
                stream::copy_past_cache(unsafe { as_uninit(&mut values[..len]) }, to);
            } else {
                A::narrow(&values[..len], to);
            }
            return A::ZERO;
        }
        for (group, values) in groups.clone().zip(values[..len].chunks(all.group)) {
            let sum = values.iter().fold(0f64, |sum, v| sum + v.to_f64());
            // SAFETY: a group is written by the unit it belongs to
            unsafe { losses.to.slice(group, 1)[0].write(A::of(sum / all.group as f64)) };
        }
        A::ZERO
    }

    /// Multiplies the derivatives of a block by those of the steps behind the formula, and writes them. The memory is
    /// for what is on its way there.
    fn write_gradient(
        &self,
        gradient: &ElementGradient<A, O>,
        at: usize,
        values: &[A],
        mask: Option<&[A]>,
        (upstreams, through, staged): (&mut [A; BLOCK], &mut [A; BLOCK], &mut [MaybeUninit<O>]),
    ) {
        let (all, len) = (self.elements, values.len());
        let smoothing = if gradient.of == Argument::Target { all.keep } else { A::ONE };
        let factor = smoothing * all.share() / gradient.denominator;
        let factors = match gradient.upstream {
            // no gradient goes out of a loss that was divided by 0
            [_] if gradient.denominator == A::ZERO => ChainFactors::All(A::ZERO),
            [upstream] => ChainFactors::All(*upstream * factor),
            upstream if all.group == 1 => ChainFactors::Each(&upstream[at..][..len], factor),
            upstream => {
                let upstreams = &mut upstreams[..len];
                upstreams.iter_mut().enumerate().for_each(|(i, g)| *g = upstream[(at + i) / all.group]);
                ChainFactors::Each(upstreams, factor)
            }
        };
        // SAFETY: an element is written by the unit it belongs to
        let to = unsafe { gradient.to.slice(at, len) };
        if gradient.past_cache {
            WriteGradient { values, factors, mask, out: &mut *staged }.write(through);
            stream::copy_past_cache(staged, to);
        } else {
            WriteGradient { values, factors, mask, out: to }.write(through);
        }
    }

    fn is_past_cache(&self) -> bool {
        let losses = self.losses.as_ref().is_some_and(|losses| losses.past_cache);
        losses || self.gradient.as_ref().is_some_and(|gradient| gradient.past_cache)
    }
}

impl<'a, A: Real + Element<Acc = A>> ElementsOnCpu<'a, A> {
    fn run<O: Element<Acc = A>>(
        &self,
        losses: Option<ElementLosses<A>>,
        gradient: Option<ElementGradient<A, O>>,
    ) -> Result<()> {
        let pass = ElementPass { elements: self, losses, gradient, bad: AtomicUsize::new(usize::MAX) };
        for_each_task(self.units(), self.groups_per_unit() * self.group * ELEMENT_WORK, |units| {
            let mut scratch = ElementScratch::new();
            units.for_each(|unit| pass.unit(unit, &mut scratch));
            if pass.is_past_cache() {
                stream::fence();
            }
        });
        let at = pass.bad.into_inner();
        if at == usize::MAX {
            return Ok(());
        }
        let value = |(storage, layout): Arg<CpuStorage>| -> Result<_> {
            let mut value = [0f64];
            source(storage, Strided::of(layout))?.load(at, &mut value);
            Ok((value[0], storage.dtype()))
        };
        let [input, target] = self.checked;
        Err(self.problem.out_of_range(at, value(input)?, value(target)?))
    }

    /// The losses, reduced, and in the same pass the gradient, if one is asked for.
    fn losses<O: Element<Acc = A>>(
        &self,
        denominator: f64,
        gradient: Option<ElementGradient<A, O>>,
    ) -> Result<CpuStorage> {
        let none = self.is_each();
        let count = if none { self.groups() } else { self.units() };
        let mut losses = with_room(count);
        let past_cache = none && stream::exceeds_cache(count * size_of::<A>());
        self.run(Some(ElementLosses { to: &Output::new(&mut losses, count), past_cache }), gradient)?;
        // SAFETY: the capacity is `count`, and the pass wrote a number for each group or unit
        unsafe { losses.set_len(count) };
        Ok(A::to_cpu_storage_owned(if none {
            losses
        } else {
            let sum = sum_in_order(&losses) / self.group.max(1) as f64;
            vec![A::of(sum / denominator)]
        }))
    }

    /// The gradient of an argument, in elements of type `O`.
    fn gradient<O: Element<Acc = A>>(&self, of: Argument, upstream: &[A], denominator: A) -> Result<CpuStorage> {
        let mut grad = with_room(self.len);
        let to = &Output::<O>::new(&mut grad, self.len);
        let past_cache = stream::exceeds_cache(self.len * size_of::<O>());
        self.run(None, Some(ElementGradient { of, upstream, denominator, to, past_cache }))?;
        // SAFETY: the capacity is `len`, and the pass wrote every element
        unsafe { grad.set_len(self.len) };
        Ok(O::to_cpu_storage_owned(grad))
    }

    /// The losses, reduced, and the gradient of the input, in elements of type `O`.
    fn losses_and_gradient<O: Element<Acc = A>>(&self) -> Result<(CpuStorage, CpuStorage)> {
        let denominator = self.denominator()?;
        let mut grad = with_room(self.len);
        let to = &Output::<O>::new(&mut grad, self.len);
        let (of, upstream) = (Argument::Input, &[A::of(self.problem.options.grad_scale)]);
        let past_cache = stream::exceeds_cache(self.len * size_of::<O>());
        let gradient = ElementGradient { of, upstream, denominator: A::of(denominator), to, past_cache };
        let loss = self.losses(denominator, Some(gradient))?;
        // SAFETY: the capacity is `len`, and the pass wrote every element
        unsafe { grad.set_len(self.len) };
        Ok((loss, O::to_cpu_storage_owned(grad)))
    }
}

/// The arguments of a call. Its methods take the input's elements for their type alone.
struct ElementCallOnCpu<'a> {
    problem: &'a Elements,
    input: Arg<'a, CpuStorage>,
    target: Arg<'a, CpuStorage>,
}

impl ElementCallOnCpu<'_> {
    fn forward<T: Element>(self, _: &[T]) -> Result<(CpuStorage, CpuStorage)> {
        let locked = self.problem.lock();
        let elements = ElementsOnCpu::<T::Acc>::new(self.problem, self.input, self.target, &locked)?;
        let denominator = elements.denominator()?;
        let loss = elements.losses::<T>(denominator, None)?;
        Ok((loss, T::Acc::to_cpu_storage_owned(vec![T::Acc::of(denominator)])))
    }

    fn backward<T: Element>(
        self,
        _: &[T],
        denominator: &Tensor,
        of: Argument,
        upstream: Arg<CpuStorage>,
    ) -> Result<CpuStorage> {
        let locked = self.problem.lock();
        let elements = ElementsOnCpu::<T::Acc>::new(self.problem, self.input, self.target, &locked)?;
        let (upstream, denominator) = (own_slice(upstream)?, denominator.to_scalar()?);
        match of {
            Argument::Input => elements.gradient::<T>(of, upstream, denominator),
            Argument::Target => elements.gradient::<T::Acc>(of, upstream, denominator),
        }
    }

    fn loss_and_grad<T: Element>(self, _: &[T]) -> Result<(CpuStorage, CpuStorage)> {
        let locked = self.problem.lock();
        ElementsOnCpu::<T::Acc>::new(self.problem, self.input, self.target, &locked)?.losses_and_gradient::<T>()
    }
}

impl ElementKernels for CpuStorage {
    fn forward(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let call = ElementCallOnCpu { problem, input, target };
        with_floats!(problem.name, input.0, x => call.forward(x))
    }

    fn backward(
        problem: &Elements,
        denominator: &Tensor,
        of: Argument,
        input: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        let call = ElementCallOnCpu { problem, input, target };
        with_floats!(problem.name, input.0, x => call.backward(x, denominator, of, upstream))
    }

    fn loss_and_grad(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let call = ElementCallOnCpu { problem, input, target };
        with_floats!(problem.name, input.0, x => call.loss_and_grad(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::problem::{ElementOptions, Term};
    use crate::reduction::Reduction;
    use candle_core::{DType, Device, Storage, Var};
    use half::{bf16, f16};

    /// The losses and gradients of a problem, written past the cache or not.
    fn pass<O: Element<Acc = f32>>(
        problem: &Elements,
        (input, target): (&Tensor, &Tensor),
        upstream: &[f32],
        past_cache: bool,
    ) -> Result<(Vec<f32>, Vec<O>)> {
        let (input, target) = (input.storage_and_layout(), target.storage_and_layout());
        let (Storage::Cpu(x), Storage::Cpu(t)) = (&*input.0, &*target.0) else { panic!("tensors on the CPU") };
        let locked = problem.lock();
        let elements = ElementsOnCpu::<f32>::new(problem, (x, input.1), (t, target.1), &locked)?;
        let (mut losses, mut grad) = (vec![f32::NAN; elements.len], vec![O::from_acc(f32::NAN); elements.len]);
        let (to, losses_to) = (&Output::in_place(&mut grad).1, &Output::in_place(&mut losses).1);
        let gradient = ElementGradient { of: Argument::Input, upstream, denominator: 3.0, to, past_cache };
        elements.run(Some(ElementLosses { to: losses_to, past_cache }), Some(gradient))?;
        Ok((losses, grad))
    }

    /// What is written past the cache is what is written through it, to the bit.
    #[test]
    fn values_past_the_cache_are_the_same() -> Result<()> {
        fn check<O: Element<Acc = f32> + std::fmt::Debug>(n: usize) -> Result<()> {
            let x = Tensor::randn(0f32, 3., n, &Device::Cpu)?.to_dtype(O::DTYPE)?;
            let t = Tensor::rand(0f32, 1., n, &Device::Cpu)?;
            let mask = (&t * 2.0)?.to_dtype(DType::U8)?;
            let upstreams: Vec<f32> = (0..n).map(|i| i as f32 - 7.0).collect();
            for mask in [None, Some(mask)] {
                let options = ElementOptions { mask, reduction: Reduction::None, ..ElementOptions::default() };
                let problem = options.problem("test", Term::BceWithLogits, &x, &t)?;
                for upstream in [&upstreams[..1], &upstreams] {
                    let (losses, grad) = pass::<O>(&problem, (&x, &t), upstream, false)?;
                    let (losses_past, grad_past) = pass::<O>(&problem, (&x, &t), upstream, true)?;
                    assert!(losses.iter().all(|v| v.is_finite()) && grad.iter().all(|v| v.to_acc().is_finite()));
                    assert_eq!((losses, grad), (losses_past, grad_past), "{:?} {n}", O::DTYPE);
                }
            }
            Ok(())
        }
        for n in [1, 37, 2 * BLOCK + 333] {
            check::<f32>(n)?;
            check::<bf16>(n)?;
            check::<f16>(n)?;
        }
        Ok(())
    }

    /// A mask takes probabilities and targets out of the check, on both paths, in whichever block they are.
    #[test]
    fn masked_probabilities_are_not_checked() -> Result<()> {
        let n = 2500;
        let column = |value: f32, elsewhere: f32| -> Result<Tensor> {
            let values: Vec<_> = (0..n).map(|i| if i == 2000 { value } else { elsewhere }).collect();
            Tensor::from_vec(values, n, &Device::Cpu)
        };
        let (good, mask) = (column(0.5, 0.5)?, column(0.0, 1.0)?);
        for (x, t) in [(7.0, 0.5), (f32::NAN, 0.5), (0.5, -1.0)] {
            let (x, t) = (column(x, 0.5)?, column(t, 0.5)?);
            for fused in [true, false] {
                let options = ElementOptions { fused, ..ElementOptions::default() };
                let problem = |mask| ElementOptions { mask, ..options.clone() }.problem("test", Term::Bce, &x, &t);
                let error = problem(None)?.forward(&x, &t).expect_err("no probability").to_string();
                assert!(error.contains("at element 2000"), "{error}");
                let (loss, grad) = problem(Some(mask.clone()))?.loss_and_grad(&x, &t)?;
                assert!((loss.to_scalar::<f32>()? - std::f32::consts::LN_2).abs() < 1e-6);
                assert_eq!(grad.to_vec1::<f32>()?, vec![0.0; n]);
                problem(Some(mask.clone()))?.forward(&good, &good)?;
            }
        }
        Ok(())
    }

    /// A pass for both computes the loss of a pass without a gradient and the gradient of one without a loss, to the
    /// bit.
    #[test]
    fn loss_and_gradient_are_those_of_separate_passes() -> Result<()> {
        let focal = |gamma| Term::Focal { alpha: Some(0.25), gamma };
        for term in [Term::Bce, Term::BceWithLogits, focal(2.0), focal(1.5), Term::L1] {
            let x = Var::from_tensor(&Tensor::rand(0f32, 1., 1537, &Device::Cpu)?)?;
            let t = Tensor::rand(0f32, 1., 1537, &Device::Cpu)?;
            let problem = ElementOptions::default().problem("test", term, &x, &t)?;
            let loss = problem.clone().forward(&x, &t)?;
            let (loss_again, grad_again) = problem.loss_and_grad(&x, &t)?;
            let grads = loss.backward()?;
            let grad = grads.get(&x).expect("a gradient").to_vec1::<f32>()?;
            assert_eq!(loss.to_scalar::<f32>()?, loss_again.to_scalar::<f32>()?, "{term:?}");
            assert_eq!(grad, grad_again.to_vec1::<f32>()?, "{term:?}");
        }
        Ok(())
    }

    /// For Miri: every term, with and without a loss of each element, of elements that lie apart too.
    #[test]
    fn small_elements_keep_to_their_memory() -> Result<()> {
        let focal = Term::Focal { alpha: Some(0.25), gamma: 1.5 };
        for term in [Term::Bce, Term::BceWithLogits, focal, Term::L1] {
            for (reduction, dtype) in [(Reduction::None, DType::BF16), (Reduction::Mean, DType::F32)] {
                let x = Tensor::rand(0f32, 1., (7, 5), &Device::Cpu)?.to_dtype(dtype)?;
                let x = Var::from_tensor(&x)?;
                let x_apart = x.t()?;
                let target = Tensor::rand(0f32, 1., (5, 7), &Device::Cpu)?;
                let options = ElementOptions { reduction, ..ElementOptions::default() };
                let loss = options.problem("test", term, &x_apart, &target)?.forward(&x_apart, &target)?;
                let loss = loss.mean_all()?;
                loss.backward()?;
                let (again, _) = options.problem("test", term, &x_apart, &target)?.loss_and_grad(&x_apart, &target)?;
                assert_eq!(loss.to_scalar::<f32>()?, again.mean_all()?.to_scalar::<f32>()?);
            }
        }
        Ok(())
    }
}
