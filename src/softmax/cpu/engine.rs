//! Passes over all rows, cut into units of work that run in parallel: segments of rows and tiles of rows, read in
//! pieces that fit into the scratch memory, handed to the vectorised loops, and written.

use super::kernels::{
    CompleteStrip, Emit, EmitBlock, EmitTile, PowersGradient, ReduceStrip, ReduceTile, RowDetail, RowScalars,
    RowTargets, States, StripBlocks, with_scale,
};
use super::logits::{Logits, TargetDistribution, TileScratch};
use crate::cpu::element::{Element, Output, PerRow, as_uninit, build};
use crate::cpu::math::{Baseline, LANES, Real, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::cpu::stream::{self, Stage};
use crate::rows::cpu::{BLOCK, Division, ROW_BLOCKS, STRIP, STRIP_BLOCKS, Strip, Tile, TilePlace, with_tiles};
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

/// How a pass gets from the logits to its output.
#[derive(Clone, Copy, Default)]
struct Way {
    /// Whether the exponentials of the reduction are kept for what is emitted: all those of a unit.
    keeps_powers: bool,
    /// Whether the output is stored past the cache.
    past_cache: bool,
}

/// A block of a row that is emitted.
struct RowBlock<'k, A> {
    row: usize,
    /// The row's lane in its unit.
    lane: usize,
    classes: Range<usize>,
    scalars: &'k RowScalars<A>,
    /// The row's own class, counted from the first one here, with its q; if it is here.
    own: Option<(usize, A)>,
    source: BlockSource,
}

