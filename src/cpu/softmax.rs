//! The softmax family on the CPU.
//!
//! A pass over the logits either *reduces* each row to a few numbers or *emits* a value for each logit from them (the
//! gradient, the log-probabilities). Both come in two shapes, chosen by [`Engine`]: rows of many adjacent classes are
//! worked through in blocks along the classes, everything else (few classes, a class axis that is not innermost, strides)
//! in tiles of [`LANES`] rows, one row in each SIMD lane. A block and a tile are the same piece of scratch memory, small
//! enough for the first-level cache, and both merge their results into the row's state by [`State::absorb`].
//!
//! The sum of a row is kept without the term of its maximum, which is exp(0) = 1: `rest = sum exp(x - m) - 1`. Then
//! `log sum exp(x - m) = log1p(rest)` and `1 - p = rest / (1 + rest)` for the most probable class keep their relative
//! accuracy however small they are.

use super::element::{build, source, Element, Input, Output, Source, Strided};
use super::math::{dispatch, Baseline, Isa, Kernel, Real};
use super::{for_each_task, sum_in_order};
use crate::reduction::Reduction;
use crate::softmax::{cpu_tensor, Arg, CrossEntropy, Operand, Rows, Saved, Statistics};
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, Layout, Result, Storage, Tensor, WithDType};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows in a tile; also the multiple to which a block is padded, so that no vector loop has a remainder.
const LANES: usize = 32;
/// Classes in a tile.
const DEPTH: usize = 64;
/// Classes in a block.
const BLOCK: usize = LANES * DEPTH;
/// Rows of more classes than this are worked through in blocks.
const TILE_MAX_CLASSES: usize = 64;
/// Classes a task takes where there are fewer rows than would keep all threads busy.
const SEGMENT: usize = 8 * BLOCK;
/// Fewer rows than this are split into segments if they are long.
const FEW_ROWS: usize = 16;

type Tile<A> = [[A; LANES]; DEPTH];

struct Scratch<A> {
    x: Tile<A>,
    e: Tile<A>,
    extra: Tile<A>,
    slope: Tile<A>,
}

impl<A: Real> Scratch<A> {
    fn new() -> Self {
        let tile = [[A::ZERO; LANES]; DEPTH];
        Scratch { x: tile, e: tile, extra: tile, slope: tile }
    }
}

