//! Launch plans of the softmax family: which kernels a pass runs, and their shapes.
//!
//! | row | forward | loss and gradient |
//! | --- | --- | --- |
//! | classes apart | a column of threads a row, neighbouring threads on neighbouring rows | the same |
//! | up to `tile_classes`, light, without gaps | tiles of whole rows in shared memory, 1 to 8 lanes a row | the same |
//! | up to `warp_bytes`, light | 8 to 32 lanes a row, the row kept in registers, the next one on its way | the same |
//! | up to `warp_bytes` | 1 to 32 lanes a row | the same, the row kept in shared memory |
//! | up to `cluster_bytes` | a block a row | the same, the row kept in shared memory |
//! | longer | a block a row | a cluster of 2 to 16 blocks a row; a block that keeps a part of it for doubles |
//! | beyond `split_bytes`, few rows | several blocks a row and a merge | the same, and the backward's pass |

use crate::cuda::grid::Grid;
use std::sync::OnceLock;

/// Bytes that a thread moves at once, and the unit in which rows are shared out.
const WINDOW: u64 = 16;
/// Bytes that a fetch brings: `SECTOR` of `kernels/softmax/rows.cuh`.
const SECTOR: u64 = 32;
/// Bytes of logits that a thread should have on their way at least: `IN_FLIGHT` of `kernels/softmax/rows.cuh`.
const IN_FLIGHT: u64 = 64;
/// The largest block of the kernels for adjacent classes.
const ROWS_THREADS: u32 = 256;
/// The threads of a block whose teams are parts of warps.
const WARPS_THREADS: u32 = 128;
/// The most blocks of these that a multiprocessor works on at a time.
const WARPS_BLOCKS: u32 = 8;
/// The largest block of the kernels for classes apart.
const STRIDED_THREADS: u32 = 256;
/// The most bytes of logits of such a block: what `fused` reads a second time should still be in the cache.
const STRIDED_BYTES: u64 = 32 << 10;
/// The most blocks of these that a multiprocessor works on at a time: 2, 3 or 4.
const STRIDED_BLOCKS: u32 = 4;
/// The most blocks of these kernels for each multiprocessor: whole rounds of what it works on, and few enough partial
/// sums.
const STRIDED_ROUNDS: u32 = 12;
/// The classes of a unit of rows that a thread of the light ones of these kernels loads at a time: `UNITS_BATCH` of
/// `kernels/softmax/strided.cuh`.
const UNITS_BATCH: u64 = 11;
/// Windows that a thread handles at a time. A thread keeps either all of its windows of a row or a multiple of these.
const BATCH: u32 = 4;
/// The threads of a block of the kernels for tiles.
const TILE_THREADS: u32 = 256;
/// The fewest blocks of these kernels that an sm_90 has room for.
const TILE_BLOCKS: u32 = 4;
/// The classes that a lane of such a block takes at a time, and the most of them in all.
const TILE_DEPTH: u64 = 8;
const TILE_STEPS: u64 = 32;
/// How many tiles shared memory should have room for, and more if they are small.
const TILES: u64 = 6;
/// The most classes of a row in a tile.
const TILE_CLASSES: u64 = 64;

/// The windows that a lane can keep in registers, each number with kernels of its own.
const REGISTER_WINDOWS: [u32; 3] = [4, 8, 16];
/// The fewest lanes of a row in registers, so that each has at most two of the row's edges.
const REGISTER_LANES: u32 = 8;
/// The threads of a block of the kernels for rows in registers.
const REGISTER_THREADS: u32 = 256;

/// The blocks of such a kernel that a multiprocessor has registers for; `writes` says whether it writes a value for
/// each class.
fn register_blocks(windows: u32, writes: bool) -> u32 {
    if windows == 4 && !writes { 3 } else { 2 }
}

/// The rows that a thread of the kernels for classes apart takes at a time, in one access where they lie in pairs.
fn rows_at_once(shape: &RowsShape) -> u64 {
    if shape.light && shape.element == 2 { 2 } else { 1 }
}

/// The most addresses in one bank of shared memory, of the accesses of a warp to a tile: the index formulas of `Lane`
/// in `kernels/softmax/tile.cuh`. For elements of 2 or 4 bytes, which share a bank of 4 bytes.
fn shared_banks(classes: u32, element: u32, lanes: u32, rotated: u32) -> usize {
    let mut most = 1;
    // a tile begins anywhere in a word: what matters is whether it begins at a bank
    for phase in 0..4 / element {
        for (warp, step) in
            (0..TILE_THREADS / 32).flat_map(|warp| (0..classes.div_ceil(lanes)).map(move |step| (warp, step)))
        {
            let mut words = [[0u32; 32]; 32];
            let mut counts = [0usize; 32];
            for thread in 32 * warp..32 * (warp + 1) {
                let (row, lane) = (thread / lanes, thread % lanes);
                let count = (classes - lane.min(classes)).div_ceil(lanes);
                if step < count {
                    let class = lane + (thread * rotated / 32 + step) % count * lanes;
                    let word = (phase + row * classes + class) * element / 4;
                    let (words, count) = (&mut words[word as usize % 32], &mut counts[word as usize % 32]);
                    if !words[..*count].contains(&word) {
                        words[*count] = word;
                        *count += 1;
                    }
                }
            }
            most = most.max(counts.into_iter().max().unwrap_or(1));
        }
    }
    most
}

