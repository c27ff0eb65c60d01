//! The element-wise family: one problem for each element.

pub(crate) mod cpu;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod cuda;
pub(crate) mod op;
mod terms;
