//! The base of every CUDA kernel of the crate: modules, launches, memory, the shapes of launches.
//!
//! Nothing here copies to the host or waits for the device, with two exceptions: a loss that was asked to check its
//! targets, and the allocation of counters for launches, in a process's first loss and once more for every two thousand
//! or so new streams or recorded launches.

#[cfg(feature = "cuda")]
pub(crate) mod gpu;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) mod grid;
#[cfg(feature = "cuda")]
pub(crate) mod indices;
#[cfg(feature = "cuda")]
pub(crate) mod launch;
#[cfg(feature = "cuda")]
pub(crate) mod scale;
#[cfg(feature = "cuda")]
pub(crate) mod work;

/// The compiled `kernels/modules/*.cu`: `softmax_plain_f32.cu` is `kernels::SOFTMAX_PLAIN_F32`.
#[cfg(feature = "cuda")]
pub(crate) mod kernels {
    use super::gpu::Module;

    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

#[cfg(all(test, feature = "cuda"))]
pub(crate) mod testing;
#[cfg(all(test, feature = "cuda"))]
pub(crate) mod tests;
