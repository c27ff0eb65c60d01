//! How rows are worked through on the CPU: in strips along the classes and in tiles of several rows, and where these
//! lie.

use super::layout::{Rows, Run};
use crate::cpu::element::{Element, Input, Output, SQUARE, Source, Strided, source};
use crate::cpu::math::{LANES, Real};
use crate::cpu::own_slice;
use crate::custom_op::Arg;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result};
use std::borrow::Cow;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// An upstream gradient over the denominator. That is 0 where the rows that count weigh nothing: then no gradient goes
/// out of this loss, and what else was added to it keeps its own.
pub(crate) fn over_denominator<A: Real>(upstream: A, denominator: A) -> A {
    if denominator == A::ZERO { A::ZERO } else { upstream / denominator }
}

/// The weights of rows in the arithmetic type; those of a mask are 0 and 1.
pub(crate) fn row_weights<'a, A: Real + Element<Acc = A>>(
    weights: Option<Arg<'a, CpuStorage>>,
) -> Result<Option<Cow<'a, [A]>>> {
    let Some((storage, layout)) = weights else { return Ok(None) };
    if storage.dtype() == A::DTYPE && layout.is_contiguous() {
        return own_slice((storage, layout)).map(|weights| Some(Cow::Borrowed(weights)));
    }
    let mut weights = vec![A::ZERO; layout.shape().elem_count()];
    source(storage, Strided::of(layout))?.load(0, &mut weights);
    if storage.dtype() == DType::U8 {
        weights.iter_mut().for_each(|w| *w = if *w == A::ZERO { A::ZERO } else { A::ONE });
    }
    Ok(Some(Cow::Owned(weights)))
}

/// Makes the classes of rows that weigh nothing the ignored one.
#[inline(never)] // rows without weights shall pay for none of this
pub(crate) fn ignore_weightless<A: Real>(classes: &mut [i64; LANES], weights: &[A], ignored: i64) {
    for (class, &weight) in classes.iter_mut().zip(weights) {
        *class = if weight == A::ZERO { ignored } else { *class };
    }
}

/// Multiplies losses by the weights of their rows. Those of rows that don't count are 0 whatever these are.
#[inline(never)] // as above
pub(crate) fn weigh_losses<A: Real>(losses: &mut [A; LANES], weights: &[A]) {
    for (loss, &weight) in losses.iter_mut().zip(weights) {
        *loss = if *loss == A::ZERO { A::ZERO } else { *loss * weight };
    }
}

/// Classes in a tile; fewer under Miri, which takes a thousand times as long.
pub(crate) const DEPTH: usize = if cfg!(miri) { 4 } else { 64 };
/// Classes in a block.
pub(crate) const BLOCK: usize = LANES * DEPTH;
/// Rows of more classes than this are worked through in blocks.
const TILE_MAX_CLASSES: usize = 64;
/// The logits of a unit of whole rows, which stay in the second cache: so many rows share what is done once a unit.
pub(crate) const STRIP: usize = STRIP_BLOCKS * BLOCK;
/// The blocks of a strip of one row.
pub(crate) const STRIP_BLOCKS: usize = 16;
/// The blocks of a strip of several rows at most, where the last one of a row may have a single class.
pub(crate) const ROW_BLOCKS: usize = 2 * STRIP_BLOCKS;
/// Classes a task takes where there are fewer rows than would keep all threads busy.
pub(crate) const SEGMENT: usize = if cfg!(miri) { BLOCK } else { 8 * BLOCK };
/// Fewer rows than this are split into segments if they are long.
const FEW_ROWS: usize = 16;