/// Class indices of any dtype.
enum Indices<'a> {
    U8(&'a [u8]),
    U32(&'a [u32]),
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl<'a> Indices<'a> {
    fn new(storage: &'a CpuStorage, layout: &Layout, rows: usize) -> Result<Self> {
        let range = layout.start_offset()..layout.start_offset() + rows;
        Ok(match storage {
            CpuStorage::U8(t) => Indices::U8(&t[range]),
            CpuStorage::U32(t) => Indices::U32(&t[range]),
            CpuStorage::I32(t) => Indices::I32(&t[range]),
            CpuStorage::I64(t) => Indices::I64(&t[range]),
            other => bail!("class indices of dtype {:?}, expected u8, u32, i32 or i64", other.dtype()),
        })
    }

    #[inline(always)]
    fn get(&self, row: usize) -> i64 {
        match self {
            Indices::U8(t) => t[row] as i64,
            Indices::U32(t) => t[row] as i64,
            Indices::I32(t) => t[row] as i64,
            Indices::I64(t) => t[row],
        }
    }
}

/// A number for each class of each row that goes into a pass beside the logits.
enum Extra<'a, A> {
    None,
    Constant(A),
    /// `factor * weight[c]`
    Weights { factor: A, weight: &'a [A] },
    /// `(keep * source + spread) * weight[c]`, read in the order in which gradients are written
    Dense { source: Box<dyn Source<A> + 'a>, keep: A, spread: A, weight: Option<&'a [A]> },
}

impl<A: Real> Extra<'_, A> {
    fn is_none(&self) -> bool {
        matches!(self, Extra::None)
    }

    /// The values of adjacent elements in the written order, all of one row: `at` is the first one's position and
    /// `class` its class.
    #[inline(always)]
    fn load(&self, at: usize, class: usize, dst: &mut [A]) {
        match self {
            Extra::None => {}
            Extra::Constant(v) => dst.fill(*v),
            Extra::Weights { factor, weight } => {
                for (d, &w) in dst.iter_mut().zip(&weight[class..]) {
                    *d = *factor * w;
                }
            }
            Extra::Dense { source, keep, spread, weight } => {
                source.load(at, dst);
                // the untouched values must stay exact: 0 stays 0, and 1 stays 1
                if *keep != A::ONE || *spread != A::ZERO {
                    for d in dst.iter_mut() {
                        *d = *keep * *d + *spread;
                    }
                }
                if let Some(weight) = weight {
                    for (d, &w) in dst.iter_mut().zip(&weight[class..]) {
                        *d *= w;
                    }
                }
            }
        }
    }
}

/// What a row is reduced to.
#[derive(Clone, Copy)]
struct State<A> {
    /// The largest logit m.
    max: A,
    /// `sum exp(x - m)` without the term of one maximum.
    rest: A,
    /// `sum q (x - m)` and `sum q` for the extra numbers q.
    linear: A,
    mass: A,
    /// `sum exp(x - m) (x - m)`, for the entropy.
    moment: A,
    argmax: u32,
}

/// A block's contribution to a [`State`], relative to `max`, the maximum of the block and of the row so far.
struct Part<A> {
    max: A,
    block_max: A,
    /// `sum exp(x - max)` over the classes below `max`, and the number of those at it.
    tail: A,
    ties: A,
    linear: A,
    mass: A,
    moment: A,
}

impl<A: Real> State<A> {
    const EMPTY: Self = State { max: A::NEG_INFINITY, rest: A::ZERO, linear: A::ZERO, mass: A::ZERO, moment: A::ZERO, argmax: 0 };

    /// Branch-free, for one row in each lane.
    #[inline(always)]
    fn absorb<I: Isa>(&mut self, part: Part<A>) {
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
    fn merge(&mut self, next: &Self) {
        if next.max > self.max {
            self.argmax = next.argmax;
        }
        let max = self.max.max_or_self(next.max);
        let grew = next.max > self.max;
        let shift = if next.max == A::NEG_INFINITY { A::ZERO } else { next.max - max };
        let shrink = if next.max == A::NEG_INFINITY { A::ZERO } else { shift.vexp::<Baseline>() };
        // as a part: the next classes below `max`, and their maximum where it is at `max`
        let (tail, ties) =
            if shift == A::ZERO && next.max != A::NEG_INFINITY { (next.rest, A::ONE) } else { ((A::ONE + next.rest) * shrink, A::ZERO) };
        self.absorb::<Baseline>(Part {
            max,
            block_max: if grew { next.max } else { A::NEG_INFINITY },
            tail,
            ties,
            linear: next.linear + next.mass * shift,
            mass: next.mass,
            moment: shrink * next.moment + if shrink == A::ZERO { A::ZERO } else { (A::ONE + next.rest) * shrink * shift },
        });
    }
}

/// The numbers of a row from which a pass emits its values.
#[derive(Clone, Copy)]
struct RowScalars<A> {
    max: A,
    /// `1 / sum exp(x - m)`
    inverse: A,
    /// `log sum exp(x - m)`
    log_sum: A,
    /// `rest / (1 + rest)`: 1 - p of the most probable class
    confident: A,
    /// The factor of the probability, and the sum of the row's q.
    slope: A,
    mass: A,
    /// Upstream gradient over the denominator.
    upstream: A,
    /// Whether the row counts; what it emits is 0 otherwise.
    live: bool,
}

impl<A: Real> RowScalars<A> {
    const DEAD: Self = RowScalars {
        max: A::ZERO,
        inverse: A::ZERO,
        log_sum: A::ZERO,
        confident: A::ZERO,
        slope: A::ZERO,
        mass: A::ZERO,
        upstream: A::ZERO,
        live: false,
    };

    fn new(max: A, rest: A) -> Self {
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
fn log_sum<A: Real>(max: A, rest: A) -> A {
    if max.is_finite() {
        A::of(rest.to_f64().ln_1p())
    } else {
        A::NAN
    }
}

/// The value that a pass emits for a logit.
trait Emit<A: Real>: Sync {
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, extra: A) -> A;
}

/// `upstream (slope p - q)`
struct LogitsGradient;
impl<A: Real> Emit<A> for LogitsGradient {
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
struct TargetGradient;
impl<A: Real> Emit<A> for TargetGradient {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, w: A) -> A {
        let g = row.upstream * w * (row.log_sum - (x - row.max));
        if w == A::ZERO {
            A::ZERO
        } else {
            g
        }
    }
}

/// `x - lse`
struct LogProbs;
impl<A: Real> Emit<A> for LogProbs {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, x: A, _: A) -> A {
        (x - row.max) - row.log_sum
    }
}

/// `g - exp(y) sum(g)` for log-probabilities y
struct LogProbsGradient;
impl<A: Real> Emit<A> for LogProbsGradient {
    #[inline(always)]
    fn value<I: Isa>(&self, row: &RowScalars<A>, y: A, g: A) -> A {
        g - y.vexp::<I>() * row.mass
    }
}

/// The logits and how a pass reads them.
struct Logits<'a, T: Element> {
    x: Input<'a, T>,
    rows: Rows,
    scale: T::Acc,
    softcap: Option<T::Acc>,
    /// Whether what a pass emits replaces what it reads.
    in_place: bool,
}

/// How the work is divided; by the shape alone, so that the bits of a result don't depend on the number of threads.
#[derive(Clone, Copy)]
enum Engine {
    /// A unit is a segment of a row.
    Blocks { segments: usize },
    /// A unit is [`LANES`] rows.
    Tiles,
}

impl<'a, T: Element> Logits<'a, T> {
    fn new(x: Input<'a, T>, rows: Rows) -> Self {
        Logits { x, rows, scale: T::Acc::ONE, softcap: None, in_place: false }
    }

    fn engine(&self) -> Engine {
        let Rows { classes, class_stride, .. } = self.rows;
        if class_stride != 1 || classes <= TILE_MAX_CLASSES {
            return Engine::Tiles;
        }
        let split = self.rows.count() < FEW_ROWS && classes > 2 * SEGMENT;
        Engine::Blocks { segments: if split { classes.div_ceil(SEGMENT) } else { 1 } }
    }

    fn units(&self, engine: Engine) -> usize {
        match engine {
            Engine::Blocks { segments } => self.rows.count() * segments,
            Engine::Tiles => self.rows.count().div_ceil(LANES),
        }
    }

    /// Calls `unit` for each unit of work, in parallel where there is enough of it.
    fn for_each_unit(&self, engine: Engine, pass: &impl UnitPass<T::Acc>) {
        struct Task<'p, P> {
            pass: &'p P,
            units: Range<usize>,
        }
        let units = self.units(engine);
        let per_unit = (self.rows.count() * self.rows.classes / units.max(1)).max(1);
        for_each_task(units, per_unit, |units| {
            struct Run<'p, P, A>(Task<'p, P>, std::marker::PhantomData<A>);
            impl<A: Real, P: UnitPass<A>> Kernel for Run<'_, P, A> {
                type Output = ();
                #[inline(always)]
                fn run<I: Isa>(self) {
                    let mut scratch = Scratch::new();
                    for unit in self.0.units {
                        self.0.pass.unit::<I>(unit, &mut scratch);
                    }
                }
            }
            dispatch(Run(Task { pass, units }, std::marker::PhantomData))
        });
    }

    /// Scale, then soft cap; `slope` gets the soft cap's derivative.
    #[inline(always)]
    fn transform<I: Isa>(&self, xs: &mut [T::Acc], slope: Option<&mut [T::Acc]>) {
        if self.scale != T::Acc::ONE {
            for x in xs.iter_mut() {
                *x *= self.scale;
            }
        }
        let Some(cap) = self.softcap else { return };
        let inverse = T::Acc::ONE / cap;
        match slope {
            Some(slope) => {
                for (x, s) in xs.iter_mut().zip(slope) {
                    let (t, d) = (*x * inverse).tanh_and_slope::<I>();
                    (*x, *s) = (cap * t, d);
                }
            }
            None => {
                for x in xs.iter_mut() {
                    *x = cap * (*x * inverse).tanh_and_slope::<I>().0;
                }
            }
        }
    }

    fn is_transformed(&self) -> bool {
        self.softcap.is_some() || self.scale != T::Acc::ONE
    }

    /// One logit after scale and soft cap, and the soft cap's derivative.
    #[inline(always)]
    fn get<I: Isa>(&self, row: usize, class: usize) -> (T::Acc, T::Acc) {
        let mut x = [self.x.slice(self.rows.start(row) + class * self.rows.class_stride, 1)[0].to_acc()];
        let mut slope = [T::Acc::ONE];
        self.transform::<I>(&mut x, Some(&mut slope));
        (x[0], slope[0])
    }

    /// A block of adjacent classes, padded with -inf to a multiple of [`LANES`].
    #[inline(always)]
    fn block<'s, I: Isa>(&'s self, row: usize, class: usize, len: usize, to: &'s mut Tile<T::Acc>, slope: Option<&mut Tile<T::Acc>>) -> &'s [T::Acc] {
        let src = self.x.slice(self.rows.start(row) + class, len);
        if len == BLOCK && !self.in_place && !self.is_transformed() {
            if let Some(src) = T::as_acc(src) {
                return src;
            }
        }
        let to = to.as_flattened_mut();
        T::widen(src, &mut to[..len]);
        self.transform::<I>(&mut to[..len], slope.map(|s| &mut s.as_flattened_mut()[..len]));
        let padded = len.next_multiple_of(LANES);
        to[len..padded].fill(T::Acc::NEG_INFINITY);
        &to[..padded]
    }

    /// A tile of `lanes` rows and `classes`; the lanes without a row are -inf.
    #[inline(always)]
    fn tile<I: Isa>(&self, place: &Place, classes: &Range<usize>, to: &mut Tile<T::Acc>, slope: Option<&mut Tile<T::Acc>>) {
        let stride = self.rows.class_stride;
        let depth = classes.len();
        if place.lanes < LANES {
            to[..depth].as_flattened_mut().fill(T::Acc::NEG_INFINITY);
        }
        if place.read_adjacent {
            for (to, class) in to.iter_mut().zip(classes.clone()) {
                let src = self.x.slice(place.read[0] + class * stride, place.lanes);
                T::widen(src, &mut to[..place.lanes]);
            }
        } else {
            for lane in 0..place.lanes {
                let src = self.x.slice(place.read[lane] + classes.start * stride, (depth - 1) * stride + 1);
                for (to, x) in to.iter_mut().zip(src.iter().step_by(stride)) {
                    to[lane] = x.to_acc();
                }
            }
        }
        if self.is_transformed() {
            self.transform::<I>(to[..depth].as_flattened_mut(), slope.map(|s| s[..depth].as_flattened_mut()));
            if place.lanes < LANES {
                for to in &mut to[..depth] {
                    to[place.lanes..].fill(T::Acc::NEG_INFINITY);
                }
            }
        }
    }
}

