//! The shape of a launch. The families choose them in their `cuda/plan.rs`, by pure functions of sizes, strides and
//! device limits, so that they are tested where there is no GPU.

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Neighbouring blocks that form a cluster; 1: none do.
    pub cluster: u32,
    /// Whether it may begin before the launch ahead of it in its stream has ended, for whose results its blocks wait by
    /// themselves.
    pub overlaps: bool,
}

impl Grid {
    /// Blocks of `threads` in one dimension, without dynamic shared memory.
    pub fn flat(blocks: u32, threads: u32) -> Self {
        Grid { blocks: [blocks, 1, 1], threads: [threads, 1, 1], shared_bytes: 0, cluster: 1, overlaps: false }
    }
}
