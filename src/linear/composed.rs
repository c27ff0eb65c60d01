//! Linear cross-entropy in candle's tensor ops: all logits at once.

use super::problem::{Linear, LinearGradients};
use crate::reduction::Reduction;
use crate::softmax::composed;
use candle_core::{Result, Tensor, Var};

/// The loss.
pub(crate) fn loss(
    linear: &Linear,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    target: &Tensor,
) -> Result<Tensor> {
    let mut logits = hidden.reshape((target.elem_count(), weight.dim(1)?))?.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        logits = logits.broadcast_add(bias)?;
    }
    let loss = composed::loss(&linear.problem, &logits, &target.flatten_all()?)?;
    match linear.problem.options.rows.reduction {
        Reduction::None => loss.reshape(target.shape()),
        Reduction::Mean | Reduction::Sum => Ok(loss),
    }
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
