//! The element-wise family: losses that are one term for each element.

mod composed;
mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod op;
pub(crate) mod problem;
mod terms;
