//! The vectorised loops on blocks of rows and on tiles of rows: all that depends on the instruction set.

use crate::cpu::element::Element;
use crate::cpu::math::{
    Ahead, Baseline, Isa, LANES, PerLane, Real, Vectorized, end_of, max_lanes, raise, sum_lanes, vectors,
};
use std::mem::MaybeUninit;
use std::ops::Range;

/// What a reduction computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RowDetail {
    /// The maximum, the sum of exponentials, and the sums of q.
    Loss,
    /// Entropy and argmax too.
    Statistics,
    /// The sum of q alone.
    Mass,
}

/// What up to [`LANES`] rows are reduced to.
#[derive(Clone, Copy)]
pub(super) struct States<A> {
    /// The factor of differences of logits.
    pub(super) scale: A,
    /// The largest logit m.
    pub(super) max: [A; LANES],
    /// `sum exp(x - m)` without the term of one maximum.
    pub(super) rest: [A; LANES],
    /// `sum q (x - m)`; where the mass alone is computed, what its rounding lost.
    pub(super) linear: [A; LANES],
    /// `sum q`
    pub(super) mass: [A; LANES],
    /// `sum exp(x - m) (x - m)`, for the entropy.
    pub(super) moment: [A; LANES],
    pub(super) argmax: [u32; LANES],
    /// `log sum exp(x - m)`, NaN where the row has no finite maximum: once the row is complete.
    pub(super) log_sum: [A; LANES],
}

/// A block's contribution to the [`States`], relative to `max`, the maximum of the block and of the row so far.
pub(super) struct Part<A> {
    pub(super) max: A,
    pub(super) block_max: A,
    /// `sum exp(x - max)`, without the term of one maximum if the block raised it.
    pub(super) rest: A,
    pub(super) linear: A,
    pub(super) mass: A,
    pub(super) moment: A,
}

impl<A: Real> States<A> {
    pub(super) const EMPTY: Self = States {
        scale: A::ONE,
        max: [A::NEG_INFINITY; LANES],
        rest: [A::ZERO; LANES],
        linear: [A::ZERO; LANES],
        mass: [A::ZERO; LANES],
        moment: [A::ZERO; LANES],
        argmax: [0; LANES],
        log_sum: [A::NAN; LANES],
    };

    /// Adds a part to the row in a lane, without branches.
    #[inline(always)]
    fn absorb<I: Isa>(&mut self, lane: usize, part: Part<A>) {
        let (max, row_max, rest, mass) = (part.max, self.max[lane], self.rest[lane], self.mass[lane]);
        let grew = part.block_max > row_max;
        let nothing = row_max == A::NEG_INFINITY;
        let shift = if nothing { A::ZERO } else { row_max - max };
        let power = (self.scale * shift).vexp::<I>();
        let shrink = if nothing { A::ZERO } else { power };
        let total = A::ONE + rest;
        // a shift may be -inf: finite logits can lie farther apart than the largest number
        self.moment[lane] = scaled(shrink, self.moment[lane] + total * shift) + part.moment;
        // a NaN in the rest stays one through the product
        self.rest[lane] = part.rest + if grew { total * shrink } else { rest };
        self.linear[lane] = self.linear[lane] + scaled(mass, shift) + part.linear;
        self.mass[lane] = mass + part.mass;
        self.max[lane] = max;
    }

    /// As [`Self::absorb`] for the first part of a row, without an exponential.
    #[inline(always)]
    fn start(&mut self, lane: usize, part: Part<A>) {
        let Part { max, rest, linear, mass, moment, .. } = part;
        self.max[lane] = max;
        self.rest[lane] = rest;
        self.linear[lane] = linear;
        self.mass[lane] = mass;
        self.moment[lane] = moment;
    }

    /// Adds to the mass of the row in a lane, where nothing else is computed.
    #[inline(always)]
    fn add_mass(&mut self, lane: usize, sum: f64) {
        let total = self.mass[lane].to_f64() + self.linear[lane].to_f64() + sum;
        let mass = A::of(total);
        self.mass[lane] = mass;
        self.linear[lane] = if mass.is_finite() { A::of(total - mass.to_f64()) } else { A::ZERO };
    }

