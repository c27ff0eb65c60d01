//! The vectorised loops: reducing and emitting blocks of a row, and tiles of rows.

use super::rows::{BLOCK, DEPTH, Extra, LANES, Logits, Place, Scratch};
use crate::cpu::element::{Element, Output};
use crate::cpu::math::{Baseline, Isa, Kernel, Real, max_of, sum_of};
use std::ops::Range;

/// What a row is reduced to.
#[derive(Clone, Copy)]
pub(super) struct State<A> {
    /// The largest logit m.
    pub(super) max: A,
    /// `sum exp(x - m)` without the term of one maximum.
    pub(super) rest: A,
    /// `sum q (x - m)` and `sum q` for the extra numbers q.
    pub(super) linear: A,
    pub(super) mass: A,
    /// `sum exp(x - m) (x - m)`, for the entropy.
    pub(super) moment: A,
    pub(super) argmax: u32,
}

/// A block's contribution to a [`State`], relative to `max`, the maximum of the block and of the row so far.
pub(super) struct Part<A> {
    pub(super) max: A,
    pub(super) block_max: A,
    /// `sum exp(x - max)` over the classes below `max`, and the number of those at it.
    pub(super) tail: A,
    pub(super) ties: A,
    pub(super) linear: A,
    pub(super) mass: A,
    pub(super) moment: A,
}

impl<A: Real> State<A> {
    pub(super) const EMPTY: Self =
        State { max: A::NEG_INFINITY, rest: A::ZERO, linear: A::ZERO, mass: A::ZERO, moment: A::ZERO, argmax: 0 };

    /// Branch-free, for one row in each lane.
    #[inline(always)]
    pub(super) fn absorb<I: Isa>(&mut self, part: Part<A>) {
        let max = part.max;
        let grew = part.block_max > self.max;
        let nothing = self.max == A::NEG_INFINITY;
        let shift = if nothing { A::ZERO } else { self.max - max };
        let shrink = if nothing { A::ZERO } else { shift.vexp::<I>() };
        // while all is -inf there is no maximum to leave out; a NaN in the rest stays one through the product
        let ties = if max == A::NEG_INFINITY { A::ZERO } else { part.ties };
        let total = A::ONE + self.rest;
        self.moment = shrink * (self.moment + total * shift) + part.moment;
        self.rest = if grew { part.tail + (ties - A::ONE) + total * shrink } else { self.rest + part.tail + ties };
        self.linear = self.linear + self.mass * shift + part.linear;
        self.mass += part.mass;
        self.max = max;
    }

    /// Merges the state of the classes that follow.
    pub(super) fn merge(&mut self, next: &Self) {
        if next.max > self.max {
            self.argmax = next.argmax;
        }
        let max = self.max.max_or_self(next.max);
        let grew = next.max > self.max;
        let shift = if next.max == A::NEG_INFINITY { A::ZERO } else { next.max - max };
        let shrink = if next.max == A::NEG_INFINITY { A::ZERO } else { shift.vexp::<Baseline>() };
        // as a part: the next classes below `max`, and their maximum where it is at `max`
        let (tail, ties) = if shift == A::ZERO && next.max != A::NEG_INFINITY {
            (next.rest, A::ONE)
        } else {
            ((A::ONE + next.rest) * shrink, A::ZERO)
        };
        self.absorb::<Baseline>(Part {
            max,
            block_max: if grew { next.max } else { A::NEG_INFINITY },
            tail,
            ties,
            linear: next.linear + next.mass * shift,
            mass: next.mass,
            moment: shrink * next.moment
                + if shrink == A::ZERO { A::ZERO } else { (A::ONE + next.rest) * shrink * shift },
        });
    }
}

/// The numbers of a row from which a pass emits its values.
#[derive(Clone, Copy)]
pub(super) struct RowScalars<A> {
    pub(super) max: A,
    /// `1 / sum exp(x - m)`
    pub(super) inverse: A,
    /// `log sum exp(x - m)`
    pub(super) log_sum: A,
    /// `rest / (1 + rest)`: 1 - p of the most probable class
    pub(super) confident: A,
    /// The factor of the probability, and the sum of the row's q.
    pub(super) slope: A,
    pub(super) mass: A,
    /// Upstream gradient over the denominator.
    pub(super) upstream: A,
    /// Whether the row counts; what it emits is 0 otherwise.
    pub(super) live: bool,
}