/// Where the rows of a tile are read and written.
struct Place {
    first: usize,
    lanes: usize,
    read: [usize; LANES],
    write: [usize; LANES],
    write_stride: usize,
    read_adjacent: bool,
    write_adjacent: bool,
}

impl Place {
    #[inline(always)]
    fn new(rows: &Rows, unit: usize) -> Self {
        let first = unit * LANES;
        let lanes = (rows.count() - first).min(LANES);
        let (mut read, mut write) = ([0; LANES], [0; LANES]);
        let class_last = rows.class_last();
        for lane in 0..lanes {
            let row = first + lane;
            read[lane] = rows.start(row);
            write[lane] = if class_last { row * rows.classes } else { row / rows.inner * rows.classes * rows.inner + row % rows.inner };
        }
        let adjacent = |at: &[usize; LANES]| (1..lanes).all(|l| at[l] == at[0] + l);
        Place {
            first,
            lanes,
            write_stride: if class_last { 1 } else { rows.inner },
            // one row alone is better read along its classes
            read_adjacent: lanes > 1 && adjacent(&read),
            write_adjacent: lanes > 1 && adjacent(&write),
            read,
            write,
        }
    }

    /// The extra numbers of a tile.
    #[inline(always)]
    fn load_extra<A: Real>(&self, extra: &Extra<A>, classes: &Range<usize>, to: &mut Tile<A>) {
        match extra {
            Extra::None => {}
            Extra::Constant(v) => to[..classes.len()].as_flattened_mut().fill(*v),
            Extra::Weights { factor, weight } => {
                for (to, &w) in to.iter_mut().zip(&weight[classes.clone()]) {
                    to.fill(*factor * w);
                }
            }
            Extra::Dense { .. } => {
                for lane in self.lanes..LANES {
                    to[..classes.len()].iter_mut().for_each(|to| to[lane] = A::ZERO);
                }
                if self.write_adjacent {
                    for (to, class) in to.iter_mut().zip(classes.clone()) {
                        // one class of adjacent rows: the weight is that of the one class
                        for (lane, to) in to[..self.lanes].iter_mut().enumerate() {
                            extra.load(self.write[lane] + class * self.write_stride, class, std::slice::from_mut(to));
                        }
                    }
                } else {
                    let mut row = [A::ZERO; DEPTH];
                    let row = &mut row[..classes.len()];
                    for lane in 0..self.lanes {
                        if self.write_stride == 1 {
                            extra.load(self.write[lane] + classes.start, classes.start, row);
                        } else {
                            for (v, class) in row.iter_mut().zip(classes.clone()) {
                                extra.load(self.write[lane] + class * self.write_stride, class, std::slice::from_mut(v));
                            }
                        }
                        for (to, &v) in to.iter_mut().zip(row.iter()) {
                            to[lane] = v;
                        }
                    }
                }
            }
        }
    }
}

/// One pass over the logits, cut into units that don't depend on each other.
trait UnitPass<A: Real>: Sync {
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<A>);
}

#[inline(always)]
fn max_of<A: Real>(xs: &[A]) -> A {
    let mut lanes = [A::NEG_INFINITY; LANES];
    for chunk in xs.chunks_exact(LANES) {
        for (m, &x) in lanes.iter_mut().zip(chunk) {
            *m = m.max_or_self(x);
        }
    }
    lanes.into_iter().fold(A::NEG_INFINITY, A::max_or_self)
}

#[inline(always)]
fn sum_of<A: Real>(xs: &[A]) -> A {
    let mut lanes = [A::ZERO; LANES];
    for chunk in xs.chunks_exact(LANES) {
        for (sum, &x) in lanes.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            let upper = lanes[i + width];
            lanes[i] += upper;
        }
        width /= 2;
    }
    lanes[0]
}

/// What a reduction computes beside the maximum and the sum.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Detail {
    Loss,
    /// Entropy and argmax too.
    Statistics,
}