    /// Merges the first lane with that of the classes that follow in the same row.
    pub(super) fn merge(&mut self, next: &Self) {
        let (high, low) = if next.max[0] > self.max[0] { (*next, *self) } else { (*self, *next) };
        let nothing = low.max[0] == A::NEG_INFINITY;
        let shift = if nothing { A::ZERO } else { low.max[0] - high.max[0] };
        let shrink = if nothing { A::ZERO } else { (self.scale * shift).vexp::<Baseline>() };
        let total = A::ONE + low.rest[0];
        *self = high;
        self.rest[0] += total * shrink;
        self.linear[0] += scaled(low.mass[0], shift) + low.linear[0];
        self.mass[0] += low.mass[0];
        self.moment[0] += scaled(shrink, low.moment[0] + total * shift);
        self.log_sum[0] = log_sum(self.max[0], self.rest[0]);
    }

    /// Makes the states those of rows that are complete: in the first lanes, of which there are a whole number of
    /// vectors.
    #[inline(always)]
    fn complete<I: Isa>(&mut self, rows: usize) {
        for lane in 0..rows.next_multiple_of(8).min(LANES) {
            let log_sum = A::of(self.rest[lane].to_f64().vln_1p::<I>());
            self.log_sum[lane] = if self.max[lane].is_finite() { log_sum } else { A::NAN };
        }
    }
}

/// The targets of up to [`LANES`] adjacent rows.
#[derive(Clone, Copy)]
pub(super) struct RowTargets<A> {
    /// The row's own class and what it adds to its q: 0 and 0 where there is none.
    pub(super) class: [usize; LANES],
    pub(super) weight: [A; LANES],
    /// Whether the row counts; what it emits is 0 otherwise.
    pub(super) live: [bool; LANES],
}

impl<A: Real> RowTargets<A> {
    pub(super) const NONE: Self = RowTargets { class: [0; LANES], weight: [A::ZERO; LANES], live: [true; LANES] };
}

/// The numbers of a row, or of up to [`LANES`] adjacent ones, from which a pass emits its values.
#[derive(Clone, Copy, Default)]
pub(super) struct RowScalars<V> {
    pub(super) max: V,
    /// `1 / sum exp(x - m)`
    pub(super) inverse: V,
    /// `log sum exp(x - m)`, where an emission needs it
    pub(super) log_sum: V,
    /// The logit of a class that is more probable than all others together, and `slope p - mass` there; else NaN.
    pub(super) peak: V,
    pub(super) at_peak: V,
    /// The factor of the probability, and the sum of the row's q.
    pub(super) slope: V,
    pub(super) mass: V,
    /// Upstream gradient over the denominator.
    pub(super) upstream: V,
}

impl<A: Real> RowScalars<[A; LANES]> {
    /// Of rows with these maxima and these sums without the maximum.
    #[inline(always)]
    pub(super) fn of_softmax(max: &[A], rest: &[A]) -> Self {
        let mut scalars = Self::default();
        for (lane, (&max, &rest)) in max.iter().zip(rest).take(LANES).enumerate() {
            // a row of only -inf, or with +inf, has no softmax
            scalars.max[lane] = if max.is_finite() { max } else { A::NAN };
            let total = A::ONE + rest;
            scalars.inverse[lane] = A::ONE / total;
            scalars.peak[lane] = if rest < A::ONE { scalars.max[lane] } else { A::NAN };
            scalars.at_peak[lane] = -rest / total; // -(1 - p)
        }
        scalars
    }

    /// Those of the gradient `upstream (slope p - q)` in a lane, for the sum of q and what the slope has beyond it.
    #[inline(always)]
    pub(super) fn set_gradient(&mut self, lane: usize, mass: A, beyond: A, upstream: A) {
        self.slope[lane] = mass + beyond;
        self.mass[lane] = mass;
        self.at_peak[lane] = mass * self.at_peak[lane] + beyond * self.inverse[lane];
        self.upstream[lane] = upstream;
    }

    #[inline(always)]
    pub(super) fn lane(&self, lane: usize) -> RowScalars<A> {
        RowScalars {
            max: self.max[lane],
            inverse: self.inverse[lane],
            log_sum: self.log_sum[lane],
            peak: self.peak[lane],
            at_peak: self.at_peak[lane],
            slope: self.slope[lane],
            mass: self.mass[lane],
            upstream: self.upstream[lane],
        }
    }
}

