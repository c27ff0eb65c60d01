//! Cross-entropy of a linear layer, without the logits.

mod chunks;
mod composed;
#[cfg(feature = "cuda")]
mod cublas;
mod inputs;
mod matmul;
pub(crate) mod op;
mod place;
pub(crate) mod problem;
mod scale;

#[cfg(all(test, feature = "cuda"))]
mod tests;