/// Reduces a segment of a row.
#[inline(always)]
fn reduce_segment<T: Element, I: Isa>(
    logits: &Logits<T>,
    extra: &Extra<T::Acc>,
    detail: Detail,
    row: usize,
    classes: Range<usize>,
    scratch: &mut Scratch<T::Acc>,
) -> State<T::Acc> {
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

/// Reduces a tile of rows.
#[inline(always)]
fn reduce_tile<T: Element, I: Isa>(
    logits: &Logits<T>,
    extra: &Extra<T::Acc>,
    detail: Detail,
    place: &Place,
    scratch: &mut Scratch<T::Acc>,
) -> [State<T::Acc>; LANES] {
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

/// Emits a segment of a row into `out`, which holds its classes.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn emit_segment<T: Element, O: Element<Acc = T::Acc>, E: Emit<T::Acc>, I: Isa>(
    logits: &Logits<T>,
    extra: &Extra<T::Acc>,
    emit: &E,
    scalars: &RowScalars<T::Acc>,
    row: usize,
    classes: Range<usize>,
    out: &Output<O>,
    scratch: &mut Scratch<T::Acc>,
) {
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
            if logits.softcap.is_some() {
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

/// Emits a tile of rows.
#[inline(always)]
fn emit_tile<T: Element, O: Element<Acc = T::Acc>, E: Emit<T::Acc>, I: Isa>(
    logits: &Logits<T>,
    extra: &Extra<T::Acc>,
    emit: &E,
    scalars: &[RowScalars<T::Acc>; LANES],
    place: &Place,
    out: &Output<O>,
    scratch: &mut Scratch<T::Acc>,
) {
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
        if logits.softcap.is_some() {
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
                    O::narrow(&row[..classes.len()], unsafe { out.slice(place.write[lane] + classes.start, classes.len()) });
                } else {
                    for (v, class) in row.iter().zip(classes.clone()) {
                        // SAFETY: as above
                        O::narrow(std::slice::from_ref(v), unsafe { out.slice(place.write[lane] + class * place.write_stride, 1) });
                    }
                }
            }
        }
    }
}

/// The targets of a cross-entropy: what each row's own class adds to the extra numbers q of all classes.
struct Targets<'a, A> {
    indices: Option<Indices<'a>>,
    /// What goes into the loss for every class: smoothing, or the probabilities.
    extra: Extra<'a, A>,
    ignore_index: i64,
    /// 1 - label smoothing
    keep: A,
    weight: Option<&'a [A]>,
    classes: usize,
}

enum RowTarget<A> {
    Ignored,
    /// The class, inside the row by [`Targets::check`], and its weight times `keep`.
    Class(usize, A),
    Probabilities,
}

impl<'a, A: Real> Targets<'a, A> {
    fn row(&self, row: usize) -> RowTarget<A> {
        let Some(indices) = &self.indices else { return RowTarget::Probabilities };
        let class = indices.get(row);
        if class == self.ignore_index {
            return RowTarget::Ignored;
        }
        let class = class as usize;
        RowTarget::Class(class, self.weight.map_or(A::ONE, |w| w[class]) * self.keep)
    }

    /// Checks every class index, and sums the weights of the rows that count.
    fn check(&self, name: &str, rows: usize) -> Result<f64> {
        let Some(indices) = &self.indices else { return Ok(rows as f64) };
        let mut total = 0f64;
        for row in 0..rows {
            let class = indices.get(row);
            if class == self.ignore_index {
                continue;
            }
            match usize::try_from(class) {
                Ok(c) if c < self.classes => total += self.weight.map_or(1.0, |w| w[c].to_f64()),
                _ => bail!(
                    "{name}: target {class} at row {row} is out of range, expected a class in 0..{} or the ignore_index {}",
                    self.classes,
                    self.ignore_index
                ),
            }
        }
        Ok(total)
    }
}

/// A slice of a tensor of this crate's own, contiguous and in the arithmetic type.
fn acc_slice<'a, A: Real>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [A]> {
    let data = A::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("a contiguous tensor was expected, got strides {:?} of shape {:?}", layout.stride(), layout.dims()),
    }
}

/// One cross-entropy on one pair of tensors.
struct Problem<'a, T: Element> {
    options: &'a CrossEntropy,
    logits: Logits<'a, T>,
    targets: Targets<'a, T::Acc>,
}

impl<'a, T: Element> Problem<'a, T> {
    fn new(
        options: &'a CrossEntropy,
        x: Input<'a, T>,
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        weight: Option<&'a [T::Acc]>,
    ) -> Result<Self> {
        let of = <T::Acc as Real>::of;
        let e = options.label_smoothing;
        let spread = of(e / rows.classes.max(1) as f64);
        let (indices, extra) = if !target.0.dtype().is_float() {
            let extra = match weight {
                _ if e == 0.0 => Extra::None,
                None => Extra::Constant(spread),
                Some(weight) => Extra::Weights { factor: spread, weight },
            };
            (Some(Indices::new(target.0, target.1, rows.count())?), extra)
        } else {
            let order = options.target_rows(target.1, &rows)?;
            let order = Strided::new(order.offset, order.axes(rows.class_last()));
            let source = source(target.0, order)?;
            (None, Extra::Dense { source, keep: of(1.0 - e), spread, weight })
        };
        let targets = Targets { indices, extra, ignore_index: options.ignore_index, keep: of(1.0 - e), weight, classes: rows.classes };
        let mut logits = Logits::new(x, rows);
        logits.scale = of(options.logit_scale);
        logits.softcap = options.softcap.map(of);
        Ok(Problem { options, logits, targets })
    }

    fn rows(&self) -> &Rows {
        &self.logits.rows
    }

    /// What the sum of the rows' losses is divided by, after a check of every class index.
    fn denominator(&self) -> Result<f64> {
        let total = self.targets.check(self.options.name, self.rows().count())?;
        Ok(match (self.options.reduction, self.options.normalizer) {
            (Reduction::Mean, Some(normalizer)) => normalizer,
            (Reduction::Mean, None) => total,
            (Reduction::None | Reduction::Sum, _) => 1.0,
        })
    }

