//! The public losses: for each its formula, options, documentation and examples.

pub(crate) mod binary;
pub(crate) mod cross_entropy;
pub(crate) mod focal;
pub(crate) mod linear_cross_entropy;
pub(crate) mod multi_label;
pub(crate) mod nll;