impl<A: Real> RowScalars<A> {
    /// Where exponentials take the place of the logits: they are relative to `reference`, the row's maximum so far.
    pub(super) fn of_powers(self, scale: A, reference: A) -> Self {
        let is_max = reference == self.max;
        let shrink = if is_max { A::ONE } else { (scale * (reference - self.max)).vexp::<Baseline>() };
        // another logit whose exponential is 1 is no peak's neighbour: together they have more than half of the mass
        let has_peak = shrink == A::ONE && !self.peak.is_nan();
        RowScalars { inverse: self.inverse * shrink, peak: if has_peak { A::ONE } else { A::NAN }, ..self }
    }
}

/// `log sum exp(x - m)`, NaN where the row has no finite maximum.
#[inline(always)]
pub(super) fn log_sum<A: Real>(max: A, rest: A) -> A {
    if max.is_finite() { A::of(rest.to_f64().ln_1p()) } else { A::NAN }
}

/// The value that a pass emits for a logit of a lane's row.
pub(super) trait Emit<A: Real>: Sync {
    /// Whether [`PowersGradient`] emits the same from the exponentials that a reduction has computed.
    const OF_POWERS: bool = false;
    /// Whether the value is a derivative in the logits, so that the soft cap's slope belongs to it.
    const IN_LOGITS: bool = false;

    fn value<I: Isa, V: PerLane<A>>(&self, row: &RowScalars<V>, lane: usize, x: A, q: A) -> A;
}

/// The factor of differences of logits.
pub(super) trait Scale<A>: Copy + Sync {
    fn times(self, difference: A) -> A;
}

/// 1, without a multiplication.
#[derive(Clone, Copy)]
pub(super) struct Unscaled;

impl<A: Real> Scale<A> for Unscaled {
    #[inline(always)]
    fn times(self, difference: A) -> A {
        difference
    }
}

#[derive(Clone, Copy)]
pub(super) struct ScaledBy<A>(pub(super) A);

impl<A: Real> Scale<A> for ScaledBy<A> {
    #[inline(always)]
    fn times(self, difference: A) -> A {
        self.0 * difference
    }
}

/// Calls `body` with a factor as a [`Scale`].
macro_rules! with_scale {
    ($factor:expr, $scale:ident => $body:expr) => {
        match $factor {
            one if one == $crate::cpu::math::Real::ONE => {
                let $scale = $crate::softmax::cpu::kernels::Unscaled;
                $body
            }
            factor => {
                let $scale = $crate::softmax::cpu::kernels::ScaledBy(factor);
                $body
            }
        }
    };
}
pub(super) use with_scale;

/// `upstream (slope p - q)`
pub(super) struct LogitsGradient<F>(pub(super) F);
impl<A: Real, F: Scale<A>> Emit<A> for LogitsGradient<F> {
    const OF_POWERS: bool = true;
    const IN_LOGITS: bool = true;

    #[inline(always)]
    fn value<I: Isa, V: PerLane<A>>(&self, row: &RowScalars<V>, lane: usize, x: A, q: A) -> A {
        let p = self.0.times(x - row.max.at(lane)).vexp::<I>() * row.inverse.at(lane);
        gradient(row, lane, p, q, x == row.peak.at(lane))
    }
}

#[inline(always)]
fn gradient<A: Real, V: PerLane<A>>(row: &RowScalars<V>, lane: usize, p: A, q: A, is_peak: bool) -> A {
    let direct = row.slope.at(lane) * p - q;
    // p > 1/2: exact where q is nearly all of the mass, so that the gradient of a confident row keeps its digits
    let at_peak = (row.mass.at(lane) - q) + row.at_peak.at(lane);
    row.upstream.at(lane) * if is_peak { at_peak } else { direct }
}

/// [`LogitsGradient`] from the exponentials of a block of a row, for scalars by [`RowScalars::of_powers`].
pub(super) struct PowersGradient;
impl<A: Real> Emit<A> for PowersGradient {
    #[inline(always)]
    fn value<I: Isa, V: PerLane<A>>(&self, row: &RowScalars<V>, lane: usize, power: A, q: A) -> A {
        gradient(row, lane, power * row.inverse.at(lane), q, power == row.peak.at(lane))
    }
}