    /// The loss of a row.
    #[inline(always)]
    fn loss<I: Isa>(&self, row: usize, state: &State<T::Acc>) -> T::Acc {
        let zero = T::Acc::ZERO;
        let (own, class) = match self.targets.row(row) {
            RowTarget::Ignored => return zero,
            RowTarget::Class(class, own) => (own, class),
            RowTarget::Probabilities => (zero, 0),
        };
        if self.options.log_probs {
            let x = self.logits.get::<I>(row, class).0;
            return if own == zero { zero } else { -own * x };
        }
        let log_sum = log_sum(state.max, state.rest);
        let mut loss = if own == zero {
            // still NaN in a row without a softmax
            zero * log_sum
        } else {
            own * (log_sum - (self.logits.get::<I>(row, class).0 - state.max))
        };
        if !self.targets.extra.is_none() {
            loss += state.mass * log_sum - state.linear;
        }
        loss + self.z_loss(state.max + log_sum)
    }

    fn z_loss(&self, lse: T::Acc) -> T::Acc {
        match self.options.z_loss {
            0.0 => T::Acc::ZERO,
            z => T::Acc::of(z) * lse * lse,
        }
    }

    /// The numbers from which a row's gradient is made, `upstream` already over the denominator.
    #[inline(always)]
    fn scalars(&self, row: usize, max: T::Acc, rest: T::Acc, mass: T::Acc, upstream: T::Acc) -> RowScalars<T::Acc> {
        let own = match self.targets.row(row) {
            RowTarget::Ignored => return RowScalars::DEAD,
            RowTarget::Class(_, own) => own,
            RowTarget::Probabilities => T::Acc::ZERO,
        };
        let mut scalars = RowScalars::new(max, rest);
        scalars.upstream = upstream * self.logits.scale;
        scalars.mass = own + mass;
        let lse = scalars.max + scalars.log_sum;
        let z = self.options.z_loss;
        scalars.slope = if z == 0.0 { scalars.mass } else { scalars.mass + T::Acc::of(2.0 * z) * lse };
        scalars
    }

    /// The gradient at the row's own class.
    #[inline(always)]
    fn own_gradient<I: Isa>(&self, scalars: &RowScalars<T::Acc>, row: usize, class: usize, own: T::Acc) -> T::Acc {
        let (x, slope) = self.logits.get::<I>(row, class);
        let q = own
            + match &self.targets.extra {
                Extra::Constant(v) => *v,
                Extra::Weights { factor, weight } => *factor * weight[class],
                Extra::None | Extra::Dense { .. } => T::Acc::ZERO,
            };
        LogitsGradient.value::<I>(scalars, x, q) * slope
    }

    /// Writes the gradient of a row's segment, its own class included.
    #[inline(always)]
    fn emit_gradient_segment<I: Isa>(
        &self,
        scalars: &RowScalars<T::Acc>,
        row: usize,
        classes: Range<usize>,
        out: &Output<T>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        // in place, the own logit is gone once the segment is written
        let own = match self.targets.row(row) {
            RowTarget::Class(class, own) if classes.contains(&class) => Some((class, self.own_gradient::<I>(scalars, row, class, own))),
            _ => None,
        };
        emit_segment::<T, T, _, I>(&self.logits, &self.targets.extra, &LogitsGradient, scalars, row, classes, out, scratch);
        if let Some((class, g)) = own {
            // SAFETY: this unit alone writes the row's segment, and no slice of it is alive
            unsafe { out.slice(row * self.rows().classes + class, 1)[0].write(T::from_acc(g)) };
        }
    }

    /// Writes the gradient of a tile's rows, their own classes included.
    #[inline(always)]
    fn emit_gradient_tile<I: Isa>(&self, scalars: &[RowScalars<T::Acc>; LANES], place: &Place, out: &Output<T>, scratch: &mut Scratch<T::Acc>) {
        let mut own = [None; LANES];
        for (lane, own) in own.iter_mut().enumerate().take(place.lanes) {
            let row = place.first + lane;
            if let RowTarget::Class(class, weight) = self.targets.row(row) {
                *own = Some((class, self.own_gradient::<I>(&scalars[lane], row, class, weight)));
            }
        }
        emit_tile::<T, T, _, I>(&self.logits, &self.targets.extra, &LogitsGradient, scalars, place, out, scratch);
        for (lane, own) in own.iter().enumerate() {
            if let Some((class, g)) = own {
                // SAFETY: this unit alone writes the row, and no slice of it is alive
                unsafe { out.slice(place.write[lane] + class * place.write_stride, 1)[0].write(T::from_acc(*g)) };
            }
        }
    }
}

/// What a pass does with the state of each row.
trait Finish<A: Real>: Sync {
    fn finish<I: Isa>(&self, row: usize, state: &State<A>);
}

/// Reduces every row.
struct Reduce<'p, 'a, T: Element, F> {
    logits: &'p Logits<'a, T>,
    extra: &'p Extra<'a, T::Acc>,
    engine: Engine,
    detail: Detail,
    finish: F,
    /// One state for each unit, where a unit is only part of a row.
    parts: Option<Output<'p, State<T::Acc>>>,
}

impl<'p, 'a, T: Element, F: Finish<T::Acc>> Reduce<'p, 'a, T, F> {
    fn run(logits: &'p Logits<'a, T>, extra: &'p Extra<'a, T::Acc>, detail: Detail, finish: F) {
        let engine = logits.engine();
        let Engine::Blocks { segments: segments @ 2.. } = engine else {
            return logits.for_each_unit(engine, &Reduce { logits, extra, engine, detail, finish, parts: None });
        };
        let mut parts = vec![State::EMPTY; logits.units(engine)];
        let pass = Reduce { logits, extra, engine, detail, finish: (), parts: Some(Output::in_place(&mut parts).1) };
        logits.for_each_unit(engine, &pass);
        for (row, parts) in parts.chunks(segments).enumerate() {
            let mut state = parts[0];
            parts[1..].iter().for_each(|part| state.merge(part));
            finish.finish::<Baseline>(row, &state);
        }
    }
}

impl<A: Real> Finish<A> for () {
    fn finish<I: Isa>(&self, _: usize, _: &State<A>) {}
}

/// The row and the classes of a unit.
#[inline(always)]
fn segment(unit: usize, segments: usize, classes: usize) -> (usize, Range<usize>) {
    match segments {
        1 => (unit, 0..classes),
        _ => {
            let start = unit % segments * SEGMENT;
            (unit / segments, start..(start + SEGMENT).min(classes))
        }
    }
}

