//! What the losses that are composed of candle's tensor ops share.

use crate::reduction::Reduction;
use crate::rows::options::RowOptions;
use candle_core::{Result, Shape, Tensor};

/// `factor * value`, 0 where the factor is 0.
pub(crate) fn scaled(factor: &Tensor, value: &Tensor) -> Result<Tensor> {
    factor.eq(0f64)?.where_cond(&value.zeros_like()?, &(factor * value)?)
}

/// Every row of classes along `axis` as a row of a matrix.
pub(crate) fn as_matrix(t: &Tensor, axis: usize) -> Result<Tensor> {
    let classes = t.dims()[axis];
    let mut order: Vec<usize> = (0..t.rank()).filter(|&other| other != axis).collect();
    order.push(axis);
    t.permute(order)?.reshape((t.elem_count() / classes, classes))
}

/// A sum over its denominator. Where that is 0 the mean is NaN or infinite, but no gradient goes out of it.
fn mean(sum: &Tensor, denominator: &Tensor) -> Result<Tensor> {
    let weightless = denominator.eq(0f64)?;
    let mean = (sum / weightless.where_cond(&denominator.ones_like()?, denominator)?)?;
    weightless.where_cond(&(sum.detach() / denominator)?, &mean)
}

/// The rows' losses as a loss returns them; `weights` are what the rows add to the denominator of a mean.
pub(crate) fn reduced(options: &RowOptions, losses: Tensor, weights: &Tensor, shape: Shape) -> Result<Tensor> {
    match (options.reduction, options.normalizer) {
        (Reduction::None, _) => losses.reshape(shape),
        (Reduction::Sum, _) => losses.sum_all(),
        (Reduction::Mean, Some(normalizer)) => losses.sum_all()? / normalizer,
        (Reduction::Mean, None) => mean(&losses.sum_all()?, &weights.sum_all()?.detach()),
    }
}
