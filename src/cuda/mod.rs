//! The CUDA kernels: what is launched, with which arguments. The kernels themselves are in `kernels/`, the launch shapes in
//! [`plan`](crate::plan).
//!
//! Nothing here copies to the host or waits for the device, except where a loss was asked to check its targets.

pub(crate) mod indices;
pub(crate) mod launch;
pub(crate) mod logistic;
pub(crate) mod matmul;
pub(crate) mod softmax;

/// The PTX of each `kernels/*.cu`: `kernels/logistic.cu` is `ptx::LOGISTIC`.
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}
