//! The integration tests, one binary. Every test body runs on every device that works here.

mod accuracy;
mod binary;
mod common;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda_softmax;
#[cfg(feature = "cuda")]
mod device;
mod errors;
mod focal;
mod l1;
mod linear_cross_entropy;
mod multi_label;
mod nll;
mod properties;
mod pytorch;
mod reference;
mod semantics;
mod threads;