/// `upstream w (lse - x)`, with a factor of the differences of logits.
pub(super) struct TargetGradient<A>(pub(super) A);
impl<A: Real> Emit<A> for TargetGradient<A> {
    #[inline(always)]
    fn value<I: Isa, V: PerLane<A>>(&self, row: &RowScalars<V>, lane: usize, x: A, w: A) -> A {
        let g = row.upstream.at(lane) * w * (row.log_sum.at(lane) - self.0 * (x - row.max.at(lane)));
        if w == A::ZERO { A::ZERO } else { g }
    }
}

/// `x - lse`
pub(super) struct LogProbs;
impl<A: Real> Emit<A> for LogProbs {
    #[inline(always)]
    fn value<I: Isa, V: PerLane<A>>(&self, row: &RowScalars<V>, lane: usize, x: A, _: A) -> A {
        (x - row.max.at(lane)) - row.log_sum.at(lane)
    }
}

/// Adds to `sum exp(x - max)` over the classes below `max`, and to the number of those at it. `reference` is the
/// maximum, or 0 where that is -inf. This and the next two are in lanes: of the classes of one row, or of one row each.
#[inline(always)]
fn add_exponentials<I: Isa, A: Real, P: PerLane<A>>(
    (tail, ties): (&mut [A; LANES], &mut [A; LANES]),
    xs: &[A; LANES],
    scale: impl Scale<A>,
    max: P,
    reference: P,
) {
    for (lane, &x) in xs.iter().enumerate() {
        let v = scale.times(x - reference.at(lane)).vexp::<I>();
        let tie = x == max.at(lane);
        tail[lane] += if tie { A::ZERO } else { v };
        ties[lane] += if tie { A::ONE } else { A::ZERO };
    }
}

/// Vectors whose sum is added to that of the others: in one long chain of additions of like numbers, all roundings
/// could go in one direction.
const GROUP: usize = 8;

/// What [`add_exponentials`] adds up for a row's classes. `next` is called with each vector's number.
#[inline(always)]
fn sum_exponentials<I: Isa, S: Element>(
    (xs, end): (&[S], &[S; LANES]),
    scale: impl Scale<S::Acc>,
    (max, reference): (S::Acc, S::Acc),
    next: impl Fn(usize),
) -> (S::Acc, S::Acc) {
    let [mut few, mut tail, mut ties] = [[S::Acc::ZERO; LANES]; 3];
    let (whole, rest) = xs.as_chunks::<LANES>();
    for (group, xs) in whole.chunks(GROUP).enumerate() {
        for (i, xs) in xs.iter().enumerate() {
            next(group * GROUP + i);
            add_exponentials::<I, _, _>((&mut few, &mut ties), &S::unordered(xs), scale, max, reference);
        }
        settle(&mut few, &mut tail);
    }
    if !rest.is_empty() {
        next(whole.len());
        add_exponentials::<I, _, _>((&mut few, &mut ties), &S::unordered(end), scale, max, reference);
        settle(&mut few, &mut tail);
    }
    (sum_lanes(tail), sum_lanes(ties))
}

/// As [`sum_exponentials`]; `powers` gets the exponentials.
#[inline(always)]
fn sum_and_keep_exponentials<I: Isa, S: Element>(
    (xs, end): (&[S], &[S; LANES]),
    scale: impl Scale<S::Acc>,
    (max, reference): (S::Acc, S::Acc),
    powers: &mut [S::Acc],
    next: impl Fn(usize),
) -> (S::Acc, S::Acc) {
    let [mut few, mut tail, mut ties] = [[S::Acc::ZERO; LANES]; 3];
    let (whole, _) = xs.as_chunks::<LANES>();
    let (to_whole, to_end) = powers.as_chunks_mut::<LANES>();
    for (group, (xs, to)) in whole.chunks(GROUP).zip(to_whole.chunks_mut(GROUP)).enumerate() {
        for (i, (xs, to)) in xs.iter().zip(to).enumerate() {
            next(group * GROUP + i);
            keep_exponentials::<I, _>((&mut few, &mut ties), &S::ordered(xs), scale, (max, reference), to);
        }
        settle(&mut few, &mut tail);
    }
    if !to_end.is_empty() {
        next(whole.len());
        // its first lanes are in the vector before
        let mut to = [S::Acc::ZERO; LANES];
        keep_exponentials::<I, _>((&mut few, &mut ties), &S::ordered(end), scale, (max, reference), &mut to);
        to_end.copy_from_slice(&to[LANES - to_end.len()..]);
    }
    settle(&mut few, &mut tail);
    (sum_lanes(tail), sum_lanes(ties))
}