/// The `Params::rotated` with which at most two addresses of an access to a tile are in one bank.
fn rotation(classes: u32, element: u32, lanes: u32) -> u32 {
    const COUNT: usize = 2 * 4 * (TILE_CLASSES as usize + 1);
    static KNOWN: [OnceLock<u32>; COUNT] = [const { OnceLock::new() }; COUNT];
    let index = (classes * 8 + lanes.trailing_zeros() * 2 + element / 4) as usize;
    *KNOWN[index].get_or_init(|| {
        let ways = |&rotated: &u32| shared_banks(classes, element, lanes, rotated);
        (0..=64).find(|rotated| ways(rotated) <= 2).or_else(|| (0..=64).min_by_key(ways)).unwrap_or(0)
    })
}

/// The cluster sizes; 1 is a block without a cluster.
const CLUSTERS: [u32; 5] = [1, 2, 4, 8, 16];

/// The rows, as far as plans depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowsShape {
    pub rows: u64,
    pub classes: u64,
    /// Bytes of a logit.
    pub element: u64,
    /// Whether a row's classes are next to each other.
    pub adjacent: bool,
    /// Whether the rows are also next to each other, in their order.
    pub packed: bool,
    /// Whether all rows are the same distance from the next one, whatever lies between.
    pub even: bool,
    /// Whether each row is aligned to 16 bytes as what is written for it is.
    pub alike: bool,
    /// Whether memory is the limit, so that there are kernels for tiles and registers: class indices and at most one
    /// number q for all classes, in `f32` arithmetic.
    pub light: bool,
}

impl RowsShape {
    fn row_bytes(&self) -> u64 {
        self.classes * self.element
    }

    /// The most windows that a row can touch: if it begins inside of a window, one more than it fills.
    fn windows(&self) -> u64 {
        let per_window = WINDOW / self.element;
        (self.classes + per_window - 1).div_ceil(per_window)
    }
}

/// The device, as far as plans depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceLimits {
    pub processors: u32,
    /// Dynamic shared memory that a block can have.
    pub shared_bytes: u32,
    /// The largest cluster to use; 1: none.
    pub cluster: u32,
}

/// The bounds between the regimes. Tests lower them to reach each regime with small rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Thresholds {
    /// The most classes of a row that is worked through in tiles, up to 64.
    pub tile_classes: u64,
    /// The threads of a multiprocessor that there have to be before a row has fewer lanes than could work on it.
    pub row_threads: u32,
    /// The longest row that a warp, or a part of one, takes.
    pub warp_bytes: u64,
    /// The most windows of a row that a lane keeps in registers; below 4, none.
    pub register_windows: u32,
    /// The most bytes of a row that a block of a cluster keeps; a longer row gets a larger cluster. Also the most bytes
    /// that any block keeps of a row that is not light.
    pub cluster_bytes: u64,
    /// The longest row that one block reduces even where others have nothing to do: it takes as long as the launch that
    /// merges parts of a row.
    pub split_bytes: u64,
    /// The shortest part of a row that a block gets.
    pub part_bytes: u64,
    /// The most threads that share rows whose classes lie apart.
    pub strided_depth: u32,
    /// The most rows that each block counts by itself.
    pub count_rows: u64,
    /// The most blocks of a grid.
    pub blocks: u32,
    /// Less shared memory than the device has.
    pub shared_bytes: Option<u32>,
    /// Fewer blocks of a wave than the device works on at a time.
    pub wave: Option<u32>,
}

impl Default for Thresholds {
    fn default() -> Self {
        Thresholds {
            tile_classes: TILE_CLASSES,
            row_threads: 1024,
            warp_bytes: 8 << 10,
            register_windows: 16,
            cluster_bytes: 64 << 10,
            split_bytes: 128 << 10,
            part_bytes: 16 << 10,
            strided_depth: STRIDED_THREADS,
            count_rows: 1024,
            blocks: 16 * 1024,
            shared_bytes: None,
            wave: None,
        }
    }
}

/// Which kernel a pass over rows runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Rows,
    Tile,
    Strided,
    /// Parts of warps, each of whose lanes keeps up to this many windows in registers.
    Registers(u32),
}

/// One launch over all rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowPass {
    pub form: Form,
    /// Threads of a block that share a row, or the block's part of a row.
    pub team: u32,
    /// Windows that a thread keeps in shared memory.
    pub kept: u32,
    /// At which classes the rows of a tile begin, so that they do not meet in the banks of shared memory: see
    /// [`rotation`].
    pub rotated: u32,
    /// Blocks that are worked on at a time, or all of those that take rows in turn.
    pub wave: u32,
    /// How many waves ahead of its own a block prefetches rows, where its own ones are too few bytes to keep the memory
    /// busy; 0: none.
    pub ahead: u32,
    pub grid: Grid,
}

impl RowPass {
    fn new(form: Form, team: u32, grid: Grid) -> Self {
        RowPass { form, team, kept: 0, rotated: 0, wave: 0, ahead: 0, grid }
    }

    /// The same with `turns` of each thread on their way, of `all` turns of blocks, where the device works on `wave`
    /// blocks at a time.
    fn with_turns(mut self, turns: u64, all: u64, wave: u32) -> Self {
        if turns <= 1 {
            return self;
        }
        let blocks = &mut self.grid.blocks[0];
        if all > *blocks as u64 {
            // a block prefetches its own next turns, and has so many of them
            *blocks = (*blocks).min((all / turns).max(wave as u64) as u32);
            self.wave = *blocks;
        } else {
            // the turns of the blocks that come when those that run now have ended
            self.wave = wave.min(*blocks);
        }
        self.ahead = (turns - 1) as u32;
        self
    }

