//! NLL in candle's tensor ops.

use super::problem::Nll;
use crate::check::arithmetic;
use crate::composed::{ComposedIndices, as_matrix, counted_rows, reduced};
use candle_core::{Result, Tensor};

/// The loss.
pub(crate) fn loss(problem: &Nll, log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    let (o, dtype) = (&problem.options, arithmetic(log_probs.dtype()));
    let shape = problem.loss_shape(log_probs.layout());
    if log_probs.elem_count() == 0 {
        // nothing to look up, and candle's gather breaks the graph
        let losses = log_probs.to_dtype(dtype)?.flatten_all()?;
        return reduced(&problem.form, losses.clone(), &losses, shape);
    }
    let x = as_matrix(log_probs, problem.axis)?.to_dtype(dtype)?;
    let indices = ComposedIndices::new(problem.name, target, x.dim(1)?, o)?;
    let weights = indices.weights(o, dtype)?;
    let x = indices.poison(counted_rows(&indices.counted, &x)?)?;
    let own = x.gather(&indices.classes.unsqueeze(1)?, 1)?.squeeze(1)?;
    // a weight of 0 wins over any number
    let own = weights.eq(0f64)?.where_cond(&own.zeros_like()?, &own)?;
    let losses = (&weights * own)?.neg()?;
    reduced(&problem.form, losses, &weights, shape)
}
