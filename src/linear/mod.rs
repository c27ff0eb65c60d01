//! Cross-entropy of a linear layer.

#[cfg(feature = "cuda")]
mod cublas;
mod matmul;
pub(crate) mod op;