    /// Blocks that share a row without forming a cluster.
    pub fn splits(&self) -> u32 {
        self.grid.blocks[1]
    }

    pub fn blocks(&self) -> u32 {
        self.grid.blocks[0] * self.grid.blocks[1]
    }

    /// A row's bytes for each of the threads that share it.
    fn thread_bytes(&self, shape: &RowsShape) -> u64 {
        (shape.row_bytes() / (self.team * self.splits() * self.grid.cluster) as u64).max(1)
    }

    /// The fewest classes that a thread with work has of its row.
    fn share(&self, shape: &RowsShape) -> u64 {
        (shape.classes / self.team as u64).max(1)
    }

    /// Partial sums that a pass leaves: one for each block, or for each cluster.
    pub fn partials(&self) -> u32 {
        self.blocks() / self.grid.cluster
    }
}

/// Loss and gradient: in one pass or, where rows are split over blocks, by a reduction, a merge and a backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FusedPlan {
    OnePass(RowPass),
    Split { reduce: RowPass, emit: RowPass },
}

pub(crate) struct Planner {
    pub device: DeviceLimits,
    pub thresholds: Thresholds,
}

impl Planner {
    /// A forward: a loss, and the statistics that the backward needs, for each row.
    pub fn reduce(&self, shape: &RowsShape) -> RowPass {
        self.special(shape).unwrap_or_else(|| match self.splits(shape) {
            1 => self.registers(shape, false).unwrap_or_else(|| self.rows(shape)),
            splits => self.block_per_row(shape, splits),
        })
    }

    /// Row statistics, for which rows are never split over blocks.
    pub fn statistics(&self, shape: &RowsShape) -> RowPass {
        if shape.adjacent { self.rows(shape) } else { self.strided(shape) }
    }

    /// The passes over classes that lie apart, and over tiles.
    fn special(&self, shape: &RowsShape) -> Option<RowPass> {
        if !shape.adjacent {
            return Some(if shape.light { self.strided_units(shape) } else { self.strided(shape) });
        }
        let tile = shape.light && shape.packed && shape.classes <= self.thresholds.tile_classes.min(TILE_CLASSES);
        tile.then(|| self.tile(shape))
    }

    /// A backward, whose blocks are independent of each other.
    pub fn emit(&self, shape: &RowsShape) -> RowPass {
        self.special(shape).unwrap_or_else(|| match self.parts(shape) {
            1 => self.rows(shape),
            splits => self.block_per_row(shape, splits),
        })
    }

    pub fn fused(&self, shape: &RowsShape) -> FusedPlan {
        if let Some(pass) = self.special(shape) {
            return FusedPlan::OnePass(pass);
        }
        if self.splits(shape) > 1 {
            return FusedPlan::Split { reduce: self.reduce(shape), emit: self.emit(shape) };
        }
        FusedPlan::OnePass(self.one_pass(shape))
    }

    /// A pass that reduces a row and then writes a value for each class.
    pub fn one_pass(&self, shape: &RowsShape) -> RowPass {
        if let Some(pass) = self.special(shape) {
            return pass;
        }
        self.registers(shape, true).unwrap_or_else(|| self.keeping(self.rows(shape), shape))
    }

    /// The backward of log-softmax; `adjacent` says whether classes are next to each other in all of its tensors, the
    /// shape whether they are where the gradient is written.
    pub fn log_softmax_backward(&self, shape: &RowsShape, adjacent: bool) -> RowPass {
        if adjacent { self.keeping(self.rows(shape), shape) } else { self.any_layout(shape) }
    }

    /// The gradient of probability targets.
    pub fn target_gradient(&self, shape: &RowsShape) -> RowPass {
        if shape.adjacent { self.rows(shape) } else { self.strided(shape) }
    }

    /// The same pass with shared memory for each row, over the blocks of a cluster where one has too little.
    fn keeping(&self, mut pass: RowPass, shape: &RowsShape) -> RowPass {
        // doubles are bound by their arithmetic
        if shape.element < 8 && pass.team == pass.grid.threads[0] {
            let needed = shape.row_bytes().div_ceil(self.thresholds.cluster_bytes.max(1));
            let sizes = CLUSTERS.into_iter().filter(|&size| size <= self.device.cluster);
            let size = sizes.clone().find(|&size| needed <= size as u64).or(sizes.max()).unwrap_or(1);
            pass.grid.blocks[0] *= size;
            pass.grid.cluster = size;
        }
        let threads = pass.grid.threads[0];
        let windows = shape.windows().div_ceil((pass.team * pass.grid.cluster) as u64);
        let shared = self.thresholds.shared_bytes.unwrap_or(self.device.shared_bytes) as u64;
        // where memory is not the limit, several blocks on a multiprocessor are worth more than reading each row once
        let shared = if shape.light { shared } else { shared.min(self.thresholds.cluster_bytes) };
        let room = shared / (threads as u64 * WINDOW);
        let kept = if windows <= room { windows as u32 } else { room as u32 / BATCH * BATCH };
        RowPass { kept, grid: Grid { shared_bytes: kept * threads * WINDOW as u32, ..pass.grid }, ..pass }
    }

    /// Into how many parts a reduction cuts a row, which takes a second launch.
    fn splits(&self, shape: &RowsShape) -> u32 {
        if shape.row_bytes() > self.thresholds.split_bytes { self.parts(shape) } else { 1 }
    }

    /// Into how many parts a row is cut so that the whole device has work.
    fn parts(&self, shape: &RowsShape) -> u32 {
        let parts = shape.row_bytes() / self.thresholds.part_bytes.max(1);
        let wanted = 2 * self.device.processors as u64 / shape.rows.max(1);
        parts.min(wanted).clamp(1, 1024) as u32
    }

