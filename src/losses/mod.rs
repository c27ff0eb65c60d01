//! The public losses: for each its formula, options, documentation and examples.

pub mod binary;
pub mod cross_entropy;
pub mod focal;
pub mod linear_cross_entropy;
pub mod multi_label;
pub mod nll;