/// Where the values of a block of a row are emitted from.
#[derive(Clone, Copy)]
enum BlockSource {
    /// The exponentials that the reduction has kept.
    Powers,
    /// The logits as they are stored.
    Stored,
    /// The logits in the scratch memory.
    Loaded,
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
    fn with_scratch(&self, way: Way, work: impl FnOnce(&mut TileScratch<T::Acc>)) {
        let count = self.division.held();
        let capped = if self.logits.softcap.is_some() { count } else { 0 };
        let powers = if way.keeps_powers { STRIP_BLOCKS } else { 0 };
        with_tiles(2 * count + 3 + capped + powers, |tiles| {
            let (x, tiles) = tiles.split_at_mut(count);
            let (q, tiles) = tiles.split_at_mut(count);
            let (e, tiles) = tiles.split_at_mut(1);
            let (staged, tiles) = tiles.split_at_mut(2);
            let (slope, powers) = tiles.split_at_mut(capped);
            let references = [T::Acc::ZERO; ROW_BLOCKS];
            work(&mut TileScratch { x, q, e, slope, staged, powers, references });
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
            self.with_scratch(Way::default(), |scratch| {
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
        let way = self.way::<O, E>(reduce);
        for_each_task(units, logits * EMIT_WORK, |units| {
            self.with_scratch(way, |scratch| {
                let staged = std::mem::take(&mut scratch.staged);
                // SAFETY: values are written
                let mut stage = way.past_cache.then(|| Stage::new(unsafe { Tile::room(staged) }));
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
                                self.emit_row(
                                    emit,
                                    way,
                                    (&group, lane),
                                    (row, &strip.classes),
                                    (out, &mut stage),
                                    scratch,
                                );
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
                if let Some(stage) = &mut stage {
                    // SAFETY: no slice of what this task has written is alive
                    unsafe { stage.end(out) };
                    stream::fence();
                }
            });
        });
    }

    fn way<O: Element, E: Emit<T::Acc>>(&self, reduce: Option<RowDetail>) -> Way {
        let classes = self.logits.rows.classes;
        let Division::Strips { segments: 1, .. } = self.division else { return Way::default() };
        let bytes = self.logits.rows.count() * classes * size_of::<O>();
        // of several blocks, an exponential is a product of two, whose differences are each rounded: not in f64, which
        // is there for its digits
        let most = if size_of::<T::Acc>() > size_of::<f32>() { BLOCK } else { STRIP };
        Way {
            keeps_powers: E::OF_POWERS
                && reduce == Some(RowDetail::Loss)
                && self.logits.softcap.is_none()
                && classes <= most,
            // the lines that are replaced are in the cache
            past_cache: !self.logits.x.is_replaced() && stream::exceeds_cache(bytes),
        }
    }

    fn reduce_strip(
        &self,
        detail: RowDetail,
        strip: &Strip,
        states: &mut States<T::Acc>,
        scratch: &mut TileScratch<T::Acc>,
    ) {
        *states = States { scale: self.logits.factor, ..States::EMPTY };
        let TileScratch { x, q, powers, references, .. } = scratch;
        let (x, q, powers) = (Tile::block(x), Tile::block(q), Tile::block(powers));
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
                    powers: powers.get_mut(lanes.start * of.len() + class..).unwrap_or_default(),
                    block: block.clone(),
                    of: of.clone(),
                    detail,
                };
                if detail == RowDetail::Mass || self.logits.is_read_directly() {
                    // SAFETY: a row's values are emitted by this task after it is reduced, or by others in a later pass
                    self.reduce_blocks(blocks, |row| unsafe { self.logits.stored(rows.start + row, &block) });
                } else {
                    for (row, x) in rows.clone().zip(x.chunks_mut(len)) {
                        // SAFETY: as above
                        unsafe { self.logits.load(row, class, x, None) };
                    }
                    let x = &*x;
                    self.reduce_blocks(blocks, |row| &x[row * len..][..len]);
                }
                if let Some(reference) = references.get_mut(row_block(lanes.start, of.len(), class)) {
                    *reference = states.max[lanes.start];
                }
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
        let next = place.after().map(|start| self.logits.x.ahead(start));
        for (classes, held) in place.pieces() {
            let (depth, x, q) = (classes.len(), &mut x[held.clone()], &mut q[held]);
            // SAFETY: the values of the rows are emitted by this task after they are reduced, or in a later pass
            unsafe { self.logits.load_tiles(place, &classes, x, None) };
            self.q.load_tiles(place, &classes, q);
            for (states, (x, q)) in states.iter_mut().zip(x.iter().zip(q.iter())) {
                let q = (!self.q.is_none()).then_some(&q.0[..depth]);
                let (classes, xs) = (classes.clone(), &x.0[..depth]);
                with_scale!(self.logits.factor, scale => {
                    dispatch(ReduceTile { scale, states, classes, of, xs, q, detail, next })
                });
            }
        }
    }

    /// Emits the values of a strip's classes in the row of a lane.
    fn emit_row<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        way: Way,
        (group, lane): (&RowGroup<T::Acc>, usize),
        (row, classes): (usize, &Range<usize>),
        (out, stage): (&Output<O>, &mut Option<Stage<O>>),
        scratch: &mut TileScratch<T::Acc>,
    ) {
        let start = row * self.logits.rows.classes;
        if !group.targets.live[lane] {
            // SAFETY: each segment of each row is emitted by one unit, which has no slice of it here
            let out = unsafe { out.slice(start + classes.start, classes.len()) };
            return out.fill(MaybeUninit::new(O::from_acc(T::Acc::ZERO)));
        }
        let scalars = group.scalars.lane(lane);
        let (own, weight) = (group.targets.class[lane], group.targets.weight[lane]);
        for class in classes.clone().step_by(BLOCK) {
            let classes = class..(class + BLOCK).min(classes.end);
            let (at, len) = (start + class, classes.len());
            let has_own = weight != T::Acc::ZERO && classes.contains(&own);
            let own = has_own.then(|| (own - class, weight + self.q.at(own)));
            let source = if way.keeps_powers {
                BlockSource::Powers
            } else if self.logits.is_read_directly() && !self.logits.x.is_replaced() {
                BlockSource::Stored
            } else {
                let (x, slope) = (Tile::block(scratch.x), Tile::block(scratch.slope).get_mut(..len));
                // SAFETY: this unit alone writes to the segment, and has no slice of it here
                unsafe { self.logits.load(row, class, &mut x[..len], slope) };
                BlockSource::Loaded
            };
            let block = RowBlock { row, lane, classes, scalars: &scalars, own, source };
            let write = |values: &mut [MaybeUninit<O>]| self.emit_block(emit, block, values, scratch);
            match stage {
                // SAFETY: each segment of each row is emitted by one unit, which has no slice of it
                Some(stage) => unsafe { stage.piece(out, at, len, write) },
                // SAFETY: as above, and no slice of its logits is alive if it replaces them
                None => write(unsafe { out.slice(at, len) }),
            }
        }
    }

    /// Emits the values of a block.
    fn emit_block<O: Element<Acc = T::Acc>, E: Emit<T::Acc>>(
        &self,
        emit: &E,
        block: RowBlock<T::Acc>,
        out: &mut [MaybeUninit<O>],
        scratch: &mut TileScratch<T::Acc>,
    ) {
        let RowBlock { row, lane, classes, scalars, own, source } = block;
        let (of, first, len) = (self.logits.rows.classes, classes.start, classes.len());
        let TileScratch { x, e, q, slope, powers, references, .. } = scratch;
        let [x, e, q, slope, powers] = [x, e, q, slope, powers].map(|tiles| Tile::block(tiles));
        let e = &mut e[..len];
        let q = self.q.load_block(row * of + first, first, q.get_mut(..len).unwrap_or_default());
        let value = match source {
            BlockSource::Powers => {
                let reference = if of <= BLOCK { scalars.max } else { references[row_block(lane, of, first)] };
                let row = scalars.of_powers(self.logits.factor, reference);
                let xs = &powers[lane * of + first..][..len];
                emit_block(EmitBlock { emit: &PowersGradient, row, xs, q, slope: None, out }, e);
                own.map(|(i, q)| PowersGradient.value::<Baseline, _>(&row, 0, xs[i], q))
            }
            BlockSource::Stored => {
                // SAFETY: the output is another buffer
                let xs = unsafe { self.logits.stored(row, &classes) };
                emit_block(EmitBlock { emit, row: *scalars, xs, q, slope: None, out }, e);
                own.map(|(i, q)| emit.value::<Baseline, _>(scalars, 0, xs[i].to_acc(), q))
            }
            BlockSource::Loaded => {
                let (xs, slope) = (&x[..len], slope.get(..len).filter(|_| E::IN_LOGITS));
                emit_block(EmitBlock { emit, row: *scalars, xs, q, slope, out }, e);
                let chain = |i: usize| slope.map_or(T::Acc::ONE, |slope| slope[i]);
                own.map(|(i, q)| chain(i) * emit.value::<Baseline, _>(scalars, 0, xs[i], q))
            }
        };
        if let Some(((i, _), value)) = own.zip(value) {
            out[i].write(O::from_acc(value));
        }
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

/// The number of a block among those of a strip's rows, of which each has so many classes.
fn row_block(lane: usize, classes: usize, class: usize) -> usize {
    lane * classes.div_ceil(BLOCK) + class / BLOCK
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
