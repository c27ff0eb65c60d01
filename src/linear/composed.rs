//! Linear cross-entropy in candle's tensor ops: all logits at once.

use super::problem::{Linear, LinearGradients};
use crate::cast::indices_as_i64;
use crate::composed::{counted_rows, counting_rows};
use crate::softmax::composed::{self, ComposedLoss};
use crate::softmax::problem::RowStatistics;
use candle_core::{DType, Result, Tensor, Var};

/// The logits as a matrix. An ignored row of hidden states is replaced by zeros, so that its NaN goes nowhere.
fn logits(linear: &Linear, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Tensor> {
    let hidden = hidden.reshape((target.elem_count(), weight.dim(1)?))?;
    let counted = counting_rows(&indices_as_i64(target)?.flatten_all()?, &linear.problem.options.rows)?;
    let logits = counted_rows(&counted, &hidden)?.matmul(&weight.t()?)?;
    match bias {
        Some(bias) => logits.broadcast_add(bias),
        None => Ok(logits),
    }
}

/// The loss.
pub(crate) fn loss(
    linear: &Linear,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    target: &Tensor,
) -> Result<Tensor> {
    let logits = logits(linear, hidden, weight, bias, target)?;
    let loss = composed::loss(&linear.problem, &logits, &target.flatten_all()?)?;
    loss.reshape(linear.loss_shape(target))
}

/// The loss, and the statistics of each row.
pub(crate) fn loss_and_statistics(
    linear: &Linear,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    target: &Tensor,
) -> Result<(Tensor, RowStatistics)> {
    let (logits, indices) = (logits(linear, hidden, weight, bias, target)?, target.flatten_all()?);
    let composed = ComposedLoss::new(&linear.problem, &logits, &indices)?;
    let rows = composed.statistics(&linear.problem, &logits, &indices)?;
    // no prediction of an ignored row, as its logits are not those of its hidden states
    let argmax = (&rows.argmax * rows.counted.to_dtype(DType::U32)?)?;
    let rows = RowStatistics { argmax, ..rows }.try_map(|_, values| values.reshape(target.shape()))?;
    Ok((composed.loss.reshape(linear.loss_shape(target))?, rows))
}

/// The loss, and its gradients for an upstream gradient of the grad scale everywhere.
pub(crate) fn loss_and_grad(
    linear: &Linear,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    target: &Tensor,
) -> Result<(Tensor, LinearGradients)> {
    let var = |tensor: &Tensor| Var::from_tensor(&tensor.detach());
    let (hidden, weight, bias) = (var(hidden)?, var(weight)?, bias.map(var).transpose()?);
    let loss = loss(linear, &hidden, &weight, bias.as_deref(), target)?;
    let mut grads = (&loss * linear.problem.options.rows.grad_scale)?.backward()?;
    let mut grad = |of: &Var| grads.remove(of).map_or_else(|| of.zeros_like(), Ok);
    let (hidden, weight, bias) = (grad(&hidden)?, grad(&weight)?, bias.as_ref().map(grad).transpose()?);
    Ok((loss.detach(), LinearGradients { hidden, weight, bias }))
}
