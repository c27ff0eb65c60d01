//! The element-wise family on CUDA. Planning builds, and is tested, without the feature `cuda`.

#[cfg(feature = "cuda")]
mod call;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod divisor;
#[cfg(feature = "cuda")]
mod params;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
#[cfg(all(test, feature = "cuda"))]
mod tests;