impl<A: Real> RowScalars<A> {
    pub(super) const DEAD: Self = RowScalars {
        max: A::ZERO,
        inverse: A::ZERO,
        log_sum: A::ZERO,
        confident: A::ZERO,
        slope: A::ZERO,
        mass: A::ZERO,
        upstream: A::ZERO,
        live: false,
    };

    pub(super) fn new(max: A, rest: A) -> Self {
        // a row of only -inf, or with +inf, has no softmax
        let max = if max.is_finite() { max } else { A::NAN };
        let total = A::ONE + rest;
        RowScalars {
            max,
            inverse: A::ONE / total,
            log_sum: log_sum(max, rest),
            confident: rest / total,
            slope: A::ZERO,
            mass: A::ZERO,
            upstream: A::ONE,
            live: true,
        }
    }
}

/// `log sum exp(x - m)`, NaN where the row has no finite maximum.
#[inline(always)]
pub(super) fn log_sum<A: Real>(max: A, rest: A) -> A {
    if max.is_finite() { A::of(rest.to_f64().ln_1p()) } else { A::NAN }
}

/// The value that a pass emits for a logit.
pub(super) trait Emit<A: Real>: Sync {
    /// Whether the value is a derivative in the logits, so that the soft cap's slope belongs to it.
    const IN_LOGITS: bool = false;

    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, extra: A) -> A;
}

/// `upstream (slope p - q)`
pub(super) struct LogitsGradient;
impl<A: Real> Emit<A> for LogitsGradient {
    const IN_LOGITS: bool = true;

    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, q: A) -> A {
        let p = (x - row.max).vexp::<I>() * row.inverse;
        let direct = row.slope * p - q;
        // at the most probable class, slope p - q = (mass - q) - mass (1 - p) + (slope - mass) p does not cancel
        let confident = (row.mass - q) - row.mass * row.confident + (row.slope - row.mass) * p;
        row.upstream * if x == row.max { confident } else { direct }
    }
}

/// `upstream w (lse - x)`
pub(super) struct TargetGradient;
impl<A: Real> Emit<A> for TargetGradient {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, w: A) -> A {
        let g = row.upstream * w * (row.log_sum - (x - row.max));
        if w == A::ZERO { A::ZERO } else { g }
    }
}

/// `x - lse`
pub(super) struct LogProbs;
impl<A: Real> Emit<A> for LogProbs {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, _: A) -> A {
        (x - row.max) - row.log_sum
    }
}

/// `g - exp(y) sum(g)` for log-probabilities y
pub(super) struct LogProbsGradient;
impl<A: Real> Emit<A> for LogProbsGradient {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, y: A, g: A) -> A {
        g - y.vexp::<I>() * row.mass
    }
}

/// What a reduction computes beside the maximum and the sum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    Loss,
    /// Entropy and argmax too.
    Statistics,
}

/// Reduces a segment of a row.
pub(super) struct ReduceSegment<'k, 'a, T: Element> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
    pub(super) detail: Detail,
    pub(super) row: usize,
    pub(super) classes: Range<usize>,
    pub(super) scratch: &'k mut Scratch<T::Acc>,
}

impl<T: Element> Kernel for ReduceSegment<'_, '_, T> {
    type Output = State<T::Acc>;

    #[inline(always)]
    fn run<I: Isa>(self) -> State<T::Acc> {
        let ReduceSegment { logits, extra, detail, row, classes, scratch } = self;
        let zero = T::Acc::ZERO;
        let mut state = State::<T::Acc>::EMPTY;
        let Scratch { x, e, extra: q, .. } = scratch;
        for class in classes.clone().step_by(BLOCK) {
            let len = (classes.end - class).min(BLOCK);
            let xs = logits.block::<I>(row, class, len, x, None);
            let block_max = max_of(xs);
            let max = state.max.max_or_self(block_max);
            let reference = if max == T::Acc::NEG_INFINITY { zero } else { max };
            let e = &mut e.as_flattened_mut()[..xs.len()];
            for (e, &x) in e.iter_mut().zip(xs) {
                let v = (x - reference).vexp::<I>();
                *e = if x == max { zero } else { v };
            }
            let mut part = Part { max, block_max, tail: sum_of(e), ties: zero, linear: zero, mass: zero, moment: zero };
            if detail == Detail::Statistics {
                if block_max > state.max {
                    state.argmax = (class + xs.iter().position(|&x| x == block_max).unwrap_or(0)) as u32;
                }
                for (e, &x) in e.iter_mut().zip(xs) {
                    *e = if *e == zero { zero } else { *e * (x - reference) };
                }
                part.moment = sum_of(e);
            }
            if block_max == max {
                for (e, &x) in e.iter_mut().zip(xs) {
                    *e = if x == max { T::Acc::ONE } else { zero };
                }
                part.ties = sum_of(e);
            }
            if !extra.is_none() {
                let q = q.as_flattened_mut();
                extra.load(row * logits.rows.classes + class, class, &mut q[..len]);
                q[len..xs.len()].fill(zero);
                part.mass = sum_of(&q[..xs.len()]);
                for ((e, &x), &q) in e.iter_mut().zip(xs).zip(&q[..]) {
                    let v = q * (x - reference);
                    *e = if q == zero { zero } else { v };
                }
                part.linear = sum_of(e);
            }
            state.absorb::<I>(part);
        }
        state
    }
}

