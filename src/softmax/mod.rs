//! The softmax family: one problem for each row of classes.

pub(crate) mod cpu;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod cuda;
pub(crate) mod op;
