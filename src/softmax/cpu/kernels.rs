//! The vectorised loops on blocks of rows and on tiles of rows: all that depends on the instruction set.

use super::rows::LANES;
use crate::cpu::element::Element;
use crate::cpu::math::{Ahead, Baseline, Isa, Kernel, Real, end_of, max_lanes, sum_lanes, vectors};
use std::mem::MaybeUninit;
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
    /// `log sum exp(x - m)`, NaN where the row has no finite maximum: once the row is complete.
    pub(super) log_sum: A,
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
    pub(super) const EMPTY: Self = State {
        max: A::NEG_INFINITY,
        rest: A::ZERO,
        linear: A::ZERO,
        mass: A::ZERO,
        moment: A::ZERO,
        argmax: 0,
        log_sum: A::NAN,
    };

    /// The state of a row that is complete.
    pub(super) fn complete(self) -> Self {
        State { log_sum: log_sum(self.max, self.rest), ..self }
    }

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

    /// As [`Self::absorb`] for the first part of a row, without an exponential.
    #[inline(always)]
    fn start(&mut self, part: Part<A>) {
        let Part { max, tail, ties, linear, mass, moment, .. } = part;
        let rest = if max == A::NEG_INFINITY { tail } else { tail + (ties - A::ONE) };
        *self = State { max, rest, linear, mass, moment, ..*self };
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
    /// `log sum exp(x - m)`, where an emission needs it
    pub(super) log_sum: A,
    /// `rest / (1 + rest)`: 1 - p of the most probable class
    pub(super) confident: A,
    /// The factor of the probability, and the sum of the row's q.
    pub(super) slope: A,
    pub(super) mass: A,
    /// Upstream gradient over the denominator.
    pub(super) upstream: A,
    /// The target class, and what it adds to its q.
    pub(super) own: Option<(usize, A)>,
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
        own: None,
        live: false,
    };

    /// The numbers of up to [`LANES`] adjacent rows, each made from its lane and row.
    #[inline(always)]
    pub(super) fn of_rows(rows: Range<usize>, of: impl Fn(usize, usize) -> Self) -> [Self; LANES] {
        let mut lanes = [Self::DEAD; LANES];
        for (lane, row) in rows.enumerate() {
            lanes[lane] = of(lane, row);
        }
        lanes
    }

    pub(super) fn new(max: A, rest: A) -> Self {
        // a row of only -inf, or with +inf, has no softmax
        let max = if max.is_finite() { max } else { A::NAN };
        let total = A::ONE + rest;
        RowScalars {
            max,
            inverse: A::ONE / total,
            log_sum: A::NAN,
            confident: rest / total,
            slope: A::ZERO,
            mass: A::ZERO,
            upstream: A::ONE,
            own: None,
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

/// The states of up to [`LANES`] rows, a vector for each number.
#[derive(Clone, Copy)]
pub(super) struct States<A> {
    pub(super) max: [A; LANES],
    pub(super) rest: [A; LANES],
    pub(super) linear: [A; LANES],
    pub(super) mass: [A; LANES],
    pub(super) moment: [A; LANES],
    pub(super) argmax: [u32; LANES],
    pub(super) log_sum: [A; LANES],
}

impl<A: Real> States<A> {
    pub(super) const EMPTY: Self = {
        let State { max, rest, linear, mass, moment, argmax, log_sum } = State::EMPTY;
        States {
            max: [max; LANES],
            rest: [rest; LANES],
            linear: [linear; LANES],
            mass: [mass; LANES],
            moment: [moment; LANES],
            argmax: [argmax; LANES],
            log_sum: [log_sum; LANES],
        }
    };

    /// The state of one row, in the first lane.
    pub(super) fn one(state: State<A>) -> Self {
        let mut states = Self::EMPTY;
        states.set(0, state);
        states
    }

    #[inline(always)]
    pub(super) fn get(&self, lane: usize) -> State<A> {
        State {
            max: self.max[lane],
            rest: self.rest[lane],
            linear: self.linear[lane],
            mass: self.mass[lane],
            moment: self.moment[lane],
            argmax: self.argmax[lane],
            log_sum: self.log_sum[lane],
        }
    }

    #[inline(always)]
    fn set(&mut self, lane: usize, state: State<A>) {
        let State { max, rest, linear, mass, moment, argmax, log_sum } = state;
        self.max[lane] = max;
        self.rest[lane] = rest;
        self.linear[lane] = linear;
        self.mass[lane] = mass;
        self.moment[lane] = moment;
        self.argmax[lane] = argmax;
        self.log_sum[lane] = log_sum;
    }

    /// Makes the states those of rows that are complete.
    #[inline(always)]
    fn complete<I: Isa>(&mut self) {
        for lane in 0..LANES {
            let log_sum = A::of(self.rest[lane].to_f64().vln_1p::<I>());
            self.log_sum[lane] = if self.max[lane].is_finite() { log_sum } else { A::NAN };
        }
    }
}

/// Adds a block of some rows' classes to the rows' states.
///
/// A short row is a chain of dependent steps (a maximum, exponentials, a sum) that takes several times as long as its
/// instructions; a processor overlaps the chains of rows that are close to each other in the code.
pub(super) struct ReduceBlocks<'k, A, S, T> {
    pub(super) blocks: Blocks<'k, A, T>,
    /// A block of each row, in its storage type or in the arithmetic type.
    pub(super) xs: &'k [&'k [S]],
}