/// As [`add_exponentials`]; the exponentials are kept.
#[inline(always)]
fn keep_exponentials<I: Isa, A: Real>(
    (tail, ties): (&mut [A; LANES], &mut [A; LANES]),
    xs: &[A; LANES],
    scale: impl Scale<A>,
    (max, reference): (A, A),
    to: &mut [A; LANES],
) {
    for lane in 0..LANES {
        let x = xs[lane];
        let v = scale.times(x - reference).vexp::<I>();
        let tie = x == max;
        tail[lane] += if tie { A::ZERO } else { v };
        ties[lane] += if tie { A::ONE } else { A::ZERO };
        to[lane] = v;
    }
}

/// Adds to `sum exp(x - reference) (x - reference)`.
#[inline(always)]
fn add_moment<I: Isa, A: Real>(
    moment: &mut [A; LANES],
    xs: &[A; LANES],
    scale: impl Scale<A>,
    reference: impl PerLane<A>,
) {
    for (lane, &x) in xs.iter().enumerate() {
        let d = x - reference.at(lane);
        let v = scale.times(d).vexp::<I>();
        moment[lane] += if v == A::ZERO { A::ZERO } else { v * d };
    }
}

/// Adds to `sum q (x - reference)` and to `sum q`.
#[inline(always)]
fn add_q<A: Real>(
    (linear, mass): (&mut [A; LANES], &mut [A; LANES]),
    xs: &[A; LANES],
    q: &[A; LANES],
    reference: impl PerLane<A>,
) {
    for lane in 0..LANES {
        linear[lane] += scaled(q[lane], xs[lane] - reference.at(lane));
        mass[lane] += q[lane];
    }
}

/// Adds the sums of a few classes to those of many, and begins anew: in one long chain of additions of like numbers,
/// all roundings could go in one direction.
#[inline(always)]
fn settle<A: Real>(few: &mut [A; LANES], sums: &mut [A; LANES]) {
    for lane in 0..LANES {
        sums[lane] += few[lane];
        few[lane] = A::ZERO;
    }
}

/// A product in which a factor of 0 wins over an infinite one.
#[inline(always)]
fn scaled<A: Real>(factor: A, x: A) -> A {
    if factor == A::ZERO { A::ZERO } else { factor * x }
}

/// [`Part::rest`] of a sum below the maximum and the number of classes at it. While all is -inf there is no maximum to
/// leave out.
#[inline(always)]
fn rest_of<A: Real>(tail: A, ties: A, max: A, grew: bool) -> A {
    let others = if grew { ties - A::ONE } else { ties };
    if max == A::NEG_INFINITY { tail } else { tail + others }
}

/// What the exponents are relative to.
#[inline(always)]
fn reference_of<A: Real>(max: A) -> A {
    if max == A::NEG_INFINITY { A::ZERO } else { max }
}

/// Adds a block of some rows' classes to the rows' states.
///
/// A short row is a chain of dependent steps (a maximum, exponentials, a sum) that takes several times as long as its
/// instructions; a processor overlaps the chains of rows that are close to each other in the code.
pub(super) struct ReduceStrip<'k, A, T, F, X> {
    pub(super) scale: F,
    pub(super) blocks: StripBlocks<'k, A, T>,
    /// The block of a row, in its storage type or in the arithmetic type.
    pub(super) xs: X,
}

/// All of a [`ReduceStrip`] but the logits.
pub(super) struct StripBlocks<'k, A, T> {
    pub(super) states: &'k mut States<A>,
    /// The rows' lanes in the states.
    pub(super) lanes: Range<usize>,
    /// The classes of the blocks, of all those that are reduced.
    pub(super) block: Range<usize>,
    pub(super) of: Range<usize>,
    /// The q of all rows' blocks, one after the other, if there is any.
    pub(super) q: Option<&'k [A]>,
    /// Where the exponentials of all rows' blocks are kept, one after the other; empty if they are not.
    pub(super) powers: &'k mut [A],
    pub(super) detail: RowDetail,
    /// What will be read next: fetched while the exponentials of these blocks are computed.
    pub(super) next: Ahead<T>,
}

