//! What all losses of rows of classes share: where the rows lie, their options, and what CUDA kernels over rows take.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod layout;
pub(crate) mod options;
