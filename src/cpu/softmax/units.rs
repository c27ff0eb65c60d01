//! The units of work: segments of rows and tiles of rows, read in pieces that fit into the scratch memory, handed to the
//! vectorised loops, and written.

use super::kernels::{Detail, Emit, EmitBlock, EmitTile, ReduceBlocks, ReduceTile, RowScalars, States};
use super::rows::{BLOCK, DEPTH, Extra, LANES, Logits, Place, Scratch, Strip};
use crate::cpu::element::{Element, Output, as_uninit};
use crate::cpu::math::{Real, dispatch};
use std::ops::Range;

/// What a pass reads.
pub(super) struct Operands<'k, 'a, T: Element> {
    pub(super) logits: &'k Logits<'a, T>,
    pub(super) extra: &'k Extra<'a, T::Acc>,
}

impl<T: Element> Operands<'_, '_, T> {
    pub(super) fn reduce_strip(&self, detail: Detail, strip: &Strip, scratch: &mut Scratch<T::Acc>) -> States<T::Acc> {
        let mut states = States::EMPTY;
        let Scratch { x, extra: q, .. } = scratch;
        let (x, q) = (x.as_flattened_mut(), q.as_flattened_mut());
        let (rows, of) = (&strip.rows, &strip.classes);
        for class in of.clone().step_by(BLOCK) {
            let block = class..(class + BLOCK).min(of.end);
            let (mut xs, mut qs): ([&[_]; LANES], [&[_]; LANES]) = ([&[]; LANES], [&[]; LANES]);
            let pieces = x.chunks_mut(block.len()).zip(q.chunks_mut(block.len()));
            for ((row, (x, q)), (xs, qs)) in rows.clone().zip(pieces).zip(xs.iter_mut().zip(&mut qs)) {
                *xs = self.logits.block(row, class, x, None);
                *qs = self.extra.load_block(row * self.logits.rows.classes + class, class, q).unwrap_or(&[]);
            }
            dispatch(ReduceBlocks {
                states: &mut states,
                next: self.logits.after(rows.end - 1, block.end),
                xs: &xs[..rows.len()],
                q: (!self.extra.is_none()).then_some(&qs[..rows.len()]),
                block,
                of: of.clone(),
                detail,
            });
        }
        states
    }

    pub(super) fn reduce_tile(&self, detail: Detail, place: &Place, scratch: &mut Scratch<T::Acc>) -> States<T::Acc> {
        let mut states = States::EMPTY;
        let Scratch { x, extra: q, .. } = scratch;
        let of = self.logits.rows.classes;
        for class in (0..of).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(of);
            let xs = self.logits.tile(place, &classes, x, None);
            let q = place.load_extra(self.extra, &classes, q);
            dispatch(ReduceTile { states: &mut states, classes, of, xs, q, detail });
        }
        states
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn emit_segment<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &RowScalars<T::Acc>,
        row: usize,
        classes: Range<usize>,
        out: &Output<O>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let capped = E::IN_LOGITS && self.logits.softcap.is_some();
        let Scratch { x, e, extra: q, slope } = scratch;
        let (x, e, q, slope) =
            (x.as_flattened_mut(), e.as_flattened_mut(), q.as_flattened_mut(), slope.as_flattened_mut());
        for class in classes.clone().step_by(BLOCK) {
            let len = (classes.end - class).min(BLOCK);
            let at = row * self.logits.rows.classes + class;
            if !scalars.live {
                // SAFETY: each segment of each row is emitted by one unit
                unsafe { out.slice(at, len) }.fill(std::mem::MaybeUninit::new(O::from_acc(T::Acc::ZERO)));
                continue;
            }
            let slope = &mut slope[..len];
            let xs = self.logits.block(row, class, &mut x[..len], Some(slope));
            let q = self.extra.load_block(at, class, &mut q[..len]);
            let slope = capped.then_some(&*slope);
            // SAFETY: as above, and in place `xs` is a copy
            let out = unsafe { out.slice(at, len) };
            if let Some(out) = O::as_acc_mut(out) {
                dispatch(EmitBlock { emit, scalars, xs, q, slope, out });
                continue;
            }
            let e = &mut e[..len];
            dispatch(EmitBlock { emit, scalars, xs, q, slope, out: as_uninit(e) });
            O::narrow(e, out);
        }
    }

    /// `own`: a class of each row and what is added to its extra number. `reduced`: whether the scratch memory is as
    /// [`Self::reduce_tile`] of the same tile left it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn emit_tile<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &[RowScalars<T::Acc>; LANES],
        place: &Place,
        own: &[Option<(usize, T::Acc)>; LANES],
        reduced: bool,
        out: &Output<O>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let capped = E::IN_LOGITS && self.logits.softcap.is_some();
        let Scratch { x, e, extra: q, slope } = scratch;
        let of = self.logits.rows.classes;
        let loaded = reduced && of <= DEPTH && !capped;
        let has_own = own.iter().any(Option::is_some);
        for class in (0..of).step_by(DEPTH) {
            let classes = class..(class + DEPTH).min(of);
            if !loaded {
                self.logits.tile(place, &classes, x, Some(slope));
                place.load_extra(self.extra, &classes, q);
            }
            if has_own {
                if self.extra.is_none() {
                    q[..classes.len()].as_flattened_mut().fill(T::Acc::ZERO);
                }
                for (lane, own) in own.iter().enumerate() {
                    if let Some((class, weight)) = own
                        && classes.contains(class)
                    {
                        q[class - classes.start][lane] += *weight;
                    }
                }
            }
            let xs = &x[..classes.len()];
            let q = (has_own || !self.extra.is_none()).then_some(&q[..classes.len()]);
            let slope = capped.then_some(&slope[..]);
            let e = &mut e[..classes.len()];
            dispatch(EmitTile { emit, scalars, xs, q, slope, out: e });
            place.store(e, &classes, out);
        }
    }
}

impl Place {
    /// Writes some classes of a tile.
    fn store<O: Element>(&self, e: &[[O::Acc; LANES]], classes: &Range<usize>, out: &Output<O>) {
        if self.write_adjacent && self.write_stride > 1 {
            for (e, class) in e.iter().zip(classes.clone()) {
                let at = self.write[0] + class * self.write_stride;
                // SAFETY: each row is emitted by one unit, after its logits were copied into the scratch
                O::narrow(&e[..self.lanes], unsafe { out.slice(at, self.lanes) });
            }
            return;
        }
        let mut row = [O::Acc::ZERO; DEPTH];
        let row = &mut row[..classes.len()];
        for lane in 0..self.lanes {
            for (v, e) in row.iter_mut().zip(e) {
                *v = e[lane];
            }
            if self.write_stride == 1 {
                // SAFETY: as above
                O::narrow(row, unsafe { out.slice(self.write[lane] + classes.start, row.len()) });
            } else {
                for (v, class) in row.iter().zip(classes.clone()) {
                    // SAFETY: as above
                    let out = unsafe { out.slice(self.write[lane] + class * self.write_stride, 1) };
                    out[0].write(O::from_acc(*v));
                }
            }
        }
    }
}