/// Classes that are further apart lie in different pages, and the processor sees no pattern in where they are read.
const FAR: usize = if cfg!(miri) { 16 } else { 1024 };
/// Tiles that lie side by side in a unit where classes are far apart: of a class, a tile has two cache lines at most.
const SIDE_BY_SIDE: usize = 4;
/// With fewer units some threads would have nothing to do: rather than that, there are fewer tiles in each.
const MANY_UNITS: usize = if cfg!(miri) { 1 } else { 16 };
/// Rows of so many classes at most are read once where classes are far apart, and kept until their values are emitted:
/// the same few sets of a cache hold all of a row's lines if its stride is a power of 2, so that none would be left.
const KEPT_MAX_CLASSES: usize = 16 * DEPTH;
/// How many classes in advance the memory is asked for them, where they are far apart.
const AHEAD: usize = 8;

/// Some classes of [`LANES`] rows, each class in whole cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Tile<A>(pub [[A; LANES]; DEPTH]);

impl<A: Real> Tile<A> {
    /// The memory of the tiles as numbers one after the other.
    pub fn block(tiles: &mut [Self]) -> &mut [A] {
        // SAFETY: a tile is an array of numbers without padding, so that tiles in a row are numbers in a row
        unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * DEPTH * LANES) }
    }

    /// The memory of the tiles as room for as many elements of a type that is not larger.
    ///
    /// # Safety
    /// Only initialised values are written.
    pub unsafe fn room<O: Element<Acc = A>>(tiles: &mut [Self]) -> &mut [MaybeUninit<O>] {
        assert!(size_of::<O>() <= size_of::<A>());
        // SAFETY: so many bytes, aligned to more than an element is; what is written are numbers of the tile's again,
        // as any bits are
        unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * BLOCK) }
    }
}

/// A cache line, of which only the size and the alignment matter.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct CacheLine(#[expect(dead_code)] [u8; 64]);

/// Calls `work` with so many tiles, in which there are any numbers. The memory stays with the thread: to allocate and
/// fill it anew would take longer than a small problem.
pub(crate) fn with_tiles<A: Real>(count: usize, work: impl FnOnce(&mut [Tile<A>])) {
    thread_local! {
        static KEPT: Cell<Vec<CacheLine>> = const { Cell::new(Vec::new()) };
    }
    let mut lines = KEPT.take();
    let needed = count * size_of::<Tile<A>>().div_ceil(size_of::<CacheLine>());
    if lines.len() < needed {
        lines.resize(needed, CacheLine([0; 64]));
    }
    // SAFETY: lines of the tiles' alignment and at least of their size, initialised, and any bits are floats
    work(unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), count) });
    KEPT.set(lines);
}

/// How the work is divided: by the shape alone, so that the bits of a result don't depend on the number of threads.
#[derive(Clone, Copy)]
pub(crate) enum Division {
    /// A unit is a [`Strip`]: so many whole rows, or one of so many segments of a row.
    Strips { rows: usize, segments: usize },
    /// A unit is so many times [`LANES`] rows, of which so many times [`DEPTH`] classes are held at a time.
    Tiles { tiles: usize, depths: usize },
}

impl Division {
    pub fn of(rows: &Rows) -> Self {
        let Rows { classes, class_stride, .. } = *rows;
        if class_stride != 1 || classes <= TILE_MAX_CLASSES {
            if class_stride < FAR {
                return Division::Tiles { tiles: 1, depths: 1 };
            }
            let tiles = (rows.count() / (MANY_UNITS * LANES)).clamp(1, SIDE_BY_SIDE);
            let depths = if classes <= KEPT_MAX_CLASSES { classes.div_ceil(DEPTH) } else { 1 };
            return Division::Tiles { tiles, depths };
        }
        let split = rows.count() < FEW_ROWS && classes > 2 * SEGMENT;
        let rows_of = |logits: usize| (logits / classes).clamp(1, LANES);
        Division::Strips {
            rows: rows_of(STRIP).min(rows_of(BLOCK).max(rows.count() / MANY_UNITS)),
            segments: if split { classes.div_ceil(SEGMENT) } else { 1 },
        }
    }

