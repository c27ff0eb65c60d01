//! NLL in candle's tensor ops.

use super::problem::Nll;
use crate::check::arithmetic;
use crate::composed::{as_matrix, reduced, scaled};
use candle_core::{DType, Result, Tensor};

/// The loss.
pub(crate) fn loss(problem: &Nll, log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    let (o, dtype) = (&problem.options, arithmetic(log_probs.dtype()));
    let x = as_matrix(log_probs, problem.axis)?.to_dtype(dtype)?;
    let indices = target.flatten_all()?.to_dtype(DType::I64)?;
    let counts = indices.ne(o.ignore_index)?;
    // an ignored row is replaced by zeros, so that its NaN goes nowhere, and any class will do for it
    let x = counts.unsqueeze(1)?.broadcast_as(x.shape())?.where_cond(&x, &x.zeros_like()?)?;
    let classes = counts.where_cond(&indices, &indices.zeros_like()?)?;
    let counts = counts.to_dtype(dtype)?;
    let weights = match &o.weight {
        Some(weight) => (weight.index_select(&classes, 0)? * counts)?,
        None => counts,
    };
    let losses = scaled(&weights, &x.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)?.neg()?;
    reduced(o, losses, &weights, problem.loss_shape(log_probs.layout()))
}
