//! How the logits of rows are read and where what is made of them is written.

use super::kernels::Transform;
use crate::cpu::element::{Element, Input, Output, Source};
use crate::cpu::math::{Ahead, LANES, Real, dispatch};
use crate::rows::layout::Rows;
use std::ops::Range;

/// Classes in a tile.
pub(super) const DEPTH: usize = 64;
/// Classes in a block.
pub(super) const BLOCK: usize = LANES * DEPTH;
/// Rows of more classes than this are worked through in blocks.
const TILE_MAX_CLASSES: usize = 64;
/// Classes a task takes where there are fewer rows than would keep all threads busy.
const SEGMENT: usize = 8 * BLOCK;
/// Fewer rows than this are split into segments if they are long.
const FEW_ROWS: usize = 16;

pub(super) type Tile<A> = [[A; LANES]; DEPTH];

/// The memory in which a unit of work reads logits and q, and computes what it emits.
pub(super) struct TileScratch<A> {
    pub(super) x: Tile<A>,
    pub(super) e: Tile<A>,
    pub(super) q: Tile<A>,
    pub(super) slope: Tile<A>,
}

impl<A: Real> TileScratch<A> {
    pub(super) fn new() -> Self {
        let tile = [[A::ZERO; LANES]; DEPTH];
        TileScratch { x: tile, e: tile, q: tile, slope: tile }
    }
}

/// The weighted, smoothed target distribution q: a number for each class of each row. With class indices, what a row's own class
/// adds to it is kept apart.
pub(super) enum TargetDistribution<'a, A> {
    None,
    Constant(A),
    /// `factor * weight[c]`
    Weights {
        factor: A,
        weight: &'a [A],
    },
    /// `(keep * source + spread) * weight[c]`, read in the order in which gradients are written
    Dense {
        source: Box<dyn Source<A> + 'a>,
        keep: A,
        spread: A,
        weight: Option<&'a [A]>,
    },
}

