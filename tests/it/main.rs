//! The integration tests, one binary. Every test body runs on every device that works here. The suites in [`fused`] and
//! [`composed`] are the same ones, compiled for the kernels and for the losses composed of tensor ops.
#![allow(clippy::duplicate_mod)] // on purpose, see above

mod accumulation;
mod accuracy;
mod common;
mod composed;
#[cfg(feature = "cuda")]
mod cuda_softmax;
#[cfg(feature = "cuda")]
mod device;
mod fused;
mod gradient_accuracy;
mod linear_cross_entropy;
mod properties;
mod pytorch;
mod reference;
mod threads;
