//! Cross-entropy of a linear layer, without the logits.

mod composed;
#[cfg(feature = "cuda")]
mod cublas;
mod matmul;
pub(crate) mod op;
pub(crate) mod problem;
