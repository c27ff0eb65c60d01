//! The public losses: for each its formula, options, documentation and examples.

#[macro_use]
mod setters;

pub(crate) mod binary;
pub(crate) mod cross_entropy;
pub(crate) mod focal;
pub(crate) mod l1;
pub(crate) mod linear_cross_entropy;
pub(crate) mod multi_label;
pub(crate) mod nll;
