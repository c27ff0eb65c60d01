//! The softmax family on CUDA.

#[cfg(feature = "cuda")]
mod call;
#[cfg(feature = "cuda")]
mod detail;
#[cfg(feature = "cuda")]
mod entry;
#[cfg(feature = "cuda")]
mod params;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
#[cfg(all(test, feature = "cuda"))]
mod tests;