    pub fn units(self, of: &Rows) -> usize {
        match self {
            Division::Strips { rows, segments } => of.count().div_ceil(rows) * segments,
            Division::Tiles { tiles, .. } => of.count().div_ceil(tiles * LANES),
        }
    }

    /// Into how many units a row is divided.
    pub fn segments(self) -> usize {
        match self {
            Division::Strips { segments, .. } => segments,
            Division::Tiles { .. } => 1,
        }
    }

    /// The tiles that are held at a time; a strip's blocks are as large as one.
    pub fn held(self) -> usize {
        match self {
            Division::Strips { .. } => 1,
            Division::Tiles { tiles, depths } => tiles * depths,
        }
    }
}

/// Some classes of some rows: of one row, or all classes of some.
pub(crate) struct Strip {
    pub rows: Range<usize>,
    pub classes: Range<usize>,
}

impl Strip {
    pub fn new(unit: usize, rows: usize, segments: usize, of: &Rows) -> Self {
        let row = unit / segments * rows;
        let classes = match segments {
            1 => 0..of.classes,
            _ => {
                let start = unit % segments * SEGMENT;
                start..(start + SEGMENT).min(of.classes)
            }
        };
        Strip { rows: row..(row + rows).min(of.count()), classes }
    }

    /// The rows, counted from the first one, in groups: of one row, or of rows that together are a block at most.
    pub fn at_once(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, count) = (self.rows.len(), (BLOCK / self.classes.len().max(1)).max(1));
        (0..rows).step_by(count).map(move |first| first..rows.min(first + count))
    }
}

/// The rows of a unit's tiles.
pub(crate) struct TilePlace<'k> {
    of: &'k Rows,
    rows: Range<usize>,
    depths: usize,
}

impl<'k> TilePlace<'k> {
    /// As [`Division::Tiles`] says.
    pub fn new(of: &'k Rows, unit: usize, (tiles, depths): (usize, usize)) -> Self {
        let first = unit * tiles * LANES;
        TilePlace { of, rows: first..of.count().min(first + tiles * LANES), depths }
    }

    /// The classes in pieces of [`DEPTH`], each with those of the tiles in memory that hold it.
    pub fn pieces(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let (of, tiles, depths) = (self.of.classes, self.tiles().count(), self.depths);
        (0..of.div_ceil(DEPTH)).map(move |piece| {
            let first = piece % depths * tiles;
            (piece * DEPTH..of.min((piece + 1) * DEPTH), first..first + tiles)
        })
    }

    /// Whether no piece takes the memory of another.
    pub fn keeps_all(&self) -> bool {
        self.of.classes <= self.depths * DEPTH
    }

    /// Where the rows after these begin, if each row's classes are adjacent.
    pub fn after(&self) -> Option<usize> {
        (self.of.class_stride == 1).then(|| self.of.start(self.rows.end.min(self.of.count().saturating_sub(1))))
    }