/// Reduces a tile of rows.
pub(super) struct ReduceTile<'k, 'a, T: Element> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
    pub(super) detail: Detail,
    pub(super) place: &'k Place,
    pub(super) scratch: &'k mut Scratch<T::Acc>,
}

impl<T: Element> Kernel for ReduceTile<'_, '_, T> {
    type Output = [State<T::Acc>; LANES];

    #[inline(always)]
    fn run<I: Isa>(self) -> [State<T::Acc>; LANES] {
        let ReduceTile { logits, extra, detail, place, scratch } = self;
        let zero = T::Acc::ZERO;
        let mut states = [State::<T::Acc>::EMPTY; LANES];
        let mut top = [T::Acc::NEG_INFINITY; LANES];
        let Scratch { x, extra: q, .. } = scratch;
        for class in (0..logits.rows.classes).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(logits.rows.classes);
            logits.tile::<I>(place, &classes, x, None);
            let xs = &x[..classes.len()];
            if detail == Detail::Statistics {
                for (xs, class) in xs.iter().zip(classes.clone()) {
                    for lane in 0..LANES {
                        if xs[lane] > top[lane] {
                            top[lane] = xs[lane];
                            states[lane].argmax = class as u32;
                        }
                    }
                }
            }
            let mut block_max = [T::Acc::NEG_INFINITY; LANES];
            for xs in xs {
                for (m, &x) in block_max.iter_mut().zip(xs) {
                    *m = m.max_or_self(x);
                }
            }
            let mut max = [zero; LANES];
            let mut reference = [zero; LANES];
            for lane in 0..LANES {
                max[lane] = states[lane].max.max_or_self(block_max[lane]);
                reference[lane] = if max[lane] == T::Acc::NEG_INFINITY { zero } else { max[lane] };
            }
            let (mut tail, mut ties, mut moment) = ([zero; LANES], [zero; LANES], [zero; LANES]);
            for xs in xs {
                for lane in 0..LANES {
                    let v = (xs[lane] - reference[lane]).vexp::<I>();
                    let tie = xs[lane] == max[lane];
                    tail[lane] += if tie { zero } else { v };
                    ties[lane] += if tie { T::Acc::ONE } else { zero };
                }
            }
            if detail == Detail::Statistics {
                for xs in xs {
                    for lane in 0..LANES {
                        let d = xs[lane] - reference[lane];
                        let v = d.vexp::<I>();
                        moment[lane] += if v == zero { zero } else { v * d };
                    }
                }
            }
            let (mut linear, mut mass) = ([zero; LANES], [zero; LANES]);
            if !extra.is_none() {
                place.load_extra(extra, &classes, q);
                for (xs, q) in xs.iter().zip(q.iter()) {
                    for lane in 0..LANES {
                        let v = q[lane] * (xs[lane] - reference[lane]);
                        linear[lane] += if q[lane] == zero { zero } else { v };
                        mass[lane] += q[lane];
                    }
                }
            }
            for lane in 0..LANES {
                states[lane].absorb::<I>(Part {
                    max: max[lane],
                    block_max: block_max[lane],
                    tail: tail[lane],
                    ties: ties[lane],
                    linear: linear[lane],
                    mass: mass[lane],
                    moment: moment[lane],
                });
            }
        }
        states
    }
}

/// Emits a segment of a row into `out`, which holds its classes.
pub(super) struct EmitSegment<'k, 'a, T: Element, O, E> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
    pub(super) emit: &'k E,
    pub(super) scalars: &'k RowScalars<T::Acc>,
    pub(super) row: usize,
    pub(super) classes: Range<usize>,
    pub(super) out: &'k Output<'k, O>,
    pub(super) scratch: &'k mut Scratch<T::Acc>,
}