/// All of a [`ReduceBlocks`] but the logits.
pub(super) struct Blocks<'k, A, T> {
    pub(super) states: &'k mut States<A>,
    /// The classes of the blocks, of all those that are reduced.
    pub(super) block: Range<usize>,
    pub(super) of: Range<usize>,
    /// The extra numbers of each row, if there are any.
    pub(super) q: Option<&'k [&'k [A]]>,
    pub(super) detail: Detail,
    /// What will be read next: fetched while the exponentials of these blocks are computed.
    pub(super) next: Ahead<T>,
}

impl<A: Real, S: Element<Acc = A>, T> Kernel for ReduceBlocks<'_, A, S, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let ReduceBlocks { blocks: Blocks { states, block, of, q, detail, next }, xs } = self;
        let mut block_max = [A::NEG_INFINITY; LANES];
        let nothing = S::from_acc(A::NEG_INFINITY);
        for (max, xs) in block_max.iter_mut().zip(xs) {
            let mut lanes = [A::NEG_INFINITY; LANES];
            for xs in vectors(xs, &end_of(xs, nothing)) {
                let xs = S::unordered(xs);
                for lane in 0..LANES {
                    lanes[lane] = lanes[lane].max_or_self(xs[lane]);
                }
            }
            *max = max_lanes(lanes);
        }
        for (row, xs) in xs.iter().enumerate() {
            let end = end_of(xs, nothing);
            let mut state = states.get(row);
            let max = state.max.max_or_self(block_max[row]);
            let reference = if max == A::NEG_INFINITY { A::ZERO } else { max };
            let (mut tail, mut ties) = ([A::ZERO; LANES], [A::ZERO; LANES]);
            for (i, xs) in vectors(xs, &end).enumerate() {
                next.fetch(row * block.len() + i * LANES);
                let xs = S::unordered(xs);
                for lane in 0..LANES {
                    let v = (xs[lane] - reference).vexp::<I>();
                    let tie = xs[lane] == max;
                    tail[lane] += if tie { A::ZERO } else { v };
                    ties[lane] += if tie { A::ONE } else { A::ZERO };
                }
            }
            let mut part = Part {
                max,
                block_max: block_max[row],
                tail: sum_lanes(tail),
                ties: sum_lanes(ties),
                linear: A::ZERO,
                mass: A::ZERO,
                moment: A::ZERO,
            };
            if detail == Detail::Statistics {
                if block_max[row] > state.max {
                    state.argmax = (block.start + xs.iter().position(|x| x.to_acc() == max).unwrap_or(0)) as u32;
                }
                let mut moment = [A::ZERO; LANES];
                for xs in vectors(xs, &end) {
                    for lane in 0..LANES {
                        let d = xs[lane].to_acc() - reference;
                        let v = d.vexp::<I>();
                        moment[lane] += if v == A::ZERO { A::ZERO } else { v * d };
                    }
                }
                part.moment = sum_lanes(moment);
            }
            if let Some(q) = q {
                let q = q[row];
                let (mut linear, mut mass) = ([A::ZERO; LANES], [A::ZERO; LANES]);
                for (xs, q) in vectors(xs, &end).zip(vectors(q, &end_of(q, A::ZERO))) {
                    for lane in 0..LANES {
                        let v = q[lane] * (xs[lane].to_acc() - reference);
                        linear[lane] += if q[lane] == A::ZERO { A::ZERO } else { v };
                        mass[lane] += q[lane];
                    }
                }
                (part.linear, part.mass) = (sum_lanes(linear), sum_lanes(mass));
            }
            if block.start == of.start {
                state.start(part);
            } else {
                state.absorb::<I>(part);
            }
            states.set(row, state);
        }
        if block.end == of.end {
            states.complete::<I>();
        }
    }
}

/// Adds some classes of a tile's rows to the rows' states.
pub(super) struct ReduceTile<'k, A> {
    pub(super) states: &'k mut States<A>,
    /// The classes of the piece, and how many a row has.
    pub(super) classes: Range<usize>,
    pub(super) of: usize,
    pub(super) xs: &'k [[A; LANES]],
    pub(super) q: Option<&'k [[A; LANES]]>,
    pub(super) detail: Detail,
}