    fn block_per_row(&self, shape: &RowsShape, splits: u32) -> RowPass {
        let windows = shape.windows() / splits as u64;
        let threads = power_of_two(windows / 8, 64, ROWS_THREADS);
        let blocks = shape.rows.min(self.thresholds.blocks as u64) as u32;
        let grid = Grid {
            blocks: [blocks, splits, 1],
            threads: [threads, 1, 1],
            shared_bytes: 0,
            cluster: 1,
            overlaps: false,
        };
        RowPass::new(Form::Rows, threads, grid)
    }

    /// Whether rows of so many lanes are enough for all threads of the device.
    fn are_many(&self, rows: u64, lanes: u32) -> bool {
        rows * lanes as u64 >= self.device.processors as u64 * self.thresholds.row_threads as u64
    }

    /// The blocks that the device works on at a time, so many of them in each multiprocessor.
    fn wave(&self, blocks: u32) -> u32 {
        self.thresholds.wave.unwrap_or(self.device.processors * blocks)
    }

    fn rows(&self, shape: &RowsShape) -> RowPass {
        if shape.row_bytes() > self.thresholds.warp_bytes {
            return self.block_per_row(shape, 1);
        }
        // as few lanes as have enough bytes on their way, if there are rows enough
        let few = power_of_two_below(shape.row_bytes() / IN_FLIGHT, 1, 32);
        let most = power_of_two(shape.windows() / BATCH as u64, 1, 32);
        let team = if self.are_many(shape.rows, few) { few } else { most };
        let turns = shape.rows.div_ceil((WARPS_THREADS / team) as u64);
        let blocks = turns.min(self.thresholds.blocks as u64) as u32;
        let pass = RowPass::new(Form::Rows, team, Grid::flat(blocks, WARPS_THREADS));
        // a team has enough bytes of one row
        let on_their_way = if team == 1 { IN_FLIGHT.div_ceil(pass.thread_bytes(shape)) } else { 1 };
        pass.with_turns(on_their_way, turns, self.wave(WARPS_BLOCKS))
    }

    /// As many blocks as the device runs at once, which take rows in turn; `writes` says whether a value is written for
    /// each class.
    fn registers(&self, shape: &RowsShape, writes: bool) -> Option<RowPass> {
        if !(shape.light && shape.even)
            || (writes && !shape.alike)
            || shape.classes <= TILE_CLASSES
            || shape.row_bytes() > self.thresholds.warp_bytes
        {
            return None;
        }
        let windows = shape.row_bytes() / WINDOW;
        let lanes = |kept: u32| windows.div_ceil(kept as u64);
        let kept = REGISTER_WINDOWS.into_iter().find(|&kept| lanes(kept) <= 32)?;
        if kept > self.thresholds.register_windows {
            return None;
        }
        let team = power_of_two(lanes(kept), REGISTER_LANES, 32);
        let most = (self.device.processors * register_blocks(kept, writes)).min(self.thresholds.blocks);
        let turns = shape.rows.div_ceil((REGISTER_THREADS / team) as u64);
        let blocks = turns.min(most as u64) as u32;
        let pass = RowPass::new(Form::Registers(kept), team, Grid::flat(blocks, REGISTER_THREADS));
        Some(match IN_FLIGHT.div_ceil(pass.thread_bytes(shape)) {
            // the next turn's rows are on their way in any case
            ..=2 => pass,
            on_their_way => pass.with_turns(on_their_way, turns, blocks),
        })
    }

    /// As few lanes for a row as still leave every multiprocessor enough threads, and as many rows as a block has lanes
    /// for.
    fn tile(&self, shape: &RowsShape) -> RowPass {
        let most = power_of_two(shape.classes.div_ceil(TILE_DEPTH), 1, 8);
        let tile_bytes = |lanes: u32| (TILE_THREADS / lanes) as u64 * shape.row_bytes();
        let shared = self.thresholds.shared_bytes.unwrap_or(self.device.shared_bytes) as u64;
        let enough = |lanes: u32| {
            shape.classes <= lanes as u64 * TILE_STEPS
                && self.are_many(shape.rows, lanes)
                && tile_bytes(lanes) * TILES <= shared
        };
        let lanes = [1, 2, 4].into_iter().find(|&lanes| enough(lanes)).map_or(most, |lanes| lanes.min(most));
        let tiles = shape.rows.div_ceil((TILE_THREADS / lanes) as u64);
        let blocks = tiles.min(self.thresholds.blocks as u64) as u32;
        // as many bytes behind a word as the tile has in global memory
        let shared_bytes = (tile_bytes(lanes).next_multiple_of(WINDOW) + WINDOW) as u32;
        let grid = Grid { shared_bytes, ..Grid::flat(blocks, TILE_THREADS) };
        let rotated = rotation(shape.classes as u32, shape.element as u32, lanes);
        let pass = RowPass { rotated, ..RowPass::new(Form::Tile, lanes, grid) };
        // a tile that is on its way while another one is worked on, at least
        let on_their_way = IN_FLIGHT.div_ceil(pass.thread_bytes(shape)).max(2);
        pass.with_turns(on_their_way, tiles, self.wave(TILE_BLOCKS))
    }

    /// The light passes over classes that lie apart.
    fn strided_units(&self, shape: &RowsShape) -> RowPass {
        let (pass, turns) = self.columns(shape, rows_at_once(shape));
        pass.with_turns(UNITS_BATCH.div_ceil(pass.share(shape)), turns, self.wave(STRIDED_BLOCKS))
    }