impl<'k, A, S, T, F, X> Vectorized for ReduceStrip<'k, A, T, F, X>
where
    A: Real,
    S: Element<Acc = A>,
    F: Scale<A>,
    X: Fn(usize) -> &'k [S],
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let ReduceStrip { scale, blocks: StripBlocks { states, lanes, block, of, q, powers, detail, next }, xs } = self;
        if detail == RowDetail::Mass {
            for (row, q) in q.unwrap_or(&[]).chunks(block.len()).enumerate() {
                let mut sums = [0f64; LANES];
                for q in vectors(q, &end_of(q, A::ZERO)) {
                    for lane in 0..LANES {
                        sums[lane] += q[lane].to_f64();
                    }
                }
                states.add_mass(lanes.start + row, sum_lanes(sums));
            }
            return;
        }
        let (mut block_max, nothing) = ([A::ZERO; LANES], S::from_acc(A::NEG_INFINITY));
        for (row, max) in block_max.iter_mut().enumerate().take(lanes.len()) {
            let (xs, mut maxima) = (xs(row), [A::NEG_INFINITY; LANES]);
            for xs in vectors(xs, &end_of(xs, nothing)) {
                raise(&mut maxima, &S::unordered(xs));
            }
            *max = max_lanes(maxima);
        }
        for (row, lane) in lanes.enumerate() {
            let xs = xs(row);
            let end = end_of(xs, nothing);
            let max = states.max[lane].max_or_self(block_max[row]);
            let reference = reference_of(max);
            let grew = block_max[row] > states.max[lane];
            let fetch = |i: usize| next.fetch(row * block.len() + i * LANES);
            let powers = powers.get_mut(row * xs.len()..(row + 1) * xs.len()).unwrap_or_default();
            let (tail, ties) = if powers.is_empty() {
                sum_exponentials::<I, _>((xs, &end), scale, (max, reference), fetch)
            } else {
                sum_and_keep_exponentials::<I, _>((xs, &end), scale, (max, reference), powers, fetch)
            };
            let mut part = Part {
                max,
                block_max: block_max[row],
                rest: rest_of(tail, ties, max, grew),
                linear: A::ZERO,
                mass: A::ZERO,
                moment: A::ZERO,
            };
            if detail == RowDetail::Statistics {
                if grew {
                    let first = xs.iter().position(|x| x.to_acc() == max).unwrap_or(0);
                    states.argmax[lane] = (block.start + first) as u32;
                }
                let mut moment = [A::ZERO; LANES];
                for xs in vectors(xs, &end) {
                    add_moment::<I, _>(&mut moment, &S::ordered(xs), scale, reference);
                }
                part.moment = sum_lanes(moment);
            }
            if let Some(q) = q {
                let (mut linear, mut mass) = ([A::ZERO; LANES], [A::ZERO; LANES]);
                let q = &q[row * xs.len()..][..xs.len()];
                for (xs, q) in vectors(xs, &end).zip(vectors(q, &end_of(q, A::ZERO))) {
                    add_q((&mut linear, &mut mass), &S::ordered(xs), q, reference);
                }
                (part.linear, part.mass) = (sum_lanes(linear), sum_lanes(mass));
            }
            if block.start == of.start {
                states.start(lane, part);
            } else {
                states.absorb::<I>(lane, part);
            }
        }
    }
}

/// [`States::complete`] once all of a strip is reduced.
pub(super) struct CompleteStrip<'k, A> {
    pub(super) states: &'k mut States<A>,
    pub(super) rows: usize,
}

impl<A: Real> Vectorized for CompleteStrip<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        self.states.complete::<I>(self.rows);
    }
}

/// Adds some classes of a tile's rows to the rows' states.
pub(super) struct ReduceTile<'k, A, T, F> {
    pub(super) scale: F,
    pub(super) states: &'k mut States<A>,
    /// The classes of the piece, and how many a row has.
    pub(super) classes: Range<usize>,
    pub(super) of: usize,
    pub(super) xs: &'k [[A; LANES]],
    pub(super) q: Option<&'k [[A; LANES]]>,
    pub(super) detail: RowDetail,
    /// What will be read next, if it is known.
    pub(super) next: Option<Ahead<T>>,
}

