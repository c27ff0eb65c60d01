//! Negative log-likelihood: a gather of each row's own class, and a scatter of its gradient.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub(crate) mod op;
pub(crate) mod problem;