impl<T: Element, F: Finish<T::Acc>> UnitPass<T::Acc> for Reduce<'_, '_, T, F> {
    #[inline(always)]
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        match self.engine {
            Engine::Blocks { segments } => {
                let (row, classes) = segment(unit, segments, self.logits.rows.classes);
                let state = reduce_segment::<T, I>(self.logits, self.extra, self.detail, row, classes, scratch);
                match &self.parts {
                    Some(parts) => {
                        // SAFETY: this unit alone writes its element
                        unsafe { parts.slice(unit, 1)[0].write(state) };
                    }
                    None => self.finish.finish::<I>(row, &state),
                }
            }
            Engine::Tiles => {
                let place = Place::new(&self.logits.rows, unit);
                let states = reduce_tile::<T, I>(self.logits, self.extra, self.detail, &place, scratch);
                for (lane, state) in states[..place.lanes].iter().enumerate() {
                    self.finish.finish::<I>(place.first + lane, state);
                }
            }
        }
    }
}

/// One value for each row, written by the tasks that own the rows.
struct PerRow<'a, A>(Output<'a, A>);

impl<'a, A> PerRow<'a, A> {
    fn new(values: &'a mut [A]) -> Self {
        PerRow(Output::in_place(values).1)
    }

    #[inline(always)]
    fn set(&self, row: usize, value: A) {
        // SAFETY: a row is finished by one task, and nothing reads the values before all tasks are done
        unsafe { self.0.slice(row, 1)[0].write(value) };
    }
}

/// Each row's loss, and what the backward needs of it.
struct RowResults<A> {
    loss: Vec<A>,
    /// max, rest and, with probability targets, mass of all rows: see [`State`]
    statistics: Vec<A>,
}

struct RowResultsWriter<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
    loss: PerRow<'p, T::Acc>,
    statistics: PerRow<'p, T::Acc>,
}

impl<T: Element> Finish<T::Acc> for RowResultsWriter<'_, '_, T> {
    #[inline(always)]
    fn finish<I: Isa>(&self, row: usize, state: &State<T::Acc>) {
        let rows = self.problem.rows().count();
        self.loss.set(row, self.problem.loss::<I>(row, state));
        let kinds = [state.max, state.rest, state.mass];
        for (kind, value) in kinds[..self.problem.kinds()].iter().enumerate() {
            self.statistics.set(kind * rows + row, *value);
        }
    }
}

/// The upstream gradient of a row over the denominator.
#[inline(always)]
fn upstream_of<A: Real>(upstream: &[A], row: usize, denominator: A) -> A {
    upstream[if upstream.len() == 1 { 0 } else { row }] / denominator
}

impl<'a, T: Element> Problem<'a, T> {
    /// How many numbers of a row the backward needs.
    fn kinds(&self) -> usize {
        match (&self.targets.indices, self.options.log_probs) {
            (_, true) => 0,
            (Some(_), _) => 2,
            (None, _) => 3,
        }
    }

    fn reduce(&self) -> RowResults<T::Acc> {
        let rows = self.rows().count();
        let mut results = RowResults { loss: vec![T::Acc::ZERO; rows], statistics: vec![T::Acc::ZERO; rows * self.kinds()] };
        let writer = RowResultsWriter {
            problem: self,
            loss: PerRow::new(&mut results.loss),
            statistics: PerRow::new(&mut results.statistics),
        };
        if self.options.log_probs {
            (0..rows).for_each(|row| writer.finish::<Baseline>(row, &State::EMPTY));
        } else {
            Reduce::run(&self.logits, &self.targets.extra, Detail::Loss, writer);
        }
        results
    }

    /// What `forward` returns for the rows' losses.
    fn reduced(&self, loss: Vec<T::Acc>, denominator: f64) -> CpuStorage {
        T::Acc::to_cpu_storage_owned(match self.options.reduction {
            Reduction::None => loss,
            Reduction::Mean | Reduction::Sum => vec![T::Acc::of(sum_in_order(&loss) / denominator)],
        })
    }

    /// The sum of the extra numbers of a row where they are the same in all rows.
    fn uniform_mass(&self) -> T::Acc {
        match &self.targets.extra {
            Extra::Constant(_) => T::Acc::of(self.options.label_smoothing),
            Extra::Weights { factor, weight } => T::Acc::of(factor.to_f64() * sum_in_order(weight)),
            Extra::None | Extra::Dense { .. } => T::Acc::ZERO,
        }
    }

    /// Writes the gradient from the rows' results.
    fn emit_gradient(&self, statistics: &[T::Acc], upstream: &[T::Acc], denominator: T::Acc, out: &Output<T>) {
        if self.options.log_probs {
            return self.emit_log_probs_gradient(upstream, denominator, out);
        }
        let rows = self.rows().count();
        let uniform_mass = self.uniform_mass();
        let scalars = |row: usize| {
            let mass = if self.kinds() == 3 { statistics[2 * rows + row] } else { uniform_mass };
            self.scalars(row, statistics[row], statistics[rows + row], mass, upstream_of(upstream, row, denominator))
        };
        let engine = self.logits.engine();
        self.logits.for_each_unit(engine, &EmitGradient { problem: self, engine, scalars, out });
    }

    /// The gradient of NLL: nothing but each row's own class.
    fn emit_log_probs_gradient(&self, upstream: &[T::Acc], denominator: T::Acc, out: &Output<T>) {
        let rows = self.rows();
        // SAFETY: no other slice of the output is alive
        unsafe { out.slice(0, rows.count() * rows.classes) }.fill(MaybeUninit::new(T::from_acc(T::Acc::ZERO)));
        for unit in 0..self.logits.units(Engine::Tiles) {
            let place = Place::new(rows, unit);
            for lane in 0..place.lanes {
                let row = place.first + lane;
                if let RowTarget::Class(class, own) = self.targets.row(row) {
                    let g = -(own * upstream_of(upstream, row, denominator));
                    // SAFETY: as above
                    unsafe { out.slice(place.write[lane] + class * place.write_stride, 1)[0].write(T::from_acc(g)) };
                }
            }
        }
    }

    /// Loss and gradient; the gradient goes to `out`, which may be the logits themselves.
    fn loss_and_grad(&self, out: &Output<T>) -> Result<CpuStorage> {
        let denominator = self.denominator()?;
        let acc_denominator = T::Acc::of(denominator);
        let engine = self.logits.engine();
        let rows_in_parts = matches!(engine, Engine::Blocks { segments } if segments > 1);
        let loss = if rows_in_parts || self.options.log_probs {
            let results = self.reduce();
            self.emit_gradient(&results.statistics, &[T::Acc::ONE], acc_denominator, out);
            results.loss
        } else {
            let mut loss = vec![T::Acc::ZERO; self.rows().count()];
            let upstream = T::Acc::ONE / acc_denominator;
            let pass = Fused { problem: self, engine, loss: PerRow::new(&mut loss), upstream, out };
            self.logits.for_each_unit(engine, &pass);
            loss
        };
        Ok(self.reduced(loss, denominator))
    }
}