impl<A: Real, T, F: Scale<A>> Vectorized for ReduceTile<'_, A, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let ReduceTile { scale, states, classes, of, xs, q, detail, next } = self;
        if detail == RowDetail::Mass {
            let mut sums = [0f64; LANES];
            for q in q.unwrap_or(&[]) {
                for lane in 0..LANES {
                    sums[lane] += q[lane].to_f64();
                }
            }
            return (0..LANES).for_each(|lane| states.add_mass(lane, sums[lane]));
        }
        let block_max = maxima(xs);
        let (mut max, mut reference) = ([A::ZERO; LANES], [A::ZERO; LANES]);
        for lane in 0..LANES {
            max[lane] = states.max[lane].max_or_self(block_max[lane]);
            reference[lane] = reference_of(max[lane]);
        }
        let (tail, ties) = exponentials::<I, _, _>(xs, scale, max, reference, next);
        // not a closure, which is not inlined
        let (linear, mass) = match q {
            Some(q) => weighted(xs, q, reference),
            None => ([A::ZERO; LANES], [A::ZERO; LANES]),
        };
        let mut moment = [A::ZERO; LANES];
        if detail == RowDetail::Statistics {
            let mut top = states.max;
            for (class, xs) in classes.clone().zip(xs) {
                add_moment::<I, _>(&mut moment, xs, scale, reference);
                for lane in 0..LANES {
                    if xs[lane] > top[lane] {
                        (top[lane], states.argmax[lane]) = (xs[lane], class as u32);
                    }
                }
            }
        }
        let grew = |lane: usize| block_max[lane] > states.max[lane];
        let mut rest = [A::ZERO; LANES];
        for lane in 0..LANES {
            rest[lane] = rest_of(tail[lane], ties[lane], max[lane], grew(lane));
        }
        let part = |lane: usize| Part {
            max: max[lane],
            block_max: block_max[lane],
            rest: rest[lane],
            linear: linear[lane],
            mass: mass[lane],
            moment: moment[lane],
        };
        if classes.start == 0 {
            for lane in 0..LANES {
                states.start(lane, part(lane));
            }
        } else {
            // a copy, with which no other operand can share memory: only so is the loop vectorised
            let mut sum = *states;
            for lane in 0..LANES {
                sum.absorb::<I>(lane, part(lane));
            }
            *states = sum;
        }
        if classes.end == of {
            states.complete::<I>(LANES);
        }
    }
}

/// The largest logits of a tile. What this and the next two return by value stays in registers.
#[inline(always)]
fn maxima<A: Real>(xs: &[[A; LANES]]) -> [A; LANES] {
    let mut max = [A::NEG_INFINITY; LANES];
    for xs in xs {
        raise(&mut max, xs);
    }
    max
}

/// What [`add_exponentials`] adds up for a tile.
#[inline(always)]
fn exponentials<I: Isa, A: Real, T>(
    xs: &[[A; LANES]],
    scale: impl Scale<A>,
    max: [A; LANES],
    reference: [A; LANES],
    next: Option<Ahead<T>>,
) -> ([A; LANES], [A; LANES]) {
    let [mut few, mut tail, mut ties] = [[A::ZERO; LANES]; 3];
    for (group, xs) in xs.chunks(GROUP).enumerate() {
        for (i, xs) in xs.iter().enumerate() {
            if let Some(next) = &next {
                next.fetch((group * GROUP + i) * LANES);
            }
            add_exponentials::<I, _, _>((&mut few, &mut ties), xs, scale, max, reference);
        }
        settle(&mut few, &mut tail);
    }
    (tail, ties)
}

/// What [`add_q`] adds up for a tile.
#[inline(always)]
fn weighted<A: Real>(xs: &[[A; LANES]], q: &[[A; LANES]], reference: [A; LANES]) -> ([A; LANES], [A; LANES]) {
    let [mut few, mut linear, mut mass] = [[A::ZERO; LANES]; 3];
    for (xs, q) in xs.chunks(GROUP).zip(q.chunks(GROUP)) {
        for (xs, q) in xs.iter().zip(q) {
            add_q((&mut linear, &mut few), xs, q, reference);
        }
        settle(&mut few, &mut mass);
    }
    (linear, mass)
}

/// The losses of rows from their states.
pub(super) struct RowLosses<'k, A> {
    pub(super) states: &'k States<A>,
    pub(super) targets: &'k RowTargets<A>,
    /// The logit of each row's own class.
    pub(super) own: &'k [A; LANES],
    /// What a transform has made of its negative log-likelihood.
    pub(super) nll: Option<&'k [A; LANES]>,
    pub(super) has_q: bool,
    pub(super) z_loss: A,
}