impl<A: Real> Kernel for ReduceTile<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let ReduceTile { states, classes, of, xs, q, detail } = self;
        let mut block_max = [A::NEG_INFINITY; LANES];
        for xs in xs {
            for (m, &x) in block_max.iter_mut().zip(xs) {
                *m = m.max_or_self(x);
            }
        }
        let (mut max, mut reference) = ([A::ZERO; LANES], [A::ZERO; LANES]);
        for lane in 0..LANES {
            max[lane] = states.max[lane].max_or_self(block_max[lane]);
            reference[lane] = if max[lane] == A::NEG_INFINITY { A::ZERO } else { max[lane] };
        }
        let (mut tail, mut ties) = ([A::ZERO; LANES], [A::ZERO; LANES]);
        for xs in xs {
            for lane in 0..LANES {
                let v = (xs[lane] - reference[lane]).vexp::<I>();
                let tie = xs[lane] == max[lane];
                tail[lane] += if tie { A::ZERO } else { v };
                ties[lane] += if tie { A::ONE } else { A::ZERO };
            }
        }
        let mut moment = [A::ZERO; LANES];
        if detail == Detail::Statistics {
            let mut top = states.max;
            for (class, xs) in classes.clone().zip(xs) {
                for lane in 0..LANES {
                    let d = xs[lane] - reference[lane];
                    let v = d.vexp::<I>();
                    moment[lane] += if v == A::ZERO { A::ZERO } else { v * d };
                    if xs[lane] > top[lane] {
                        (top[lane], states.argmax[lane]) = (xs[lane], class as u32);
                    }
                }
            }
        }
        let (mut linear, mut mass) = ([A::ZERO; LANES], [A::ZERO; LANES]);
        if let Some(q) = q {
            for (xs, q) in xs.iter().zip(q) {
                for lane in 0..LANES {
                    let v = q[lane] * (xs[lane] - reference[lane]);
                    linear[lane] += if q[lane] == A::ZERO { A::ZERO } else { v };
                    mass[lane] += q[lane];
                }
            }
        }
        let part = |lane: usize| Part {
            max: max[lane],
            block_max: block_max[lane],
            tail: tail[lane],
            ties: ties[lane],
            linear: linear[lane],
            mass: mass[lane],
            moment: moment[lane],
        };
        if classes.start == 0 {
            for lane in 0..LANES {
                let mut state = states.get(lane);
                state.start(part(lane));
                states.set(lane, state);
            }
        } else {
            for lane in 0..LANES {
                let mut state = states.get(lane);
                state.absorb::<I>(part(lane));
                states.set(lane, state);
            }
        }
        if classes.end == of {
            states.complete::<I>();
        }
    }
}

/// Adds a block's numbers to sums, one for each lane.
pub(super) struct AddToLanes<'k, A> {
    pub(super) lanes: &'k mut [f64; LANES],
    pub(super) block: &'k [A],
}

impl<A: Real> Kernel for AddToLanes<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let AddToLanes { lanes, block } = self;
        let mut sums = *lanes;
        for numbers in vectors(block, &end_of(block, A::ZERO)) {
            for lane in 0..LANES {
                sums[lane] += numbers[lane].to_f64();
            }
        }
        *lanes = sums;
    }
}

/// The losses of rows from their states.
pub(super) struct RowLosses<'k, A> {
    pub(super) states: &'k States<A>,
    /// The logit of each row's own class, what the class adds to its q, and whether the row counts.
    pub(super) own: &'k [A; LANES],
    pub(super) weight: &'k [A; LANES],
    pub(super) live: &'k [bool; LANES],
    /// Whether there are extra numbers q.
    pub(super) extra: bool,
    pub(super) z_loss: A,
}

impl<A: Real> Kernel for RowLosses<'_, A> {
    type Output = [A; LANES];

    #[inline(always)]
    fn run<I: Isa>(self) -> [A; LANES] {
        let RowLosses { states: States { max, log_sum, mass, linear, .. }, own, weight, live, extra, z_loss } = self;
        let mut losses = [A::ZERO; LANES];
        for lane in 0..LANES {
            let log_sum = log_sum[lane];
            let direct = weight[lane] * (log_sum - (own[lane] - max[lane]));
            // without an own class still NaN in a row without a softmax
            let mut loss = if weight[lane] == A::ZERO { A::ZERO * log_sum } else { direct };
            if extra {
                loss += mass[lane] * log_sum - linear[lane];
            }
            let lse = max[lane] + log_sum;
            loss += z_loss * lse * lse;
            losses[lane] = if live[lane] { loss } else { A::ZERO };
        }
        losses
    }
}

