//! The CUDA kernels: what is launched, with which arguments. The kernels themselves are in `kernels/`, the launch shapes in
//! [`plan`](crate::plan).
//!
//! Nothing here copies to the host or waits for the device, except where a loss was asked to check its targets, and where more
//! counters are made for launches: in a process's first loss, then once in some two thousand new streams or recorded launches.

pub(crate) mod gpu;
pub(crate) mod launch;
pub(crate) mod logistic;
pub(crate) mod matmul;
pub(crate) mod operands;
pub(crate) mod softmax;

/// The compiled `kernels/*.cu`: `kernels/softmax_f32.cu` is `kernels::SOFTMAX_F32`.
mod kernels {
    use super::gpu::Module;

    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

#[cfg(test)]
mod tests;