impl<A: Real> Vectorized for RowLosses<'_, A> {
    type Output = [A; LANES];

    #[inline(always)]
    fn run<I: Isa>(self) -> [A; LANES] {
        let RowLosses { states, targets, own, nll, has_q, z_loss } = self;
        let States { max, log_sum, mass, linear, .. } = states;
        let scale = states.scale;
        let RowTargets { weight, live, .. } = targets;
        let mut losses = [A::ZERO; LANES];
        for lane in 0..LANES {
            let log_sum = log_sum[lane];
            let nll = nll.map_or_else(|| log_sum - scale * (own[lane] - max[lane]), |nll| nll[lane]);
            let direct = weight[lane] * nll;
            // without an own class still NaN in a row without a softmax
            let mut loss = if weight[lane] == A::ZERO { A::ZERO * log_sum } else { direct };
            if has_q {
                loss += mass[lane] * log_sum - scale * linear[lane];
            }
            let lse = scale * max[lane] + log_sum;
            loss += if z_loss == A::ZERO { A::ZERO } else { z_loss * lse * lse };
            losses[lane] = if live[lane] { loss } else { A::ZERO };
        }
        losses
    }
}

/// Emits a value for each logit of a block.
pub(super) struct EmitBlock<'k, A, S, O, E> {
    pub(super) emit: &'k E,
    pub(super) row: RowScalars<A>,
    /// In its storage type or in the arithmetic type, as the output.
    pub(super) xs: &'k [S],
    pub(super) q: Option<&'k [A]>,
    /// The derivative of the soft cap.
    pub(super) slope: Option<&'k [A]>,
    pub(super) out: &'k mut [MaybeUninit<O>],
}

impl<A: Real, S: Element<Acc = A>, O: Element<Acc = A>, E: Emit<A>> Vectorized for EmitBlock<'_, A, S, O, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitBlock { emit, row, xs, q, slope, out } = self;
        // whole vectors, then a last one up to the row's end, which computes once more what it shares with them
        let whole = xs.len() - xs.len() % LANES;
        let rest = if whole == xs.len() { whole } else { xs.len().saturating_sub(LANES) };
        for range in [0..whole, rest..xs.len()] {
            let out = out[range.clone()].iter_mut().zip(&xs[range.clone()]);
            match (q, slope) {
                (None, None) => {
                    for (out, x) in out {
                        out.write(O::from_acc(emit.value::<I, A>(&row, 0, x.to_acc(), A::ZERO)));
                    }
                }
                (Some(q), None) => {
                    for ((out, x), &q) in out.zip(&q[range]) {
                        out.write(O::from_acc(emit.value::<I, A>(&row, 0, x.to_acc(), q)));
                    }
                }
                (q, Some(slope)) => {
                    for (i, (out, x)) in range.zip(out) {
                        let q = q.map_or(A::ZERO, |q| q[i]);
                        out.write(O::from_acc(slope[i] * emit.value::<I, A>(&row, 0, x.to_acc(), q)));
                    }
                }
            }
        }
    }
}

/// Emits a value for each logit of some classes of a tile's rows.
pub(super) struct EmitTile<'k, A, E> {
    pub(super) emit: &'k E,
    pub(super) rows: &'k RowScalars<[A; LANES]>,
    pub(super) live: &'k [bool; LANES],
    /// The logits, which the values replace.
    pub(super) xs: &'k mut [[A; LANES]],
    pub(super) q: Option<&'k [[A; LANES]]>,
    /// The derivative of the soft cap.
    pub(super) slope: Option<&'k [[A; LANES]]>,
}

impl<A: Real, E: Emit<A>> Vectorized for EmitTile<'_, A, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitTile { emit, rows, live, xs, q, slope } = self;
        // a copy, which the stores to `xs` can't change
        let rows = *rows;
        let live = live.map(|live| if live { A::ONE } else { A::ZERO });
        let (zeros, ones) = ([A::ZERO; LANES], [A::ONE; LANES]);
        for (i, xs) in xs.iter_mut().enumerate() {
            // not copies, whose loads would wait for their stores
            let (q, chain) = (q.map_or(&zeros, |q| &q[i]), slope.map_or(&ones, |slope| &slope[i]));
            for lane in 0..LANES {
                let v = chain[lane] * emit.value::<I, _>(&rows, lane, xs[lane], q[lane]);
                xs[lane] = if live[lane] != A::ZERO { v } else { A::ZERO };
            }
        }
    }
}
