//! The softmax family: one problem for each row of classes.

pub(crate) mod composed;
mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
pub(crate) mod op;
pub(crate) mod problem;
pub(crate) mod transform;