    /// The rows of each tile.
    pub fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let end = self.rows.end;
        self.rows.clone().step_by(LANES).map(move |row| row..end.min(row + LANES))
    }

    /// Fills the lanes without a row.
    pub fn fill_rest<A: Real>(&self, tiles: &mut [Tile<A>], depth: usize, value: A) {
        let (whole, lanes) = (self.rows.len() / LANES, self.rows.len() % LANES);
        if lanes > 0 {
            tiles[whole].0[..depth].iter_mut().for_each(|lane| lane[lanes..].fill(value));
        }
    }

    /// Reads some classes.
    ///
    /// # Safety
    /// Where the elements are replaced in place, nobody writes these ones meanwhile.
    pub unsafe fn load<T: Element>(&self, x: &Input<T>, classes: &Range<usize>, to: &mut [Tile<T::Acc>]) {
        let (stride, (step, _), depth) = (self.of.class_stride, self.of.steps(), classes.len());
        for Run { rows, read, .. } in self.of.runs(self.rows.clone()) {
            // one row alone is better read along its classes
            if step == 1 && rows.len() > 1 {
                // far apart, one class of all tiles after the other
                let at_once = if stride < FAR { depth } else { 4 };
                for first in (0..depth).step_by(at_once) {
                    for TilePart { tile, lanes, of } in parts(&rows) {
                        let to = to[tile].0[..depth].iter_mut().zip(classes.clone()).skip(first).take(at_once);
                        for (to, class) in to {
                            let at = read + of.start;
                            // SAFETY: elements of the unit's rows, which nobody writes by this function's contract
                            T::widen(unsafe { x.slice(at + class * stride, of.len()) }, &mut to[lanes.clone()]);
                            if stride >= FAR {
                                x.ahead(at + self.ahead(class, stride, rows.len())).fetch(0);
                            }
                        }
                    }
                }
                continue;
            }
            for TilePart { tile, mut lanes, of } in parts(&rows) {
                // once, instead of for every element
                assert!(lanes.end <= LANES);
                let (to, first) = (&mut to[tile].0, lanes.start);
                let start = |lane: usize| read + (of.start + lane - first) * step + classes.start * stride;
                if stride == 1 && step == depth && lanes == (0..LANES) {
                    // SAFETY: elements of the rows, which nobody writes by this function's contract
                    let rows = unsafe { x.slice(start(0), LANES * depth) };
                    match depth {
                        1 => deinterleave::<T, 1>(rows, to),
                        2 => deinterleave::<T, 2>(rows, to),
                        3 => deinterleave::<T, 3>(rows, to),
                        _ => {}
                    }
                    if depth < SQUARE {
                        continue;
                    }
                }
                while stride == 1 && depth >= SQUARE && lanes.len() >= SQUARE {
                    // SAFETY: as above
                    let row = |i: usize| unsafe { x.slice(start(lanes.start + i), depth) };
                    transpose([row(0), row(1), row(2), row(3)], lanes.start, to);
                    lanes.start += SQUARE;
                }
                for lane in lanes {
                    // SAFETY: elements of one of the rows, which nobody writes by this function's contract
                    let row = unsafe { x.strided(start(lane), stride, depth) };
                    to.iter_mut().zip(row).for_each(|(to, x)| to[lane] = x.to_acc());
                }
            }
        }
    }

    /// What will be read a while after a class of some rows, counted from the first class: the same rows of a later
    /// class, or the next rows of one of the first.
    fn ahead(&self, class: usize, stride: usize, rows: usize) -> usize {
        match class + AHEAD.min(self.of.classes) {
            next if next < self.of.classes => next * stride,
            next => (next - self.of.classes) * stride + rows,
        }
    }

    /// Reads some classes of an operand in the order in which gradients are written.
    pub fn load_written<A: Real>(&self, source: &dyn Source<A>, classes: &Range<usize>, to: &mut [Tile<A>]) {
        let (stride, (_, step)) = (self.of.written_stride(), self.of.steps());
        let mut row = [A::ZERO; DEPTH];
        let row = &mut row[..classes.len()];
        for Run { rows, written, .. } in self.of.runs(self.rows.clone()) {
            if step == 1 {
                for (i, class) in classes.clone().enumerate() {
                    for TilePart { tile, lanes, of } in parts(&rows) {
                        let at = written + of.start;
                        source.load(at + class * stride, &mut to[tile].0[i][lanes]);
                        if stride >= FAR {
                            source.fetch(at + self.ahead(class, stride, rows.len()));
                        }
                    }
                }
                continue;
            }
            for TilePart { tile, lanes, of } in parts(&rows) {
                assert!(lanes.end <= LANES);
                for (lane, i) in lanes.zip(of) {
                    let row = source.read(written + i * step + classes.start, row);
                    to[tile].0.iter_mut().zip(row).for_each(|(to, v)| to[lane] = *v);
                }
            }
        }
    }

    /// Writes some classes.
    ///
    /// # Safety
    /// No slice of these elements is alive, of `out` or of the elements that it replaces.
    pub unsafe fn store<O: Element>(&self, e: &[Tile<O::Acc>], classes: &Range<usize>, out: &Output<O>) {
        let (stride, (_, step)) = (self.of.written_stride(), self.of.steps());
        let mut row = [O::Acc::ZERO; DEPTH];
        let row = &mut row[..classes.len()];
        for Run { rows, written, .. } in self.of.runs(self.rows.clone()) {
            if step == 1 {
                for (i, class) in classes.clone().enumerate() {
                    // SAFETY: adjacent elements of one class, of which no slice is alive by this function's contract
                    let to = unsafe { out.slice(written + class * stride, rows.len()) };
                    for TilePart { tile, lanes, of } in parts(&rows) {
                        if stride >= FAR {
                            out.ahead(written + of.start + self.ahead(class, stride, rows.len())).fetch(0);
                        }
                        O::narrow(&e[tile].0[i][lanes], &mut to[of]);
                    }
                }
                continue;
            }
            for TilePart { tile, lanes, of } in parts(&rows) {
                assert!(lanes.end <= LANES);
                for (lane, i) in lanes.zip(of) {
                    let values = e[tile].0[..classes.len()].iter().map(|e| e[lane]);
                    // SAFETY: the elements of one row, of which no slice is alive by this function's contract
                    let out = unsafe { out.slice(written + i * step + classes.start, classes.len()) };
                    if O::INLINE {
                        for (out, v) in out.iter_mut().zip(values) {
                            out.write(O::from_acc(v));
                        }
                    } else {
                        row.iter_mut().zip(values).for_each(|(to, v)| *to = v);
                        O::narrow(row, out);
                    }
                }
            }
        }
    }
}

