//! How the logits of rows and their target distribution are read.

use crate::cpu::element::{Element, Input, Source};
use crate::cpu::math::{Ahead, LANES, Real, ScaleAndCap, dispatch};
use crate::rows::cpu::{DEPTH, Tile, TilePlace};
use crate::rows::layout::Rows;
use std::ops::Range;

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

    /// The q of a tile; `None` where there is none.
    pub(super) fn load_tile<'s>(
        &self,
        place: &TilePlace,
        classes: &Range<usize>,
        to: &'s mut Tile<A>,
    ) -> Option<&'s [[A; LANES]]> {
        let to = &mut to[..classes.len()];
        match self {
            TargetDistribution::None => return None,
            TargetDistribution::Constant(v) => to.as_flattened_mut().fill(*v),
            TargetDistribution::Weights { factor, weight } => {
                for (to, &w) in to.iter_mut().zip(&weight[classes.clone()]) {
                    to.fill(*factor * w);
                }
            }
            TargetDistribution::Dense { .. } => {
                to.iter_mut().for_each(|to| to[place.lanes..].fill(A::ZERO));
                let mut row = [A::ZERO; DEPTH];
                let row = &mut row[..classes.len()];
                for lane in 0..place.lanes {
                    let at = place.write[lane] + classes.start * place.write_stride;
                    match place.write_stride {
                        1 => self.load(at, classes.start, row),
                        stride => row.iter_mut().enumerate().for_each(|(i, v)| {
                            self.load(at + i * stride, classes.start + i, std::slice::from_mut(v));
                        }),
                    }
                    for (to, &v) in to.iter_mut().zip(row.iter()) {
                        to[lane] = v;
                    }
                }
            }
        }
        Some(to)
    }
}

/// The logits and how a pass reads them.
pub(super) struct Logits<'a, T: Element> {
    pub(super) x: Input<'a, T>,
    pub(super) rows: Rows,
    pub(super) scale: T::Acc,
    pub(super) softcap: Option<T::Acc>,
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
        for ((x, row), &class) in xs.iter_mut().zip(rows).zip(classes) {
            let at = self.rows.start(row) + class * self.rows.class_stride;
            // SAFETY: nobody writes the logit meanwhile, by this function's contract
            *x = unsafe { self.x.slice(at, 1) }[0].to_acc();
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