    /// The other passes over classes that lie apart, which prefetch a block's next turn in any case.
    fn strided(&self, shape: &RowsShape) -> RowPass {
        let (pass, turns) = self.columns(shape, 1);
        match (IN_FLIGHT / shape.element).div_ceil(pass.share(shape)) {
            ..=2 if turns > pass.grid.blocks[0] as u64 => pass,
            on_their_way => pass.with_turns(on_their_way, turns, self.wave(STRIDED_BLOCKS)),
        }
    }

    /// Neighbouring threads on neighbouring rows, `at_once` of them each; several threads on the same rows where a
    /// block's would have too many bytes for a cache, or too few threads would have work. Also the turns of blocks.
    fn columns(&self, shape: &RowsShape, at_once: u64) -> (RowPass, u64) {
        let groups = shape.rows.div_ceil(at_once);
        // what a warp reads of a class are whole sectors at least
        let least_width = power_of_two(groups, 1, (SECTOR / (at_once * shape.element)) as u32);
        let for_cache = (STRIDED_THREADS as u64 * at_once * shape.row_bytes()).div_ceil(STRIDED_BYTES);
        let for_work = (self.device.processors * 3 * STRIDED_THREADS) as u64 / groups.max(1);
        let most = power_of_two(shape.classes / BATCH as u64, 1, STRIDED_THREADS / least_width);
        let most = most.min(self.thresholds.strided_depth);
        let depth = power_of_two(for_cache.max(for_work), 1, most);
        // whole warps, but no wider than there are rows
        let width = power_of_two(groups, 32 / depth.min(32), STRIDED_THREADS / depth);
        let most_blocks = (self.device.processors * STRIDED_ROUNDS).min(self.thresholds.blocks);
        let turns = groups.div_ceil(width as u64);
        let blocks = turns.min(most_blocks as u64) as u32;
        let grid =
            Grid { blocks: [blocks, 1, 1], threads: [width, depth, 1], shared_bytes: 0, cluster: 1, overlaps: false };
        (RowPass::new(Form::Strided, depth, grid), turns)
    }

    /// The pass that takes any layout. Where classes are adjacent, neighbouring threads have neighbouring classes.
    pub fn any_layout(&self, shape: &RowsShape) -> RowPass {
        if !shape.adjacent {
            return self.strided(shape);
        }
        let depth = power_of_two(shape.classes, 1, STRIDED_THREADS);
        let width = STRIDED_THREADS / depth;
        let blocks = shape.rows.div_ceil(width as u64).min(self.thresholds.blocks as u64) as u32;
        let grid =
            Grid { blocks: [blocks, 1, 1], threads: [width, depth, 1], shared_bytes: 0, cluster: 1, overlaps: false };
        RowPass::new(Form::Strided, depth, grid)
    }

    /// Blocks that count the rows ahead of a pass in which every block needs the count; 0 where each block counts by
    /// itself.
    pub fn counts(&self, rows: u64, pass: &RowPass) -> u32 {
        if rows <= self.thresholds.count_rows || pass.blocks() == 1 {
            return 0;
        }
        rows.div_ceil(self.thresholds.count_rows.max(1)).min(64) as u32
    }
}

/// The largest power of two that is at most `n`, within bounds that are powers of two.
fn power_of_two_below(n: u64, least: u32, most: u32) -> u32 {
    1 << n.clamp(least as u64, most as u64).ilog2()
}