/// Makes rows lanes, from the first of them on; they have as many classes as a square at least.
#[inline(always)]
fn transpose<T: Element>(rows: [&[T]; SQUARE], lane: usize, to: &mut [[T::Acc; LANES]; DEPTH]) {
    let depth = rows[0].len();
    for first in (0..depth).step_by(SQUARE) {
        // the last ones once more, rather than fewer than a square has
        let first = first.min(depth - SQUARE);
        let [a, b, c, d] = rows;
        let (Some(a), Some(b)) = (a[first..].first_chunk(), b[first..].first_chunk()) else { break };
        let (Some(c), Some(d)) = (c[first..].first_chunk(), d[first..].first_chunk()) else { break };
        for (to, class) in to[first..first + SQUARE].iter_mut().zip(T::transpose([a, b, c, d])) {
            to[lane..lane + SQUARE].copy_from_slice(&class);
        }
    }
}

/// Makes whole rows lanes that lie one after the other.
#[inline(always)]
fn deinterleave<T: Element, const CLASSES: usize>(rows: &[T], to: &mut [[T::Acc; LANES]; DEPTH]) {
    for (lane, row) in rows.as_chunks::<CLASSES>().0.iter().enumerate().take(LANES) {
        for (to, x) in to.iter_mut().zip(row) {
            to[lane] = x.to_acc();
        }
    }
}

/// What a run has in a tile: the lanes, and which rows of the run these are.
struct TilePart {
    tile: usize,
    lanes: Range<usize>,
    of: Range<usize>,
}

/// The parts of rows that are counted from the first one of the first tile.
#[inline(always)]
fn parts(rows: &Range<usize>) -> impl Iterator<Item = TilePart> + use<> {
    let (start, end) = (rows.start, rows.end);
    (start / LANES..end.div_ceil(LANES)).map(move |tile| {
        let rows = start.max(tile * LANES)..end.min((tile + 1) * LANES);
        let lanes = rows.start - tile * LANES..rows.end - tile * LANES;
        TilePart { tile, lanes, of: rows.start - start..rows.end - start }
    })
}