struct EmitGradient<'p, 'a, T: Element, S> {
    problem: &'p Problem<'a, T>,
    engine: Engine,
    scalars: S,
    out: &'p Output<'p, T>,
}

impl<T: Element, S: Fn(usize) -> RowScalars<T::Acc> + Sync> UnitPass<T::Acc> for EmitGradient<'_, '_, T, S> {
    #[inline(always)]
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        match self.engine {
            Engine::Blocks { segments } => {
                let (row, classes) = segment(unit, segments, self.problem.rows().classes);
                self.problem.emit_gradient_segment::<I>(&(self.scalars)(row), row, classes, self.out, scratch);
            }
            Engine::Tiles => {
                let place = Place::new(self.problem.rows(), unit);
                let lanes = place.scalars(&self.scalars);
                self.problem.emit_gradient_tile::<I>(&lanes, &place, self.out, scratch);
            }
        }
    }
}

impl Place {
    #[inline(always)]
    fn scalars<A: Real>(&self, of_row: impl Fn(usize) -> RowScalars<A>) -> [RowScalars<A>; LANES] {
        let mut lanes = [RowScalars::DEAD; LANES];
        (0..self.lanes).for_each(|lane| lanes[lane] = of_row(self.first + lane));
        lanes
    }
}

/// Reduces each row and emits its gradient while the row is in the cache.
struct Fused<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
    engine: Engine,
    loss: PerRow<'p, T::Acc>,
    upstream: T::Acc,
    out: &'p Output<'p, T>,
}

impl<T: Element> UnitPass<T::Acc> for Fused<'_, '_, T> {
    #[inline(always)]
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        let Problem { logits, targets, .. } = self.problem;
        let finish = |row: usize, state: &State<T::Acc>| {
            self.loss.set(row, self.problem.loss::<I>(row, state));
            self.problem.scalars(row, state.max, state.rest, state.mass, self.upstream)
        };
        match self.engine {
            Engine::Blocks { .. } => {
                let classes = 0..logits.rows.classes;
                let state = reduce_segment::<T, I>(logits, &targets.extra, Detail::Loss, unit, classes.clone(), scratch);
                self.problem.emit_gradient_segment::<I>(&finish(unit, &state), unit, classes, self.out, scratch);
            }
            Engine::Tiles => {
                let place = Place::new(&logits.rows, unit);
                let states = reduce_tile::<T, I>(logits, &targets.extra, Detail::Loss, &place, scratch);
                let lanes = place.scalars(|row| finish(row, &states[row - place.first]));
                self.problem.emit_gradient_tile::<I>(&lanes, &place, self.out, scratch);
            }
        }
    }
}

/// Emits a value for every logit from numbers that each row has already.
struct EmitAll<'p, 'a, T: Element, O, E, S> {
    logits: &'p Logits<'a, T>,
    extra: &'p Extra<'a, T::Acc>,
    engine: Engine,
    emit: E,
    scalars: S,
    out: &'p Output<'p, O>,
}

impl<'p, 'a, T, O, E, S> EmitAll<'p, 'a, T, O, E, S>
where
    T: Element,
    O: Element<Acc = T::Acc>,
    E: Emit<T::Acc>,
    S: Fn(usize) -> RowScalars<T::Acc> + Sync,
{
    fn run(logits: &'p Logits<'a, T>, extra: &'p Extra<'a, T::Acc>, emit: E, scalars: S) -> Vec<O> {
        let engine = logits.engine();
        // SAFETY: every row is emitted whole
        unsafe {
            build(logits.rows.count() * logits.rows.classes, |out| {
                logits.for_each_unit(engine, &EmitAll { logits, extra, engine, emit, scalars, out });
            })
        }
    }
}

impl<T, O, E, S> UnitPass<T::Acc> for EmitAll<'_, '_, T, O, E, S>
where
    T: Element,
    O: Element<Acc = T::Acc>,
    E: Emit<T::Acc>,
    S: Fn(usize) -> RowScalars<T::Acc> + Sync,
{
    #[inline(always)]
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        match self.engine {
            Engine::Blocks { segments } => {
                let (row, classes) = segment(unit, segments, self.logits.rows.classes);
                let scalars = (self.scalars)(row);
                emit_segment::<T, O, E, I>(self.logits, self.extra, &self.emit, &scalars, row, classes, self.out, scratch);
            }
            Engine::Tiles => {
                let place = Place::new(&self.logits.rows, unit);
                let lanes = place.scalars(&self.scalars);
                emit_tile::<T, O, E, I>(self.logits, self.extra, &self.emit, &lanes, &place, self.out, scratch);
            }
        }
    }
}

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
pub(super) use with_floats;

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
pub(crate) fn forward(options: &CrossEntropy, logits: Arg<CpuStorage>, target: Arg<CpuStorage>) -> Result<(CpuStorage, Saved)> {
    fn run<T: Element>(options: &CrossEntropy, data: &[T], layout: &Layout, target: Arg<CpuStorage>) -> Result<(CpuStorage, Saved)> {
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
                let grad = unsafe { build(rows * problem.rows().classes, |out| problem.emit_gradient(&statistics, upstream, denominator, out)) };
                return Ok(T::to_cpu_storage_owned(grad));
            }
            let keep = problem.targets.keep;
            let extra = match weight {
                None => Extra::Constant(keep),
                Some(weight) => Extra::Weights { factor: keep, weight },
            };
            let scalars = |row: usize| {
                let mut scalars = RowScalars::new(statistics[row], statistics[rows + row]);
                scalars.upstream = upstream_of(upstream, row, denominator);
                scalars
            };
            let grad: Vec<T::Acc> = EmitAll::run(&problem.logits, &extra, TargetGradient, scalars);
            Ok(T::Acc::to_cpu_storage_owned(grad))
        })
    }
    with_floats!(options.name, logits.0, data => run(options, saved, of, (data, logits.1), target, upstream))
}