/// The smallest power of two that is at least `n`, within bounds that are powers of two.
fn power_of_two(n: u64, least: u32, most: u32) -> u32 {
    n.clamp(least as u64, most as u64).next_power_of_two() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: DeviceLimits = DeviceLimits { processors: 132, shared_bytes: 225 << 10, cluster: 16 };
    const A100: DeviceLimits = DeviceLimits { processors: 108, shared_bytes: 161 << 10, cluster: 1 };

    fn planner(device: DeviceLimits) -> Planner {
        Planner { device, thresholds: Thresholds::default() }
    }

    fn rows(rows: u64, classes: u64, element: u64) -> RowsShape {
        RowsShape { rows, classes, element, adjacent: true, packed: true, even: true, alike: true, light: element < 8 }
    }

    fn one_pass(device: DeviceLimits, shape: RowsShape) -> RowPass {
        match planner(device).fused(&shape) {
            FusedPlan::OnePass(pass) => pass,
            split => panic!("{shape:?}: {split:?}"),
        }
    }

    #[test]
    fn regimes() {
        // (rows, classes, bytes of a logit), the kernel, threads that share a row in a block, blocks that do
        let table = [
            ((65536, 10, 2), Form::Tile, 2, 1),
            ((64, 64, 2), Form::Tile, 8, 1),
            ((65536, 64, 2), Form::Tile, 4, 1),
            ((1 << 20, 64, 2), Form::Tile, 2, 1),
            ((1 << 20, 10, 2), Form::Tile, 1, 1),
            ((65536, 65, 2), Form::Registers(4), 8, 1),
            ((32768, 256, 2), Form::Registers(4), 8, 1),
            ((65536, 1000, 2), Form::Registers(4), 32, 1),
            ((65536, 1024, 2), Form::Registers(4), 32, 1),
            ((65536, 1031, 2), Form::Registers(4), 32, 1),
            ((65536, 1032, 2), Form::Registers(8), 32, 1),
            ((65536, 1000, 4), Form::Registers(8), 32, 1),
            ((65536, 4096, 2), Form::Registers(16), 32, 1),
            ((65536, 4097, 2), Form::Rows, 64, 1),
            ((65536, 1000, 8), Form::Rows, 32, 1),
            ((4096, 8192, 2), Form::Rows, 128, 1),
            ((4096, 32_000, 2), Form::Rows, 256, 1),
            ((4096, 32_000, 4), Form::Rows, 256, 2),
            ((16384, 50_257, 2), Form::Rows, 256, 2),
            ((8192, 128_256, 2), Form::Rows, 256, 4),
            ((8192, 262_144, 2), Form::Rows, 256, 8),
            ((8192, 262_144, 4), Form::Rows, 256, 16),
            ((64, 1000, 2), Form::Registers(4), 32, 1),
        ];
        for ((n, classes, element), form, team, cluster) in table {
            let pass = one_pass(H100, rows(n, classes, element));
            let got = (pass.form, pass.team, pass.grid.cluster);
            assert_eq!(got, (form, team, cluster), "{n} x {classes}, {element} bytes");
        }
        assert_eq!(one_pass(A100, rows(8192, 128_256, 2)).grid.cluster, 1);
        let portable = DeviceLimits { cluster: 8, ..H100 };
        assert_eq!(one_pass(portable, rows(8192, 262_144, 4)).grid.cluster, 8);
        // no cluster where arithmetic is the limit
        assert_eq!(one_pass(H100, rows(8192, 262_144, 8)).grid.cluster, 1);
        // rows in registers are written as they are aligned
        let unlike = RowsShape { alike: false, ..rows(65536, 1001, 2) };
        assert_eq!(one_pass(H100, unlike).form, Form::Rows);
        assert_eq!(planner(H100).reduce(&unlike).form, Form::Registers(4));
        let apart = RowsShape { adjacent: false, packed: false, even: false, ..rows(1 << 20, 21, 4) };
        assert_eq!(one_pass(H100, apart).form, Form::Strided);
        assert!(matches!(planner(H100).fused(&rows(2, 128_256, 2)), FusedPlan::Split { .. }));
    }

    /// Up to 64 rows of 1000 classes are one launch, in which each team has one row, so that none waits for another.
    #[test]
    fn small_problems_are_one_turn_of_few_blocks() {
        for n in [1, 5, 64] {
            for classes in [1, 10, 64, 1000] {
                for element in [2, 4, 8] {
                    let shape = rows(n, classes, element);
                    for pass in [planner(H100).reduce(&shape), planner(H100).emit(&shape), one_pass(H100, shape)] {
                        let teams = pass.grid.threads[0] / pass.team * pass.blocks();
                        let what = format!("{shape:?}: {pass:?}");
                        assert!(pass.splits() == 1 && pass.blocks() <= 16 && teams as u64 >= n, "{what}");
                        assert_eq!(planner(H100).counts(n, &pass), 0, "{what}");
                    }
                }
            }
        }
        // a single row, as long as a launch is worth
        for (classes, element) in [(64 << 10, 2), (32 << 10, 4), (16 << 10, 8)] {
            let shape = rows(1, classes, element);
            assert_eq!(planner(H100).reduce(&shape).blocks(), 1, "{shape:?}");
            assert_eq!(one_pass(H100, shape).partials(), 1, "{shape:?}");
            assert!(planner(H100).emit(&shape).blocks() > 1, "{shape:?}");
            assert!(planner(H100).reduce(&RowsShape { classes: classes + 8, ..shape }).splits() > 1, "{shape:?}");
        }
    }

    #[test]
    fn tiles_have_few_bank_conflicts() {
        for (element, classes) in [2, 4].into_iter().flat_map(|element| (1..=64).map(move |classes| (element, classes)))
        {
            for lanes in [1, 2, 4, 8].into_iter().filter(|lanes| classes <= lanes * TILE_STEPS as u32) {
                let ways = shared_banks(classes, element, lanes, rotation(classes, element, lanes));
                // no beginnings are better for these
                let most = if (classes, element, lanes) == (43, 4, 4) { 3 } else { 2 };
                assert!(ways <= most, "{classes} classes, {element} bytes, {lanes} lanes: {ways}-way");
            }
        }
        assert_eq!([8, 16, 32, 64].map(|classes| shared_banks(classes, 2, (classes / 8).max(1), 0)), [4; 4]);
        assert_eq!([8, 16, 32, 64].map(|classes| shared_banks(classes, 4, (classes / 8).max(1), 0)), [8, 8, 8, 4]);
        assert_eq!(shared_banks(32, 4, 1, 0), 32);
    }

    /// A lane has more classes where there are rows enough, and where their tiles leave room for others.
    #[test]
    fn tiles_have_few_lanes() {
        let lanes = |device: DeviceLimits, n: u64, classes: u64, element: u64| {
            let pass = Planner { device, thresholds: Thresholds::default() }.tile(&rows(n, classes, element));
            assert!(pass.grid.shared_bytes as u64 * TILES <= device.shared_bytes as u64, "{pass:?}");
            pass.team
        };
        assert_eq!([64, 1 << 17, 1 << 18, 1 << 20].map(|n| lanes(H100, n, 64, 2)), [8, 2, 2, 2]);
        assert_eq!([64, 1 << 17, 1 << 18, 1 << 20].map(|n| lanes(H100, n, 32, 4)), [4, 2, 1, 1]);
        assert_eq!([1, 1 << 20].map(|n| lanes(H100, n, 10, 2)), [2, 1]);
        assert_eq!([1, 1 << 20].map(|n| lanes(H100, n, 8, 2)), [1, 1]);
        let small = DeviceLimits { shared_bytes: 64 << 10, ..H100 };
        assert_eq!(
            [(64, 2), (64, 4), (10, 4)].map(|(classes, element)| lanes(small, 1 << 20, classes, element)),
            [4, 8, 1]
        );
    }

    /// What a kernel reads, as far as it tells the bytes that it has on their way.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Reading {
        /// Logits, for a number for each row.
        Forward,
        Statistics,
        /// Logits, for a value for each class.
        Backward,
        LossAndGradient,
        TargetGradient,
        /// Logits and as many upstream gradients.
        LogSoftmaxBackward,
    }

    /// The number of a `constexpr int` in the source of kernels.
    fn constant(source: &str, name: &str) -> u64 {
        let (_, rest) = source.split_once(&format!("constexpr int {name} = ")).expect("the constant");
        rest.split_once(';').expect("its end").0.parse().expect("a number")
    }

    /// Bytes of logits that a multiprocessor has on their way with all of its threads at their loads: resident blocks
    /// times what a thread loads, or prefetches, before it uses the first.
    fn bytes_in_flight(pass: &RowPass, shape: &RowsShape, device: &DeviceLimits, reading: Reading) -> u64 {
        let writes = !matches!(reading, Reading::Forward | Reading::Statistics);
        let threads = pass.grid.threads.iter().product::<u32>() as u64;
        // the bounds of the kernels on an sm_90
        let resident = match (reading, pass.form) {
            _ if shape.element == 8 => 512,
            (Reading::LogSoftmaxBackward, Form::Strided) => 1024,
            (Reading::Statistics, Form::Strided) => 768,
            (Reading::TargetGradient | Reading::LogSoftmaxBackward, _) => 768,
            _ if shape.light => 768,
            _ => 512,
        };
        let (by_registers, of_thread) = match pass.form {
            Form::Registers(kept) => {
                // two rows where a thread has registers for both
                let turns = (1 + pass.ahead as u64).max(if kept <= 8 { 2 } else { 1 });
                (register_blocks(kept, writes) as u64, turns * pass.thread_bytes(shape).min(kept as u64 * WINDOW))
            }
            // its own tile, and those that it prefetches
            Form::Tile => (TILE_BLOCKS as u64, (1 + pass.ahead as u64) * pass.thread_bytes(shape)),
            Form::Rows => {
                // `READ_BATCH`
                let batch = if shape.light && !writes && shape.element == 2 { 2 * IN_FLIGHT } else { IN_FLIGHT };
                let of_row = pass.thread_bytes(shape).min(batch);
                (resident / threads, (1 + pass.ahead as u64) * of_row)
            }
            Form::Strided => {
                // `STRIDED_BATCH` of the kernels for units of logits; the others prefetch their next turn's too
                let units = shape.light && reading != Reading::LogSoftmaxBackward;
                let next = !units && shape.rows > pass.grid.blocks[0] as u64 * pass.grid.threads[0] as u64;
                let turns = (1 + pass.ahead as u64).max(1 + next as u64);
                let of_class = shape.element * if units { rows_at_once(shape) } else { 1 };
                let batch = if units { UNITS_BATCH * of_class } else { IN_FLIGHT };
                // all of what is prefetched of later waves
                let most = if pass.ahead > 0 { u64::MAX } else { batch };
                (resident / threads, (turns * pass.share(shape) * of_class).min(most))
            }
        };
        // either device has 228 KB a multiprocessor, of which the system takes 1 KB for each block
        let by_shared = (228 << 10) / (pass.grid.shared_bytes as u64 + (3 << 10));
        let by_grid = (pass.blocks() as u64).div_ceil(device.processors as u64);
        by_registers.min(by_shared).min(by_grid) * threads * of_thread
    }

    /// All passes that read the logits of a shape.
    fn passes(shape: &RowsShape) -> Vec<(Reading, RowPass)> {
        let planner = planner(H100);
        let mut passes = vec![
            (Reading::Forward, planner.reduce(shape)),
            (Reading::Backward, planner.emit(shape)),
            (Reading::LogSoftmaxBackward, planner.log_softmax_backward(shape, shape.adjacent)),
        ];
        if let FusedPlan::OnePass(pass) = planner.fused(shape) {
            passes.push((Reading::LossAndGradient, pass));
        }
        if !shape.light {
            passes.push((Reading::Statistics, planner.statistics(shape)));
            passes.push((Reading::TargetGradient, planner.target_gradient(shape)));
        }
        passes
    }

    /// An H100 needs 32 KB on their way in each multiprocessor to read at its memory's speed and an H200 48 KB, which
    /// those forwards have that are bound by memory.
    #[test]
    fn enough_bytes_are_in_flight() {
        let rows_source = include_str!("../../../kernels/softmax/rows.cuh");
        assert_eq!([IN_FLIGHT, SECTOR], ["IN_FLIGHT", "SECTOR"].map(|name| constant(rows_source, name)));
        assert_eq!(UNITS_BATCH, constant(include_str!("../../../kernels/softmax/strided.cuh"), "UNITS_BATCH"));
        let few = (1..=70).map(|classes| (1 << 24, classes));
        // one turn of each block
        let once = (8..=70).map(|classes| (1 << 20, classes));
        let many = [
            (32768, 256),
            (65536, 1000),
            (32768, 4096),
            (8192, 8192),
            (4096, 32_000),
            (16384, 50_257),
            (8192, 128_256),
            (8192, 262_144),
            // images, and a transposed matrix
            (300_000, 21),
            (16 * 512 * 512, 21),
            (32 * 128 * 128, 150),
            (1 << 20, 1000),
        ];
        for (n, classes) in few.chain(once).chain(many) {
            for (element, light) in [(2, true), (4, true), (2, false), (4, false), (8, false)] {
                let packed = RowsShape { light, ..rows(n, classes, element) };
                let with_gaps = RowsShape { packed: false, ..packed };
                let apart = RowsShape { adjacent: false, even: false, ..with_gaps };
                let layouts = [("packed", packed), ("with gaps", with_gaps), ("apart", apart)];
                // few rows whose classes lie apart have too few blocks
                for (layout, shape) in layouts.into_iter().filter(|(_, shape)| shape.adjacent || n >= 8192) {
                    for (reading, pass) in passes(&shape) {
                        let kernels = if light { "light" } else { "general" };
                        let what = format!("{n} x {classes} {layout}, {element} bytes, {kernels}, {reading:?}");
                        let bytes = bytes_in_flight(&pass, &shape, &H100, reading);
                        println!("{what}: {} KB", bytes >> 10);
                        let fast = shape.adjacent && light && reading == Reading::Forward;
                        let needed = if fast { 48 << 10 } else { 32 << 10 };
                        assert!(bytes >= needed, "{what}: {bytes} bytes, {pass:?}");
                        // there are as many rows as are prefetched
                        let of_wave = (pass.wave * pass.grid.threads.iter().product::<u32>() / pass.team) as u64;
                        let units = pass.form == Form::Strided && light && reading != Reading::LogSoftmaxBackward;
                        let at_once = if units { rows_at_once(&shape) } else { 1 };
                        assert!((1 + pass.ahead as u64) * of_wave * at_once <= n, "{what}: {pass:?}");
                    }
                }
            }
        }
        // all of a small problem is on its way at once
        for (n, classes, element) in [(64, 1000, 2), (64, 1000, 4), (64, 100, 2), (64, 10, 2), (1, 1000, 4)] {
            let shape = rows(n, classes, element);
            for (reading, pass) in
                [(Reading::Forward, planner(H100).reduce(&shape)), (Reading::LossAndGradient, one_pass(H100, shape))]
            {
                let in_flight = bytes_in_flight(&pass, &shape, &H100, reading) * pass.blocks() as u64;
                assert!(in_flight >= n * shape.row_bytes() / WINDOW * WINDOW, "{n} x {classes}: {in_flight}, {pass:?}");
            }
        }
    }

    /// What the kernels rely on, over the whole range of shapes.
    #[test]
    fn launches_are_possible() {
        for device in [H100, A100, DeviceLimits { processors: 40, shared_bytes: 62 << 10, cluster: 1 }] {
            for n in [1, 2, 3, 31, 33, 64, 65, 1000, 100_000, 1 << 33] {
                for classes in [1, 2, 9, 64, 65, 1000, 5000, 32_000, 50_257, 128_256, 1 << 24, (1 << 31) - 1] {
                    for element in [2, 4, 8] {
                        for adjacent in [true, false] {
                            let shape = RowsShape { adjacent, packed: adjacent, ..rows(n, classes, element) };
                            let planner = planner(device);
                            let mut passes =
                                vec![planner.reduce(&shape), planner.emit(&shape), planner.statistics(&shape)];
                            passes.extend([planner.one_pass(&shape), planner.any_layout(&shape)]);
                            passes.extend([adjacent, false].map(|all| planner.log_softmax_backward(&shape, all)));
                            passes.push(planner.target_gradient(&shape));
                            match planner.fused(&shape) {
                                FusedPlan::OnePass(pass) => passes.push(pass),
                                FusedPlan::Split { reduce, emit } => passes.extend([reduce, emit]),
                            }
                            for pass in passes {
                                check(&pass, &shape, &device);
                            }
                        }
                    }
                }
            }
        }
    }

    fn check(pass: &RowPass, shape: &RowsShape, device: &DeviceLimits) {
        let threads = pass.grid.threads.iter().product::<u32>();
        let what = format!("{shape:?}: {pass:?}");
        assert!(threads.is_power_of_two() && (32..=256).contains(&threads), "{what}");
        assert!(pass.grid.shared_bytes <= device.shared_bytes, "{what}");
        assert!(pass.grid.blocks.iter().all(|&n| n > 0) && pass.grid.blocks[1] <= 65535, "{what}");
        match pass.form {
            Form::Rows => {
                assert!(pass.team.is_power_of_two() && (pass.team <= 32 || pass.team == threads), "{what}");
                assert!(pass.splits() * pass.grid.cluster == 1 || pass.team == threads, "{what}");
                let size = pass.grid.cluster;
                assert!(size <= device.cluster && pass.grid.blocks[0].is_multiple_of(size), "{what}");
            }
            Form::Registers(kept) => {
                let per_window = WINDOW / shape.element;
                assert!(shape.classes / per_window <= (kept * pass.team) as u64, "{what}");
                // the edges are at most a class short of a window on either side
                assert!(2 * (per_window - 1) <= 2 * pass.team as u64 && (8..=32).contains(&pass.team), "{what}");
            }
            Form::Tile => {
                let bytes = (TILE_THREADS / pass.team) as u64 * shape.row_bytes() + WINDOW;
                assert!(shape.classes <= TILE_STEPS * pass.team as u64, "{what}");
                assert!(bytes <= pass.grid.shared_bytes as u64, "{what}");
            }
            Form::Strided => assert_eq!(pass.splits(), 1, "{what}"),
        }
    }
}
