//! What all losses of rows of classes share: where the rows lie, their options, and what kernels over rows have in
//! common.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod layout;
pub(crate) mod options;