impl<T: Element, O: Element<Acc = T::Acc>, E: Emit<T::Acc>> Kernel for EmitSegment<'_, '_, T, O, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitSegment { logits, extra, emit, scalars, row, classes, out, scratch } = self;
        let Scratch { x, e, extra: q, slope } = scratch;
        for class in classes.clone().step_by(BLOCK) {
            let len = (classes.end - class).min(BLOCK);
            let at = row * logits.rows.classes + class;
            let e = &mut e.as_flattened_mut()[..len.next_multiple_of(LANES)];
            if scalars.live {
                let xs = logits.block::<I>(row, class, len, x, Some(slope));
                let q = &mut q.as_flattened_mut()[..xs.len()];
                if extra.is_none() {
                    for (e, &x) in e.iter_mut().zip(xs) {
                        *e = emit.value::<I>(scalars, x, T::Acc::ZERO);
                    }
                } else {
                    extra.load(at, class, &mut q[..len]);
                    for ((e, &x), &q) in e.iter_mut().zip(xs).zip(q.iter()) {
                        *e = emit.value::<I>(scalars, x, q);
                    }
                }
                if E::IN_LOGITS && logits.softcap.is_some() {
                    for (e, &s) in e.iter_mut().zip(slope.as_flattened()) {
                        *e *= s;
                    }
                }
            } else {
                e.fill(T::Acc::ZERO);
            }
            // SAFETY: each segment of each row is emitted by one unit, and the slice that `block` may have returned is dead
            O::narrow(&e[..len], unsafe { out.slice(at, len) });
        }
    }
}

/// Emits a tile of rows.
pub(super) struct EmitTile<'k, 'a, T: Element, O, E> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
    pub(super) emit: &'k E,
    pub(super) scalars: &'k [RowScalars<T::Acc>; LANES],
    pub(super) place: &'k Place,
    pub(super) out: &'k Output<'k, O>,
    pub(super) scratch: &'k mut Scratch<T::Acc>,
}

impl<T: Element, O: Element<Acc = T::Acc>, E: Emit<T::Acc>> Kernel for EmitTile<'_, '_, T, O, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitTile { logits, extra, emit, scalars, place, out, scratch } = self;
        let Scratch { x, e, extra: q, slope } = scratch;
        for class in (0..logits.rows.classes).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(logits.rows.classes);
            logits.tile::<I>(place, &classes, x, Some(slope));
            if extra.is_none() {
                q[..classes.len()].as_flattened_mut().fill(T::Acc::ZERO);
            } else {
                place.load_extra(extra, &classes, q);
            }
            for ((e, xs), q) in e[..classes.len()].iter_mut().zip(x.iter()).zip(q.iter()) {
                for lane in 0..LANES {
                    let v = emit.value::<I>(&scalars[lane], xs[lane], q[lane]);
                    e[lane] = if scalars[lane].live { v } else { T::Acc::ZERO };
                }
            }
            if E::IN_LOGITS && logits.softcap.is_some() {
                for (e, s) in e[..classes.len()].iter_mut().zip(slope.iter()) {
                    for lane in 0..LANES {
                        let v = e[lane] * s[lane];
                        e[lane] = if scalars[lane].live { v } else { T::Acc::ZERO };
                    }
                }
            }
            if place.write_adjacent && place.write_stride > 1 {
                for (e, class) in e.iter().zip(classes) {
                    let at = place.write[0] + class * place.write_stride;
                    // SAFETY: each row is emitted by one unit, after its logits were copied into the scratch
                    O::narrow(&e[..place.lanes], unsafe { out.slice(at, place.lanes) });
                }
            } else {
                let mut row = [T::Acc::ZERO; DEPTH];
                for lane in 0..place.lanes {
                    for (v, e) in row.iter_mut().zip(&e[..classes.len()]) {
                        *v = e[lane];
                    }
                    if place.write_stride == 1 {
                        // SAFETY: as above
                        O::narrow(&row[..classes.len()], unsafe {
                            out.slice(place.write[lane] + classes.start, classes.len())
                        });
                    } else {
                        for (v, class) in row.iter().zip(classes.clone()) {
                            // SAFETY: as above
                            O::narrow(std::slice::from_ref(v), unsafe {
                                out.slice(place.write[lane] + class * place.write_stride, 1)
                            });
                        }
                    }
                }
            }
        }
    }
}