/// Emits a value for each logit of a block.
pub(super) struct EmitBlock<'k, A, S, O, E> {
    pub(super) emit: &'k E,
    pub(super) scalars: &'k RowScalars<A>,
    /// In its storage type or in the arithmetic type, as the output.
    pub(super) xs: &'k [S],
    pub(super) q: Option<&'k [A]>,
    /// The derivative of the soft cap.
    pub(super) slope: Option<&'k [A]>,
    pub(super) out: &'k mut [MaybeUninit<O>],
}

impl<A: Real, S: Element<Acc = A>, O: Element<Acc = A>, E: Emit<A>> Kernel for EmitBlock<'_, A, S, O, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitBlock { emit, scalars, xs, q, slope, out } = self;
        // whole vectors, then what is left together with elements before it, which are emitted again as they are
        let whole = xs.len() - xs.len() % LANES;
        let rest = if whole == xs.len() { whole } else { xs.len().saturating_sub(LANES) };
        for range in [0..whole, rest..xs.len()] {
            let out = out[range.clone()].iter_mut().zip(&xs[range.clone()]);
            match (q, slope) {
                (None, None) => {
                    for (out, x) in out {
                        out.write(O::from_acc(emit.value::<I>(scalars, x.to_acc(), A::ZERO)));
                    }
                }
                (Some(q), None) => {
                    for ((out, x), &q) in out.zip(&q[range]) {
                        out.write(O::from_acc(emit.value::<I>(scalars, x.to_acc(), q)));
                    }
                }
                (q, Some(slope)) => {
                    for (i, (out, x)) in range.zip(out) {
                        let q = q.map_or(A::ZERO, |q| q[i]);
                        out.write(O::from_acc(slope[i] * emit.value::<I>(scalars, x.to_acc(), q)));
                    }
                }
            }
        }
    }
}

/// Emits a value for each logit of some classes of a tile's rows.
pub(super) struct EmitTile<'k, A, E> {
    pub(super) emit: &'k E,
    pub(super) scalars: &'k [RowScalars<A>; LANES],
    pub(super) xs: &'k [[A; LANES]],
    pub(super) q: Option<&'k [[A; LANES]]>,
    /// The derivative of the soft cap.
    pub(super) slope: Option<&'k [[A; LANES]]>,
    pub(super) out: &'k mut [[A; LANES]],
}

impl<A: Real, E: Emit<A>> Kernel for EmitTile<'_, A, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let EmitTile { emit, scalars, xs, q, slope, out } = self;
        // one array for each number, so that a vector of rows is loaded at once
        let of = |number: fn(&RowScalars<A>) -> A| {
            let mut lanes = [A::ZERO; LANES];
            lanes.iter_mut().zip(scalars).for_each(|(to, row)| *to = number(row));
            lanes
        };
        let (max, inverse, log_sum) = (of(|r| r.max), of(|r| r.inverse), of(|r| r.log_sum));
        let (confident, slopes, mass, upstream) =
            (of(|r| r.confident), of(|r| r.slope), of(|r| r.mass), of(|r| r.upstream));
        let live = of(|r| if r.live { A::ONE } else { A::ZERO });
        for (i, (out, xs)) in out.iter_mut().zip(xs).enumerate() {
            let q = q.map_or([A::ZERO; LANES], |q| q[i]);
            let chain = slope.map_or([A::ONE; LANES], |slope| slope[i]);
            for lane in 0..LANES {
                let row = RowScalars {
                    max: max[lane],
                    inverse: inverse[lane],
                    log_sum: log_sum[lane],
                    confident: confident[lane],
                    slope: slopes[lane],
                    mass: mass[lane],
                    upstream: upstream[lane],
                    own: None,
                    live: true,
                };
                let v = chain[lane] * emit.value::<I>(&row, xs[lane], q[lane]);
                out[lane] = if live[lane] != A::ZERO { v } else { A::ZERO };
            }
        }
    }
}

/// Scale, then soft cap; `slope` gets the soft cap's derivative.
pub(super) struct Transform<'k, A> {
    pub(super) scale: A,
    pub(super) softcap: Option<A>,
    pub(super) xs: &'k mut [A],
    pub(super) slope: Option<&'k mut [A]>,
}

impl<A: Real> Kernel for Transform<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Transform { scale, softcap, xs, slope } = self;
        if scale != A::ONE {
            for x in &mut *xs {
                *x *= scale;
            }
        }
        let Some(cap) = softcap else { return };
        let inverse = A::ONE / cap;
        match slope {
            Some(slope) => {
                for (x, s) in xs.iter_mut().zip(slope) {
                    let (t, d) = (*x * inverse).tanh_and_slope::<I>();
                    (*x, *s) = (cap * t, d);
                }
            }
            None => {
                for x in xs {
                    *x = cap * (*x * inverse).tanh_and_slope::<I>().0;
                }
            }
        }
    }
}
