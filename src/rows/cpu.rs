//! How rows are worked through on the CPU: in strips along the classes and in tiles of several rows, and where these
//! lie.

use super::layout::Rows;
use crate::cpu::element::{Element, Output};
use crate::cpu::math::{LANES, Real};
use std::ops::Range;

/// An upstream gradient over the denominator. That is 0 where the rows that count weigh nothing: then no gradient goes
/// out of this loss, and what else was added to it keeps its own.
pub(crate) fn over_denominator<A: Real>(upstream: A, denominator: A) -> A {
    if denominator == A::ZERO { A::ZERO } else { upstream / denominator }
}

/// Classes in a tile; fewer under Miri, which takes a thousand times as long.
pub(crate) const DEPTH: usize = if cfg!(miri) { 4 } else { 64 };
/// Classes in a block.
pub(crate) const BLOCK: usize = LANES * DEPTH;
/// Rows of more classes than this are worked through in blocks.
const TILE_MAX_CLASSES: usize = 64;
/// Classes a task takes where there are fewer rows than would keep all threads busy.
pub(crate) const SEGMENT: usize = if cfg!(miri) { BLOCK } else { 8 * BLOCK };
/// Fewer rows than this are split into segments if they are long.
const FEW_ROWS: usize = 16;

pub(crate) type Tile<A> = [[A; LANES]; DEPTH];

/// How the work is divided: by the shape alone, so that the bits of a result don't depend on the number of threads.
#[derive(Clone, Copy)]
pub(crate) enum Division {
    /// A unit is a [`Strip`]: so many whole rows, or one of so many segments of a row.
    Strips { rows: usize, segments: usize },
    /// A unit is [`LANES`] rows.
    Tiles,
}

impl Division {
    pub fn of(rows: &Rows) -> Self {
        let Rows { classes, class_stride, .. } = *rows;
        if class_stride != 1 || classes <= TILE_MAX_CLASSES {
            return Division::Tiles;
        }
        let split = rows.count() < FEW_ROWS && classes > 2 * SEGMENT;
        Division::Strips {
            rows: (BLOCK / classes).clamp(1, LANES),
            segments: if split { classes.div_ceil(SEGMENT) } else { 1 },
        }
    }

    pub fn units(self, of: &Rows) -> usize {
        match self {
            Division::Strips { rows, segments } => of.count().div_ceil(rows) * segments,
            Division::Tiles => of.count().div_ceil(LANES),
        }
    }

    /// Into how many units a row is divided.
    pub fn segments(self) -> usize {
        match self {
            Division::Strips { segments, .. } => segments,
            Division::Tiles => 1,
        }
    }
}

/// Some classes of some rows: one row, or all classes of rows that together are a block at most.
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
}

/// Where the rows of a tile are read and written.
pub(crate) struct TilePlace {
    pub first: usize,
    pub lanes: usize,
    pub read: [usize; LANES],
    pub write: [usize; LANES],
    pub write_stride: usize,
    pub read_adjacent: bool,
    pub write_adjacent: bool,
}

impl TilePlace {
    pub fn new(rows: &Rows, unit: usize) -> Self {
        let first = unit * LANES;
        let lanes = (rows.count() - first).min(LANES);
        let (mut read, mut write) = ([0; LANES], [0; LANES]);
        for lane in 0..lanes {
            read[lane] = rows.start(first + lane);
            write[lane] = rows.written_start(first + lane);
        }
        let adjacent = |at: &[usize; LANES]| (1..lanes).all(|l| at[l] == at[0] + l);
        TilePlace {
            first,
            lanes,
            write_stride: rows.written_stride(),
            // one row alone is better read along its classes
            read_adjacent: lanes > 1 && adjacent(&read),
            write_adjacent: lanes > 1 && adjacent(&write),
            read,
            write,
        }
    }

    pub fn rows(&self) -> Range<usize> {
        self.first..self.first + self.lanes
    }

    /// Writes some classes of a tile.
    ///
    /// # Safety
    /// No slice of these elements is alive, of `out` or of the logits that it replaces.
    pub unsafe fn store<O: Element>(&self, e: &[[O::Acc; LANES]], classes: &Range<usize>, out: &Output<O>) {
        if self.write_adjacent && self.write_stride > 1 {
            for (e, class) in e.iter().zip(classes.clone()) {
                let at = self.write[0] + class * self.write_stride;
                // SAFETY: the elements of one class, of which no slice is alive by this function's contract
                O::narrow(&e[..self.lanes], unsafe { out.slice(at, self.lanes) });
            }
            return;
        }
        let mut row = [O::Acc::ZERO; DEPTH];
        let row = &mut row[..classes.len()];
        for lane in 0..self.lanes {
            let values = e.iter().map(|e| e[lane]);
            if self.write_stride > 1 {
                for (v, class) in values.zip(classes.clone()) {
                    // SAFETY: one element, of which no slice is alive by this function's contract
                    let out = unsafe { out.slice(self.write[lane] + class * self.write_stride, 1) };
                    out[0].write(O::from_acc(v));
                }
                continue;
            }
            // SAFETY: the elements of one row, of which no slice is alive by this function's contract
            let out = unsafe { out.slice(self.write[lane] + classes.start, classes.len()) };
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