pub(crate) fn loss_and_grad(options: &CrossEntropy, logits: Arg<CpuStorage>, target: Arg<CpuStorage>) -> Result<(CpuStorage, CpuStorage)> {
    fn run<T: Element>(options: &CrossEntropy, data: &[T], layout: &Layout, target: Arg<CpuStorage>) -> Result<(CpuStorage, CpuStorage)> {
        with_weight(&options.weight, |weight| {
            let problem = Problem::new(options, Input::new(data), options.rows(layout)?, target, weight)?;
            let mut grad = Vec::with_capacity(layout.shape().elem_count());
            let len = layout.shape().elem_count();
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
    fn run<T: Element>(options: &CrossEntropy, data: &mut [T], layout: &Layout, target: Arg<CpuStorage>) -> Result<CpuStorage> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{}: strides {:?} of shape {:?}, expected contiguous logits", options.name, layout.stride(), layout.dims())
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
    #[inline(always)]
    fn finish<I: Isa>(&self, row: usize, state: &State<T::Acc>) {
        let target = self.problem.targets.row(row);
        let log_sum = log_sum(state.max, state.rest);
        let lse = state.max + log_sum;
        let entropy = log_sum - state.moment / (T::Acc::ONE + state.rest);
        let ignored = matches!(target, RowTarget::Ignored);
        let kept = |v: T::Acc| if ignored { T::Acc::ZERO } else { v };
        let correct = match target {
            RowTarget::Ignored => false,
            RowTarget::Class(class, _) => class == state.argmax as usize,
            RowTarget::Probabilities => self.problem.most_probable(row) == state.argmax as usize,
        };
        self.loss.set(row, self.problem.loss::<I>(row, state));
        self.lse.set(row, kept(lse));
        self.z_loss.set(row, kept(self.problem.z_loss(lse)));
        self.entropy.set(row, kept(entropy));
        self.argmax.set(row, state.argmax);
        self.correct.set(row, correct as u8);
    }
}

impl<T: Element> Problem<'_, T> {
    /// The first class of the largest probability in a target row.
    fn most_probable(&self, row: usize) -> usize {
        let Extra::Dense { source, .. } = &self.targets.extra else { return 0 };
        let rows = self.rows();
        let place = Place::new(rows, row / LANES);
        let mut best = (T::Acc::NEG_INFINITY, 0);
        for class in 0..rows.classes {
            let mut t = [T::Acc::ZERO];
            source.load(place.write[row % LANES] + class * place.write_stride, &mut t);
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
            Reduce::run(&problem.logits, &problem.targets.extra, Detail::Statistics, writer);
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

/// Reduces each row and emits its log-probabilities while the row is in the cache.
struct LogSoftmax<'p, 'a, T: Element> {
    logits: &'p Logits<'a, T>,
    engine: Engine,
    out: &'p Output<'p, T>,
}

impl<T: Element> UnitPass<T::Acc> for LogSoftmax<'_, '_, T> {
    #[inline(always)]
    fn unit<I: Isa>(&self, unit: usize, scratch: &mut Scratch<T::Acc>) {
        let scalars = |state: &State<T::Acc>| RowScalars::new(state.max, state.rest);
        let none = &Extra::None;
        match self.engine {
            Engine::Blocks { .. } => {
                let classes = 0..self.logits.rows.classes;
                let state = reduce_segment::<T, I>(self.logits, none, Detail::Loss, unit, classes.clone(), scratch);
                emit_segment::<T, T, _, I>(self.logits, none, &LogProbs, &scalars(&state), unit, classes, self.out, scratch);
            }
            Engine::Tiles => {
                let place = Place::new(&self.logits.rows, unit);
                let states = reduce_tile::<T, I>(self.logits, none, Detail::Loss, &place, scratch);
                let lanes = place.scalars(|row| scalars(&states[row - place.first]));
                emit_tile::<T, T, _, I>(self.logits, none, &LogProbs, &lanes, &place, self.out, scratch);
            }
        }
    }
}

struct MaxAndRest<'p, A>(PerRow<'p, (A, A)>);

impl<A: Real> Finish<A> for MaxAndRest<'_, A> {
    fn finish<I: Isa>(&self, row: usize, state: &State<A>) {
        self.0.set(row, (state.max, state.rest));
    }
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says.
pub(crate) fn log_softmax(name: &str, logits: &CpuStorage, rows: &Rows) -> Result<CpuStorage> {
    fn run<T: Element>(data: &[T], rows: &Rows) -> CpuStorage {
        let logits = Logits::new(Input::new(data), *rows);
        let engine = logits.engine();
        T::to_cpu_storage_owned(match engine {
            Engine::Blocks { segments: 2.. } => {
                let mut states = vec![(T::Acc::ZERO, T::Acc::ZERO); rows.count()];
                Reduce::run(&logits, &Extra::None, Detail::Loss, MaxAndRest(PerRow::new(&mut states)));
                EmitAll::run(&logits, &Extra::None, LogProbs, |row: usize| RowScalars::new(states[row].0, states[row].1))
            }
            // SAFETY: every row is emitted whole
            _ => unsafe {
                build(rows.count() * rows.classes, |out| logits.for_each_unit(engine, &LogSoftmax { logits: &logits, engine, out }))
            },
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
            let place = Place::new(rows, row / LANES);
            let start = place.write[row % LANES];
            let mut block = [T::Acc::ZERO; LANES];
            let mut lanes = [0f64; LANES];
            for class in (0..rows.classes).step_by(LANES) {
                let len = (rows.classes - class).min(LANES);
                if place.write_stride == 1 {
                    extra.load(start + class, class, &mut block[..len]);
                } else {
                    for (i, v) in block[..len].iter_mut().enumerate() {
                        extra.load(start + (class + i) * place.write_stride, class + i, std::slice::from_mut(v));
                    }
                }
                for (sum, v) in lanes.iter_mut().zip(&block[..len]) {
                    *sum += v.to_f64();
                }
            }
            T::Acc::of(lanes.iter().sum())
        };
        let mut masses = vec![T::Acc::ZERO; rows.count()];
        let written = PerRow::new(&mut masses);
        for_each_task(rows.count(), rows.classes, |rows| rows.for_each(|row| written.set(row, mass(row))));
        let scalars = |row: usize| {
            let mut scalars = RowScalars::new(T::Acc::ZERO, T::Acc::ZERO);
            scalars.mass = masses[row];
            scalars
        };
        let grad: Vec<T> = EmitAll::run(&logits, &extra, LogProbsGradient, scalars);
        T::to_cpu_storage_owned(grad)
    }
    let order = Strided::new(upstream_rows.offset, upstream_rows.axes(rows.class_last()));
    Ok(with_floats!(name, out, data => run(data, rows, source(upstream, order)?)))
}
