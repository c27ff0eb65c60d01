//! How the logits of rows and their target distribution are read.

use crate::cpu::element::{Element, Input, Source};
use crate::cpu::math::{Ahead, LANES, Real, ScaleAndCap, dispatch};
use crate::rows::cpu::{ROW_BLOCKS, Tile, TilePlace};
use crate::rows::layout::{Rows, Run};
use std::ops::Range;

/// The memory in which a unit of work reads logits and q, and computes what it emits: its tiles, or one for a strip's
/// blocks.
pub(super) struct TileScratch<'m, A> {
    pub(super) x: &'m mut [Tile<A>],
    pub(super) q: &'m mut [Tile<A>],
    /// A block on its way to a type that the vectorised loops can't write.
    pub(super) e: &'m mut [Tile<A>],
    /// The soft cap's; none where there is no cap.
    pub(super) slope: &'m mut [Tile<A>],
    /// A strip's exponentials, if its pass keeps them.
    pub(super) powers: &'m mut [Tile<A>],
    /// Of a row's blocks: the maximum that these are relative to.
    pub(super) references: [A; ROW_BLOCKS],
    /// For a block on its way past the cache, and a line.
    pub(super) staged: &'m mut [Tile<A>],
}

/// The weighted, smoothed target distribution q: a number for each class of each row. With class indices, what a row's
/// own class adds to it is kept apart.
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
            TargetDistribution::Dense { source, weight, .. } => {
                source.load(at, dst);
                self.smooth(dst);
                if let Some(weight) = weight {
                    for (d, &w) in dst.iter_mut().zip(&weight[class..]) {
                        *d *= w;
                    }
                }
            }
        }
    }

    /// Smooths probabilities.
    fn smooth(&self, probabilities: &mut [A]) {
        match self {
            // the untouched values must stay exact: 0 stays 0, and 1 stays 1
            TargetDistribution::Dense { keep, spread, .. } if *keep != A::ONE || *spread != A::ZERO => {
                probabilities.iter_mut().for_each(|q| *q = *keep * *q + *spread);
            }
            _ => {}
        }
    }

    /// The q of a unit's tiles, if there is any.
    pub(super) fn load_tiles(&self, place: &TilePlace, classes: &Range<usize>, to: &mut [Tile<A>]) {
        if let TargetDistribution::Dense { source, .. } = self {
            place.load_written(source.as_ref(), classes, to);
            place.fill_rest(to, classes.len(), A::ZERO);
        }
        for to in to.iter_mut().take(place.tiles().count()) {
            let to = &mut to.0[..classes.len()];
            match self {
                TargetDistribution::None => return,
                TargetDistribution::Constant(v) => to.as_flattened_mut().fill(*v),
                TargetDistribution::Weights { factor, weight } => {
                    for (to, &w) in to.iter_mut().zip(&weight[classes.clone()]) {
                        to.fill(*factor * w);
                    }
                }
                TargetDistribution::Dense { weight, .. } => {
                    self.smooth(to.as_flattened_mut());
                    for (to, &w) in to.iter_mut().zip(weight.iter().flat_map(|weight| &weight[classes.clone()])) {
                        to.iter_mut().for_each(|q| *q *= w);
                    }
                }
            }
        }
    }
}

/// The logits and how a pass reads them.
pub(super) struct Logits<'a, T: Element> {
    pub(super) x: Input<'a, T>,
    pub(super) rows: Rows,
    /// The logit scale ahead of a soft cap; without one, its sign.
    pub(super) scale: T::Acc,
    pub(super) softcap: Option<T::Acc>,
    /// What is left of the scale, a factor of differences of logits: they don't overflow, and have no rounding to lose.
    pub(super) factor: T::Acc,
}

impl<'a, T: Element> Logits<'a, T> {
    /// The logits from a class of a row on, which may be those of the next row.
    pub(super) fn after(&self, row: usize, class: usize) -> Ahead<T> {
        self.x.ahead(self.rows.start(row) + class)
    }

    /// Scale, then soft cap; `slope` gets the soft cap's derivative.
    fn transform(&self, xs: &mut [T::Acc], slope: Option<&mut [T::Acc]>) {
        if self.is_transformed() {
            dispatch(ScaleAndCap { scale: self.scale, cap: self.softcap, xs, slope });
        }
    }

    fn is_transformed(&self) -> bool {
        self.softcap.is_some() || self.scale != T::Acc::ONE
    }

    /// A logit of each of up to [`LANES`] adjacent rows, after scale and soft cap.
    ///
    /// # Safety
    /// As for [`Self::stored`].
    pub(super) unsafe fn pick(&self, rows: Range<usize>, classes: &[usize; LANES]) -> [T::Acc; LANES] {
        let mut xs = [T::Acc::ZERO; LANES];
        let (stride, (step, _)) = (self.rows.class_stride, self.rows.steps());
        for Run { rows: lanes, read, .. } in self.rows.runs(rows) {
            for (i, (x, &class)) in xs[lanes.clone()].iter_mut().zip(&classes[lanes]).enumerate() {
                // SAFETY: nobody writes the logit meanwhile, by this function's contract
                *x = unsafe { self.x.slice(read + i * step + class * stride, 1) }[0].to_acc();
            }
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

    /// The tiles of a unit; the lanes without a row are -inf.
    ///
    /// # Safety
    /// As for [`Self::load`], of all the tiles' logits.
    pub(super) unsafe fn load_tiles(
        &self,
        place: &TilePlace,
        classes: &Range<usize>,
        to: &mut [Tile<T::Acc>],
        mut slope: Option<&mut [Tile<T::Acc>]>,
    ) {
        // SAFETY: this function has the same contract
        unsafe { place.load(&self.x, classes, to) };
        for (i, to) in to[..place.tiles().count()].iter_mut().enumerate() {
            let slope = slope.as_mut().map(|slope| slope[i].0[..classes.len()].as_flattened_mut());
            self.transform(to.0[..classes.len()].as_flattened_mut(), slope);
        }
        place.fill_rest(to, classes.len(), T::Acc::NEG_INFINITY);
    }
}