impl<A: Real> TargetDistribution<'_, A> {
    pub(super) fn is_none(&self) -> bool {
        matches!(self, TargetDistribution::None)
    }

    /// The q of a class, without that of probability targets.
    pub(super) fn at(&self, class: usize) -> A {
        match self {
            TargetDistribution::Constant(v) => *v,
            TargetDistribution::Weights { factor, weight } => *factor * weight[class],
            TargetDistribution::None | TargetDistribution::Dense { .. } => A::ZERO,
        }
    }

    /// As [`Self::load`]; `None` where there is no q.
    pub(super) fn load_block<'s>(&self, at: usize, class: usize, to: &'s mut [A]) -> Option<&'s [A]> {
        if self.is_none() {
            return None;
        }
        self.load(at, class, to);
        Some(to)
    }

    /// The values of adjacent elements in the written order, all of one row: `at` is the first one's position and
    /// `class` its class.
    pub(super) fn load(&self, at: usize, class: usize, dst: &mut [A]) {
        match self {
            TargetDistribution::None => {}
            TargetDistribution::Constant(v) => dst.fill(*v),
            TargetDistribution::Weights { factor, weight } => {
                for (d, &w) in dst.iter_mut().zip(&weight[class..]) {
                    *d = *factor * w;
                }
            }
            TargetDistribution::Dense { source, keep, spread, weight } => {
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

    /// As [`Self::load`], of elements that are `stride` apart.
    pub(super) fn load_apart(&self, at: usize, stride: usize, class: usize, dst: &mut [A]) {
        if stride == 1 {
            return self.load(at, class, dst);
        }
        for (i, d) in dst.iter_mut().enumerate() {
            self.load(at + i * stride, class + i, std::slice::from_mut(d));
        }
    }
}

/// The logits and how a pass reads them.
pub(super) struct Logits<'a, T: Element> {
    pub(super) x: Input<'a, T>,
    pub(super) rows: Rows,
    pub(super) scale: T::Acc,
    pub(super) softcap: Option<T::Acc>,
}

/// How the work is divided: by the shape alone, so that the bits of a result don't depend on the number of threads.
#[derive(Clone, Copy)]
pub(super) enum Division {
    /// A unit is a [`Strip`]: so many whole rows, or one of so many segments of a row.
    Strips { rows: usize, segments: usize },
    /// A unit is [`LANES`] rows.
    Tiles,
}

impl Division {
    pub(super) fn units(self, of: &Rows) -> usize {
        match self {
            Division::Strips { rows, segments } => of.count().div_ceil(rows) * segments,
            Division::Tiles => of.count().div_ceil(LANES),
        }
    }

    /// Into how many units a row is divided.
    pub(super) fn segments(self) -> usize {
        match self {
            Division::Strips { segments, .. } => segments,
            Division::Tiles => 1,
        }
    }
}

/// Some classes of some rows: one row, or all classes of rows that together are a block at most.
pub(super) struct Strip {
    pub(super) rows: Range<usize>,
    pub(super) classes: Range<usize>,
}

impl Strip {
    pub(super) fn new(unit: usize, rows: usize, segments: usize, of: &Rows) -> Self {
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

impl<'a, T: Element> Logits<'a, T> {
    pub(super) fn division(&self) -> Division {
        let Rows { classes, class_stride, .. } = self.rows;
        if class_stride != 1 || classes <= TILE_MAX_CLASSES {
            return Division::Tiles;
        }
        let split = self.rows.count() < FEW_ROWS && classes > 2 * SEGMENT;
        Division::Strips {
            rows: (BLOCK / classes).clamp(1, LANES),
            segments: if split { classes.div_ceil(SEGMENT) } else { 1 },
        }
    }

    /// The logits from a class of a row on, which may be those of the next row.
    pub(super) fn after(&self, row: usize, class: usize) -> Ahead<T> {
        self.x.ahead(self.rows.start(row) + class)
    }

    /// Scale, then soft cap; `slope` gets the soft cap's derivative.
    fn transform(&self, xs: &mut [T::Acc], slope: Option<&mut [T::Acc]>) {
        if self.is_transformed() {
            dispatch(Transform { scale: self.scale, softcap: self.softcap, xs, slope });
        }
    }

    fn is_transformed(&self) -> bool {
        self.softcap.is_some() || self.scale != T::Acc::ONE
    }

    /// One logit as it is stored.
    ///
    /// # Safety
    /// As for [`Self::stored`].
    #[inline(always)]
    unsafe fn stored_one(&self, row: usize, class: usize) -> T::Acc {
        let at = self.rows.start(row) + class * self.rows.class_stride;
        // SAFETY: nobody writes the logit meanwhile, by this function's contract
        let logit = unsafe { self.x.slice(at, 1) };
        logit[0].to_acc()
    }

    /// One logit after scale and soft cap, and the soft cap's derivative.
    ///
    /// # Safety
    /// As for [`Self::stored`].
    pub(super) unsafe fn get(&self, row: usize, class: usize) -> (T::Acc, T::Acc) {
        // SAFETY: this function has the same contract
        let x = unsafe { self.stored_one(row, class) };
        if !self.is_transformed() {
            return (x, T::Acc::ONE);
        }
        let (mut x, mut slope) = ([x], [T::Acc::ONE]);
        self.transform(&mut x, Some(&mut slope));
        (x[0], slope[0])
    }

    /// A logit of each of up to [`LANES`] adjacent rows, after scale and soft cap.
    ///
    /// # Safety
    /// As for [`Self::stored`].
    pub(super) unsafe fn pick(&self, rows: Range<usize>, classes: &[usize; LANES]) -> [T::Acc; LANES] {
        let mut xs = [T::Acc::ZERO; LANES];
        for ((x, row), &class) in xs.iter_mut().zip(rows).zip(classes) {
            // SAFETY: this function has the same contract
            *x = unsafe { self.stored_one(row, class) };
        }
        self.transform(&mut xs, None);
        xs
    }

    /// Whether the vectorised loops can take the logits as they are stored.
    pub(super) fn is_read_directly(&self) -> bool {
        T::INLINE && !self.is_transformed()
    }

    /// Adjacent classes of a row, as they are stored.
    ///
    /// # Safety
    /// Where the logits are replaced in place, nobody writes these ones as long as the slice is alive.
    pub(super) unsafe fn stored(&self, row: usize, classes: &Range<usize>) -> &[T] {
        // SAFETY: this function has the same contract
        unsafe { self.x.slice(self.rows.start(row) + classes.start, classes.len()) }
    }

    /// Loads adjacent classes of a row from `class` on.
    ///
    /// # Safety
    /// Where the logits are replaced in place, nobody writes these ones meanwhile.
    pub(super) unsafe fn load(&self, row: usize, class: usize, to: &mut [T::Acc], slope: Option<&mut [T::Acc]>) {
        // SAFETY: the slice ends with this statement, during which nobody writes by this function's contract
        T::widen(unsafe { self.stored(row, &(class..class + to.len())) }, to);
        self.transform(to, slope);
    }

    /// A tile of `lanes` rows and `classes`; the lanes without a row are -inf.
    ///
    /// # Safety
    /// As for [`Self::load`], of all the tile's logits.
    pub(super) unsafe fn tile<'s>(
        &self,
        place: &TilePlace,
        classes: &Range<usize>,
        to: &'s mut Tile<T::Acc>,
        slope: Option<&mut Tile<T::Acc>>,
    ) -> &'s [[T::Acc; LANES]] {
        let stride = self.rows.class_stride;
        let depth = classes.len();
        if place.lanes < LANES {
            to[..depth].as_flattened_mut().fill(T::Acc::NEG_INFINITY);
        }
        if place.read_adjacent {
            for (to, class) in to.iter_mut().zip(classes.clone()) {
                // SAFETY: the logits of the tile's rows, which nobody writes by this function's contract
                let src = unsafe { self.x.slice(place.read[0] + class * stride, place.lanes) };
                T::widen(src, &mut to[..place.lanes]);
            }
        } else {
            let mut lane = 0;
            // several rows at a time, which are one store
            while stride == 1 && lane + 4 <= place.lanes {
                // SAFETY: the logits of one of the tile's rows, which nobody writes by this function's contract
                let row = |lane: usize| unsafe { self.x.slice(place.read[lane] + classes.start, depth) };
                let rows = row(lane).iter().zip(row(lane + 1)).zip(row(lane + 2)).zip(row(lane + 3));
                for (to, (((a, b), c), d)) in to.iter_mut().zip(rows) {
                    to[lane..lane + 4].copy_from_slice(&[a.to_acc(), b.to_acc(), c.to_acc(), d.to_acc()]);
                }
                lane += 4;
            }
            for lane in lane..place.lanes {
                let start = place.read[lane] + classes.start * stride;
                // SAFETY: the logits of one of the tile's rows, which nobody writes by this function's contract
                let row = unsafe { self.x.strided(start, stride, depth) };
                to.iter_mut().zip(row).for_each(|(to, x)| to[lane] = x.to_acc());
            }
        }
        if self.is_transformed() {
            self.transform(to[..depth].as_flattened_mut(), slope.map(|s| s[..depth].as_flattened_mut()));
            if place.lanes < LANES {
                for to in &mut to[..depth] {
                    to[place.lanes..].fill(T::Acc::NEG_INFINITY);
                }
            }
        }
        &to[..depth]
    }
}

/// Where the rows of a tile are read and written.
pub(super) struct TilePlace {
    pub(super) first: usize,
    pub(super) lanes: usize,
    pub(super) read: [usize; LANES],
    pub(super) write: [usize; LANES],
    pub(super) write_stride: usize,
    pub(super) read_adjacent: bool,
    pub(super) write_adjacent: bool,
}

impl TilePlace {
    pub(super) fn new(rows: &Rows, unit: usize) -> Self {
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

    pub(super) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.lanes
    }

    /// The q of a tile; `None` where there is none.
    pub(super) fn load_q<'s, A: Real>(
        &self,
        q: &TargetDistribution<A>,
        classes: &Range<usize>,
        to: &'s mut Tile<A>,
    ) -> Option<&'s [[A; LANES]]> {
        let to = &mut to[..classes.len()];
        match q {
            TargetDistribution::None => return None,
            TargetDistribution::Constant(v) => to.as_flattened_mut().fill(*v),
            TargetDistribution::Weights { factor, weight } => {
                for (to, &w) in to.iter_mut().zip(&weight[classes.clone()]) {
                    to.fill(*factor * w);
                }
            }
            TargetDistribution::Dense { .. } => {
                to.iter_mut().for_each(|to| to[self.lanes..].fill(A::ZERO));
                let mut row = [A::ZERO; DEPTH];
                let row = &mut row[..classes.len()];
                for lane in 0..self.lanes {
                    let at = self.write[lane] + classes.start * self.write_stride;
                    q.load_apart(at, self.write_stride, classes.start, row);
                    for (to, &v) in to.iter_mut().zip(row.iter()) {
                        to[lane] = v;
                    }
                }
            }
        }
        Some(to)
    }

    /// Writes some classes of a tile.
    ///
    /// # Safety
    /// No slice of these elements is alive, of `out` or of the logits that it replaces.
    pub(super) unsafe fn store<O: Element>(&self, e: &[[O::Acc; LANES]], classes: &Range<usize>, out: &Output<O>) {
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
