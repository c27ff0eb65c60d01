#![allow(dead_code)]
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
mod reduction;
mod softmax;
