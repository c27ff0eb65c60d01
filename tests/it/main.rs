//! The integration tests, one binary. Every test body runs on every device that works here.

mod common;
mod linear_cross_entropy;
mod pytorch;
