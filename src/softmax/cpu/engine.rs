//! Passes over all rows, cut into units of work that run in parallel: segments of rows and tiles of rows, read in
//! pieces that fit into the scratch memory, handed to the vectorised loops, and written.

use super::kernels::{
    CompleteStrip, Emit, EmitBlock, EmitTile, ReduceStrip, ReduceTile, RowDetail, RowScalars, RowTargets, States,
    StripBlocks, with_scale,
};
use super::logits::{Logits, TargetDistribution, TileScratch};
use crate::cpu::element::{Element, Output, PerRow, as_uninit, build};
use crate::cpu::math::{Baseline, LANES, Real, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::rows::cpu::{BLOCK, Division, Strip, Tile, TilePlace, with_tiles};
use candle_core::CpuStorage;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The numbers and the targets of up to [`LANES`] adjacent rows, from which a pass emits their values.
#[derive(Clone, Copy)]
pub(super) struct RowGroup<A> {
    pub(super) scalars: RowScalars<[A; LANES]>,
    pub(super) targets: RowTargets<A>,
}

/// The operands of passes, and how their work is divided.
#[derive(Clone, Copy)]
pub(super) struct Engine<'k, 'a, T: Element> {
    logits: &'k Logits<'a, T>,
    q: &'k TargetDistribution<'a, T::Acc>,
    division: Division,
}

/// The work of a logit in a pass that reduces, and in one that emits a value for it.
const REDUCE_WORK: usize = 1;
const EMIT_WORK: usize = 2;

impl<'k, 'a, T: Element> Engine<'k, 'a, T> {
    pub(super) fn new(logits: &'k Logits<'a, T>, q: &'k TargetDistribution<'a, T::Acc>) -> Self {
        Engine { logits, q, division: Division::of(&logits.rows) }
    }

    /// Units of work, and the logits in each.
    fn units(&self) -> (usize, usize) {
        let rows = &self.logits.rows;
        let units = self.division.units(rows);
        (units, (rows.count() * rows.classes / units.max(1)).max(1))
    }

    /// Calls `work` with scratch memory for a unit.
    fn with_scratch(&self, work: impl FnOnce(&mut TileScratch<T::Acc>)) {
        let count = self.division.held();
        let capped = if self.logits.softcap.is_some() { count } else { 0 };
        with_tiles(2 * count + 1 + capped, |tiles| {
            let (x, tiles) = tiles.split_at_mut(count);
            let (q, tiles) = tiles.split_at_mut(count);
            let (e, slope) = tiles.split_at_mut(1);
            work(&mut TileScratch { x, q, e, slope });
        });
    }

    /// Reduces every row, and calls `finish` with the states of up to [`LANES`] adjacent rows: once for each row, and
    /// only for different rows at the same time.
    pub(super) fn reduce(&self, detail: RowDetail, finish: impl Fn(Range<usize>, &States<T::Acc>) + Sync) {
        let (units, logits) = self.units();
        let segments = self.division.segments();
        // where a unit is only a part of a row
        let mut parts = vec![States::EMPTY; if segments > 1 { units } else { 0 }];
        let written_parts = PerRow::new(&mut parts);
        for_each_task(units, logits * REDUCE_WORK, |units| {
            self.with_scratch(|scratch| {
                let (mut states, mut of_strip) = (vec![], States::EMPTY);
                for unit in units {
                    match self.division {
                        Division::Strips { rows, segments } => {
                            let strip = Strip::new(unit, rows, segments, &self.logits.rows);
                            self.reduce_strip(detail, &strip, &mut of_strip, scratch);
                            if segments == 1 {
                                finish(strip.rows, &of_strip);
                            } else {
                                // SAFETY: this task alone has the unit
                                unsafe { written_parts.set(unit..unit + 1, &[of_strip]) };
                            }
                        }
                        Division::Tiles { tiles, .. } => {
                            // nothing is emitted from the logits of a piece after the next one is read
                            let place = TilePlace::new(&self.logits.rows, unit, (tiles, 1));
                            self.reduce_tiles(Some(detail), &place, &mut states, scratch);
                            place.tiles().zip(&states).for_each(|(rows, states)| finish(rows, states));
                        }
                    }
                }
            });
        });
        for (row, parts) in parts.chunks_mut(segments).enumerate() {
            let Some((states, next)) = parts.split_first_mut() else { continue };
            next.iter().for_each(|next| states.merge(next));
            finish(row..row + 1, states);
        }
    }

    /// The values of all logits, in the order that [`Rows::class_last`](crate::rows::layout::Rows::class_last) says:
    /// see [`Self::emit_to`].
    pub(super) fn emit<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        reduce: Option<RowDetail>,
        emit: &E,
        group: impl Fn(Range<usize>, &States<T::Acc>) -> RowGroup<T::Acc> + Sync,
    ) -> CpuStorage {
        let len = self.logits.rows.count() * self.logits.rows.classes;
        // SAFETY: the output is a buffer of its own, with an element for each logit, and `emit_to` initialises them
        let values: Vec<O> = unsafe { build(len, |out| self.emit_to(reduce, emit, group, out)) };
        O::to_cpu_storage_owned(values)
    }

    /// Emits a value for every logit from the group of its row. With `reduce`, the rows are reduced first, unit by
    /// unit, so that a row is in the cache when its values are emitted; without it the states are empty. `group` is
    /// called as `finish` of [`Self::reduce`] is.
    ///
    /// # Safety
    /// As for [`Self::emit_units`].
    pub(super) unsafe fn emit_to<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        reduce: Option<RowDetail>,
        emit: &E,
        group: impl Fn(Range<usize>, &States<T::Acc>) -> RowGroup<T::Acc> + Sync,
        out: &Output<O>,
    ) {
        let Some(detail) = reduce.filter(|_| self.division.segments() > 1) else {
            // SAFETY: this function has the same contract
            return unsafe { self.emit_units(reduce, emit, group, out) };
        };
        // several tasks emit a row: it is reduced ahead of them
        let empty = RowGroup { scalars: RowScalars::default(), targets: RowTargets::NONE };
        let mut groups = vec![empty; self.logits.rows.count()];
        let written_groups = PerRow::new(&mut groups);
        self.reduce(detail, |rows, states| {
            // SAFETY: `reduce` finishes a row once, and a strip of segments is one row
            unsafe { written_groups.set(rows.start..rows.start + 1, &[group(rows, states)]) }
        });
        // SAFETY: this function has the same contract
        unsafe { self.emit_units(None, emit, |rows, _| groups[rows.start], out) }
    }

    /// As [`Self::emit_to`], where no row that is reduced is divided into segments.
    ///
    /// # Safety
    /// Nobody else reads or writes the output, or the logits where it replaces them, and the output has an element for
    /// each logit. All are initialised then.
    unsafe fn emit_units<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        reduce: Option<RowDetail>,
        emit: &E,
        group: impl Fn(Range<usize>, &States<T::Acc>) -> RowGroup<T::Acc> + Sync,
        out: &Output<O>,
    ) {
        let (units, logits) = self.units();
        for_each_task(units, logits * EMIT_WORK, |units| {
            self.with_scratch(|scratch| {
                let (mut states, mut of_strip, mut groups) = (vec![], States::EMPTY, vec![]);
                for unit in units {
                    match self.division {
                        Division::Strips { rows, segments } => {
                            let strip = Strip::new(unit, rows, segments, &self.logits.rows);
                            if let Some(detail) = reduce {
                                self.reduce_strip(detail, &strip, &mut of_strip, scratch);
                            }
                            let group = group(strip.rows.clone(), &of_strip);
                            for (lane, row) in strip.rows.enumerate() {
                                self.emit_row(emit, (&group, lane), (row, &strip.classes), out, scratch);
                            }
                        }
                        Division::Tiles { tiles, depths } => {
                            // what is read once needs no memory of its own
                            let depths = if reduce.is_some() { depths } else { 1 };
                            let place = TilePlace::new(&self.logits.rows, unit, (tiles, depths));
                            self.reduce_tiles(reduce, &place, &mut states, scratch);
                            groups.clear();
                            groups.extend(place.tiles().zip(&states).map(|(rows, states)| group(rows, states)));
                            self.emit_tiles(emit, &groups, (&place, reduce.is_some()), out, scratch);
                        }
                    }
                }
            });
        });
    }

    fn reduce_strip(
        &self,
        detail: RowDetail,
        strip: &Strip,
        states: &mut States<T::Acc>,
        scratch: &mut TileScratch<T::Acc>,
    ) {
        *states = States { scale: self.logits.factor, ..States::EMPTY };
        let TileScratch { x, q, .. } = scratch;
        let (x, q) = (Tile::block(x), Tile::block(q));
        let of = &strip.classes;
        for lanes in strip.at_once() {
            let rows = strip.rows.start + lanes.start..strip.rows.start + lanes.end;
            for class in of.clone().step_by(BLOCK) {
                let block = class..(class + BLOCK).min(of.end);
                let len = block.len();
                for (row, q) in rows.clone().zip(q.chunks_mut(len)) {
                    self.q.load(row * self.logits.rows.classes + class, class, q);
                }
                let blocks = StripBlocks {
                    states,
                    lanes: lanes.clone(),
                    next: self.logits.after(rows.end - 1, block.end),
                    q: (!self.q.is_none()).then_some(&q[..rows.len() * len]),
                    block: block.clone(),
                    of: of.clone(),
                    detail,
                };
                if detail == RowDetail::Mass || self.logits.is_read_directly() {
                    // SAFETY: a row's values are emitted by this task after it is reduced, or by others in a later pass
                    self.reduce_blocks(blocks, |row| unsafe { self.logits.stored(rows.start + row, &block) });
                    continue;
                }
                for (row, x) in rows.clone().zip(x.chunks_mut(len)) {
                    // SAFETY: a row's values are emitted by this task after it is reduced, or by others in a later pass
                    unsafe { self.logits.load(row, class, x, None) };
                }
                let x = &*x;
                self.reduce_blocks(blocks, |row| &x[row * len..][..len]);
            }
        }
        dispatch(CompleteStrip { states, rows: strip.rows.len() });
    }

    fn reduce_blocks<'x, S: Element<Acc = T::Acc>>(
        &self,
        blocks: StripBlocks<'x, T::Acc, T>,
        xs: impl Fn(usize) -> &'x [S],
    ) {
        with_scale!(self.logits.factor, scale => dispatch(ReduceStrip { scale, blocks, xs }));
    }

    /// Reduces the rows of a unit's tiles, to states for each; without a detail these are empty.
    fn reduce_tiles(
        &self,
        detail: Option<RowDetail>,
        place: &TilePlace,
        states: &mut Vec<States<T::Acc>>,
        scratch: &mut TileScratch<T::Acc>,
    ) {
        let TileScratch { x, q, .. } = scratch;
        let of = self.logits.rows.classes;
        states.clear();
        states.resize(place.tiles().count(), States { scale: self.logits.factor, ..States::EMPTY });
        let Some(detail) = detail else { return };
        for (classes, held) in place.pieces() {
            let (depth, x, q) = (classes.len(), &mut x[held.clone()], &mut q[held]);
            // SAFETY: the values of the rows are emitted by this task after they are reduced, or in a later pass
            unsafe { self.logits.load_tiles(place, &classes, x, None) };
            self.q.load_tiles(place, &classes, q);
            for (states, (x, q)) in states.iter_mut().zip(x.iter().zip(q.iter())) {
                let q = (!self.q.is_none()).then_some(&q.0[..depth]);
                let (classes, xs) = (classes.clone(), &x.0[..depth]);
                with_scale!(self.logits.factor, scale => {
                    dispatch(ReduceTile { scale, states, classes, of, xs, q, detail })
                });
            }
        }
    }

    /// Emits the values of a strip's classes in the row of a lane.
    fn emit_row<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        (group, lane): (&RowGroup<T::Acc>, usize),
        (row, classes): (usize, &Range<usize>),
        out: &Output<O>,
        scratch: &mut TileScratch<T::Acc>,
    ) {
        let start = row * self.logits.rows.classes;
        if !group.targets.live[lane] {
            // SAFETY: each segment of each row is emitted by one unit, which has no slice of it here
            let out = unsafe { out.slice(start + classes.start, classes.len()) };
            return out.fill(MaybeUninit::new(O::from_acc(T::Acc::ZERO)));
        }
        let scalars = group.scalars.lane(lane);
        // in place, the own logit is gone once the segment is written
        let (own, weight) = (group.targets.class[lane], group.targets.weight[lane]);
        let has_own = weight != T::Acc::ZERO && classes.contains(&own);
        let own_value = has_own.then(|| self.own_value(emit, &scalars, row, own, weight));
        let TileScratch { x, e, q, slope } = scratch;
        let [x, e, q, slope] = [x, e, q, slope].map(|tiles| Tile::block(tiles));
        for class in classes.clone().step_by(BLOCK) {
            let len = (classes.end - class).min(BLOCK);
            let at = start + class;
            let (e, q) = (
                e.get_mut(..len).unwrap_or_default(),
                self.q.load_block(at, class, q.get_mut(..len).unwrap_or_default()),
            );
            if self.logits.is_read_directly() && !self.logits.x.is_replaced() {
                // SAFETY: the output is another buffer
                let xs = unsafe { self.logits.stored(row, &(class..class + len)) };
                // SAFETY: each segment of each row is emitted by one unit, and the logits are another buffer
                let out = unsafe { out.slice(at, len) };
                emit_block(EmitBlock { emit, row: scalars, xs, q, slope: None, out }, e);
            } else {
                let (xs, mut slope) = (&mut x[..len], slope.get_mut(..len));
                // SAFETY: this unit alone writes to the segment, and has no slice of it here
                unsafe { self.logits.load(row, class, xs, slope.as_deref_mut()) };
                // SAFETY: each segment of each row is emitted by one unit, and the slice of its logits is gone
                let out = unsafe { out.slice(at, len) };
                emit_block(
                    EmitBlock { emit, row: scalars, xs, q, slope: slope.as_deref().filter(|_| E::IN_LOGITS), out },
                    e,
                );
            }
        }
        if let Some(value) = own_value {
            // SAFETY: each segment of each row is emitted by one unit, and no other slice of it is alive
            unsafe { out.slice(start + own, 1)[0].write(O::from_acc(value)) };
        }
    }

    /// The value of a row's own class, whose weight adds to its q.
    fn own_value<E: Emit<T::Acc>>(
        &self,
        emit: &E,
        scalars: &RowScalars<T::Acc>,
        row: usize,
        class: usize,
        weight: T::Acc,
    ) -> T::Acc {
        let (mut x, mut slope) = ([T::Acc::ZERO], [T::Acc::ONE]);
        // SAFETY: the class is in a segment that this unit alone writes, later
        unsafe { self.logits.load(row, class, &mut x, Some(&mut slope)) };
        emit.value::<Baseline, T::Acc>(scalars, 0, x[0], weight + self.q.at(class)) * slope[0]
    }

    /// The place comes with whether the scratch memory is as [`Self::reduce_tiles`] of it left it.
    fn emit_tiles<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        groups: &[RowGroup<T::Acc>],
        (place, reduced): (&TilePlace, bool),
        out: &Output<O>,
        scratch: &mut TileScratch<T::Acc>,
    ) {
        let capped = E::IN_LOGITS && self.logits.softcap.is_some();
        let TileScratch { x, q, slope, .. } = scratch;
        for (classes, held) in place.pieces() {
            let (depth, x, q) = (classes.len(), &mut x[held.clone()], &mut q[held]);
            if !reduced || !place.keeps_all() || capped {
                // SAFETY: this unit alone writes to the tiles, and has no slice of them here
                unsafe { self.logits.load_tiles(place, &classes, x, capped.then_some(&mut slope[..])) };
                self.q.load_tiles(place, &classes, q);
            }
            for (tile, ((group, x), q)) in groups.iter().zip(x.iter_mut()).zip(q.iter_mut()).enumerate() {
                let RowGroup { scalars, targets } = group;
                let q = &mut q.0[..depth];
                let has_own = targets.weight.iter().any(|weight| *weight != T::Acc::ZERO);
                if has_own {
                    if self.q.is_none() {
                        q.as_flattened_mut().fill(T::Acc::ZERO);
                    }
                    for (lane, (own, &weight)) in targets.class.iter().zip(&targets.weight).enumerate() {
                        if classes.contains(own) {
                            q[own - classes.start][lane] += weight;
                        }
                    }
                }
                dispatch(EmitTile {
                    emit,
                    rows: scalars,
                    live: &targets.live,
                    xs: &mut x.0[..depth],
                    q: (has_own || !self.q.is_none()).then_some(&*q),
                    slope: capped.then(|| &slope[tile].0[..depth]),
                });
            }
            // SAFETY: the tiles are emitted by this unit alone, and their logits are in the scratch memory
            unsafe { place.store(x, &classes, out) };
        }
    }
}

/// Emits a block, by way of `e` if the output's type can't be written directly.
fn emit_block<A: Real + Element<Acc = A>, S: Element<Acc = A>, O: Element<Acc = A>, E: Emit<A>>(
    block: EmitBlock<A, S, O, E>,
    e: &mut [A],
) {
    if O::INLINE {
        return dispatch(block);
    }
    let EmitBlock { emit, row, xs, q, slope, out } = block;
    // SAFETY: the kernel writes values only
    let through = unsafe { as_uninit(e) };
    dispatch(EmitBlock { emit, row, xs, q, slope, out: through });
    O::narrow(e, out);
}
