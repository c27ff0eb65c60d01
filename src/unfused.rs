//! The losses composed of candle's tensor ops.
//!
//! The same free functions and loss objects as at the crate's root, as a readable specification, as the oracle that the
//! fused kernels are tested against, as the baseline of the benchmarks, and as the path for devices without a kernel
//! (Metal), to which the fused losses turn by themselves. Every op makes a tensor of its own, so all of this is slower and
//! needs more memory; and it lacks what only a kernel can do: losses and gradients below the spacing of f32 around 1 are
//! rounded to 0, and statistics and in-place gradients don't exist.
//!
//! Class indices are checked on the CPU by candle's gather; probabilities are not checked at all.
//!
//! # Example
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_fused_loss::{CrossEntropyLoss, unfused};
//! # fn main() -> candle_core::Result<()> {
//! let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
//! let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
//! let fused = CrossEntropyLoss::new().with_z_loss(1e-3).forward(&logits, &target)?;
//! let composed = unfused::CrossEntropyLoss::new().with_z_loss(1e-3).forward(&logits, &target)?;
//! assert!((fused - composed)?.abs()?.to_scalar::<f32>()? < 1e-6);
//! # Ok(())
//! # }
//! ```

use crate::elementwise::op::{Logistic, Term};
use crate::losses::linear_cross_entropy::LinearGradients;
use crate::losses::{binary, focal, multi_label};
use crate::reduction::{Reduction, Unfused};
use crate::softmax::op::CrossEntropy;
use candle_core::shape::Dim;
use candle_core::{D, DType, Result, Tensor, Var};

/// [`crate::CrossEntropyLoss`] without a kernel.
pub type CrossEntropyLoss = crate::losses::cross_entropy::CrossEntropyLoss<Unfused>;
/// [`crate::NllLoss`] without a kernel.
pub type NllLoss = crate::losses::nll::NllLoss<Unfused>;
/// [`crate::BceLoss`] without a kernel.
pub type BceLoss = crate::losses::binary::BceLoss<Unfused>;
/// [`crate::BceWithLogitsLoss`] without a kernel.
pub type BceWithLogitsLoss = crate::losses::binary::BceWithLogitsLoss<Unfused>;
/// [`crate::MultiLabelSoftMarginLoss`] without a kernel.
pub type MultiLabelSoftMarginLoss = crate::losses::multi_label::MultiLabelSoftMarginLoss<Unfused>;
/// [`crate::SigmoidFocalLoss`] without a kernel.
pub type SigmoidFocalLoss = crate::losses::focal::SigmoidFocalLoss<Unfused>;

/// [`crate::LinearCrossEntropyLoss`] without a kernel: all logits at once.
pub type LinearCrossEntropyLoss = crate::losses::linear_cross_entropy::LinearCrossEntropyLoss<Unfused>;

/// Whether the tensor's device has no kernel.
pub(crate) fn only(tensor: &Tensor) -> bool {
    tensor.device().is_metal()
}

/// [`crate::cross_entropy()`] without a kernel.
pub fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    CrossEntropyLoss::new().forward(logits, target)
}

/// [`crate::nll()`] without a kernel.
pub fn nll(log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    NllLoss::new().forward(log_probs, target)
}

/// [`crate::binary_cross_entropy`] without a kernel.
pub fn binary_cross_entropy(probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceLoss::new().forward(probs, target)
}

/// [`crate::binary_cross_entropy_with_logits`] without a kernel.
pub fn binary_cross_entropy_with_logits(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceWithLogitsLoss::new().forward(logits, target)
}

/// [`crate::binary_cross_entropy_with_logit`] without a kernel.
pub fn binary_cross_entropy_with_logit(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    binary_cross_entropy_with_logits(logits, target)
}

/// [`crate::multi_label_soft_margin`] without a kernel.
pub fn multi_label_soft_margin(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    MultiLabelSoftMarginLoss::new().forward(logits, target)
}

/// [`crate::sigmoid_focal`] without a kernel.
pub fn sigmoid_focal(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    SigmoidFocalLoss::new().forward(logits, target)
}

/// [`crate::linear_cross_entropy()`] without a kernel.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor> {
    LinearCrossEntropyLoss::new().forward(hidden, weight, None, target)
}

/// [`crate::log_softmax`] without a kernel.
pub fn log_softmax<A: Dim>(logits: &Tensor, dim: A) -> Result<Tensor> {
    let x = logits.to_dtype(arithmetic(logits))?;
    let (shifted, log_sum, _) = shifted_log_sum(&x, dim.to_index(logits.shape(), "log_softmax")?)?;
    shifted.broadcast_sub(&log_sum)?.to_dtype(logits.dtype())
}

impl CrossEntropyLoss {
    /// As [`crate::losses::cross_entropy::CrossEntropyLoss::forward`] with a kernel.
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        softmax_family(&self.options.problem("cross_entropy", false, logits, target)?, logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones.
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(logits, |logits| self.forward(logits, target))
    }
}

impl NllLoss {
    /// As [`crate::losses::nll::NllLoss::forward`] with a kernel.
    pub fn forward(&self, log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
        softmax_family(&self.options.problem("nll", true, log_probs, target)?, log_probs, target)
    }

    /// The loss, and its gradient in the log-probabilities for an upstream gradient of ones.
    pub fn loss_and_grad(&self, log_probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(log_probs, |log_probs| self.forward(log_probs, target))
    }
}

impl BceLoss {
    /// As [`crate::losses::binary::BceLoss::forward`] with a kernel.
    pub fn forward(&self, probs: &Tensor, target: &Tensor) -> Result<Tensor> {
        logistic_family(&self.options.problem(binary::BCE, Term::Bce, probs, target)?, probs, target)
    }

    /// The loss, and its gradient in the probabilities for an upstream gradient of ones.
    pub fn loss_and_grad(&self, probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(probs, |probs| self.forward(probs, target))
    }
}

impl BceWithLogitsLoss {
    /// As [`crate::losses::binary::BceWithLogitsLoss::forward`] with a kernel.
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        logistic_family(
            &self.options.problem(binary::BCE_WITH_LOGITS, Term::BceWithLogits, logits, target)?,
            logits,
            target,
        )
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones.
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(logits, |logits| self.forward(logits, target))
    }
}

impl MultiLabelSoftMarginLoss {
    /// As [`crate::losses::multi_label::MultiLabelSoftMarginLoss::forward`] with a kernel.
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        logistic_family(&self.options.multi_label_problem(multi_label::NAME, logits, target)?, logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones.
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(logits, |logits| self.forward(logits, target))
    }
}

impl SigmoidFocalLoss {
    /// As [`crate::losses::focal::SigmoidFocalLoss::forward`] with a kernel.
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        logistic_family(&self.options.problem(focal::NAME, self.term(), logits, target)?, logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones.
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        through_autograd(logits, |logits| self.forward(logits, target))
    }
}

impl LinearCrossEntropyLoss {
    /// As [`crate::losses::linear_cross_entropy::LinearCrossEntropyLoss::forward`] with a kernel; the size of chunks means nothing.
    pub fn forward(&self, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Tensor> {
        let linear = self.options.problem("linear_cross_entropy", hidden, weight, bias, target)?;
        let rows = target.elem_count();
        let mut logits = hidden.reshape((rows, weight.dim(1)?))?.matmul(&weight.t()?)?;
        if let Some(bias) = bias {
            logits = logits.broadcast_add(bias)?;
        }
        let loss = softmax_family(&linear.problem, &logits, &target.flatten_all()?)?;
        if linear.problem.reduction == Reduction::None { loss.reshape(target.shape()) } else { Ok(loss) }
    }

    /// The loss, and its gradients for an upstream gradient of ones.
    pub fn loss_and_grad(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, LinearGradients)> {
        let var = |tensor: &Tensor| Var::from_tensor(&tensor.detach());
        let (hidden, weight, bias) = (var(hidden)?, var(weight)?, bias.map(var).transpose()?);
        let loss = self.forward(&hidden, &weight, bias.as_deref(), target)?;
        let mut grads = loss.backward()?;
        let mut grad = |of: &Var| grads.remove(of).map_or_else(|| of.zeros_like(), Ok);
        let (hidden, weight, bias) = (grad(&hidden)?, grad(&weight)?, bias.as_ref().map(grad).transpose()?);
        Ok((loss.detach(), LinearGradients { hidden, weight, bias }))
    }
}

fn arithmetic(tensor: &Tensor) -> DType {
    if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

fn through_autograd(input: &Tensor, loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let input = Var::from_tensor(&input.detach())?;
    let loss = loss(&input)?;
    let grad = loss.backward()?.remove(&input);
    Ok((loss.detach(), grad.map_or_else(|| input.zeros_like(), Ok)?))
}

/// `x - m`, `log sum exp(x - m)` and m along an axis.
fn shifted_log_sum(x: &Tensor, axis: usize) -> Result<(Tensor, Tensor, Tensor)> {
    // as a constant: the gradient of the sum of both parts does not depend on it
    let max = x.max_keepdim(axis)?.detach();
    let shifted = x.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(axis)?.log()?;
    Ok((shifted, log_sum, max))
}

/// `factor * value`, 0 where the factor is 0.
fn scaled(factor: &Tensor, value: &Tensor) -> Result<Tensor> {
    factor.eq(0f64)?.where_cond(&value.zeros_like()?, &(factor * value)?)
}

fn softmax_family(o: &CrossEntropy, input: &Tensor, target: &Tensor) -> Result<Tensor> {
    let dtype = arithmetic(input);
    let classes = input.dims()[o.axis];
    // every row of classes as a row of a matrix
    let as_matrix = |t: &Tensor| {
        let mut order: Vec<usize> = (0..t.rank()).filter(|&axis| axis != o.axis).collect();
        order.push(o.axis);
        let rows = t.elem_count() / classes;
        t.permute(order)?.reshape((rows, classes))
    };
    let mut row_dims = input.dims().to_vec();
    row_dims.remove(o.axis);
    let mut x = as_matrix(input)?.to_dtype(dtype)?;
    let rows = x.dim(0)?;
    let indices = (!target.dtype().is_float()).then(|| target.flatten_all()?.to_dtype(DType::I64)).transpose()?;

    // what counts, as 0 and 1; an ignored row is replaced by zeros, so that its NaN goes nowhere
    let counted = match &indices {
        Some(indices) => indices.ne(o.ignore_index)?,
        None => Tensor::ones(rows, DType::U8, input.device())?,
    };
    if indices.is_some() {
        let counted = counted.unsqueeze(1)?.broadcast_as((rows, classes))?;
        x = counted.where_cond(&x, &x.zeros_like()?)?;
    }
    if o.logit_scale != 1.0 {
        x = (x * o.logit_scale)?;
    }
    if let Some(cap) = o.softcap {
        x = ((x / cap)?.tanh()? * cap)?;
    }
    let (log_probs, lse) = if o.log_probs {
        (x, None)
    } else {
        let (shifted, log_sum, max) = shifted_log_sum(&x, 1)?;
        (shifted.broadcast_sub(&log_sum)?, Some((log_sum + max)?.squeeze(1)?))
    };
    let weight = match &o.weight {
        Some(weight) => weight.clone(),
        None => Tensor::ones(classes, dtype, input.device())?,
    };
    let e = o.label_smoothing;
    let counted = counted.to_dtype(dtype)?;
    let (mut loss, denominator) = match &indices {
        Some(indices) => {
            // any class will do for an ignored row
            let safe = indices.ne(o.ignore_index)?.where_cond(indices, &indices.zeros_like()?)?;
            let row_weight = (weight.index_select(&safe, 0)? * &counted)?;
            let nll = scaled(&row_weight, &log_probs.gather(&safe.unsqueeze(1)?, 1)?.squeeze(1)?)?.neg()?;
            let mut loss = (nll * (1.0 - e))?;
            if e > 0.0 {
                let smooth = scaled(&weight.broadcast_as((rows, classes))?.contiguous()?, &log_probs)?.sum(1)?.neg()?;
                loss = (loss + (smooth * &counted)? * (e / classes as f64))?;
            }
            (loss, row_weight.sum_all()?)
        }
        None => {
            let target = as_matrix(target)?.to_dtype(dtype)?.affine(1.0 - e, e / classes as f64)?;
            let target = target.broadcast_mul(&weight)?;
            (scaled(&target, &log_probs)?.sum(1)?.neg()?, counted.sum_all()?)
        }
    };
    if let (Some(lse), true) = (lse, o.z_loss != 0.0) {
        loss = (loss + (lse.sqr()? * &counted)? * o.z_loss)?;
    }
    match (o.reduction, o.normalizer) {
        (Reduction::None, _) => loss.reshape(row_dims),
        (Reduction::Sum, _) => loss.sum_all(),
        (Reduction::Mean, Some(normalizer)) => loss.sum_all()? / normalizer,
        (Reduction::Mean, None) => loss.sum_all()? / denominator,
    }
}

/// `max(x, 0) + log(1 + exp(-|x|))`
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

fn logistic_family(o: &Logistic, input: &Tensor, target: &Tensor) -> Result<Tensor> {
    let dtype = arithmetic(input);
    let x = input.to_dtype(dtype)?.contiguous()?;
    let e = o.label_smoothing;
    let t = target.to_dtype(dtype)?.contiguous()?.affine(1.0 - e, e / 2.0)?;
    let not_t = t.affine(-1.0, 1.0)?;
    let positive = match &o.pos_weight {
        Some(p) => (&t * p.contiguous()?)?,
        None => t.clone(),
    };
    let cross_entropy = || scaled(&positive, &softplus(&x.neg()?)?)? + scaled(&not_t, &softplus(&x)?)?;
    let mut loss = match o.term {
        Term::Bce => {
            let clamped_log = |x: &Tensor| x.log()?.maximum(-100f64);
            (((&t * clamped_log(&x)?)? + (&not_t * clamped_log(&x.affine(-1.0, 1.0)?)?)?)?).neg()?
        }
        Term::BceWithLogits => cross_entropy()?,
        Term::Focal { alpha, gamma } => {
            let p = candle_nn::ops::sigmoid(&x)?;
            let wrong = ((&t * p.affine(-1.0, 1.0)?)? + (&not_t * &p)?)?;
            let loss = if gamma == 0.0 { cross_entropy()? } else { (wrong.powf(gamma)? * cross_entropy()?)? };
            match alpha {
                Some(alpha) => (loss * ((&t * alpha)? + (&not_t * (1.0 - alpha))?)?)?,
                None => loss,
            }
        }
    };
    if let Some(weight) = &o.weight {
        loss = (loss * weight.contiguous()?)?;
    }
    let counted = match &o.mask {
        Some(mask) => {
            let counted = mask.contiguous()?.ne(0f64)?;
            loss = counted.where_cond(&loss, &loss.zeros_like()?)?;
            counted.to_dtype(dtype)?.sum_all()?
        }
        None => Tensor::new(loss.elem_count() as f64, input.device())?.to_dtype(dtype)?,
    };
    match (o.reduction, o.average_rows) {
        (Reduction::None, true) => loss.mean(D::Minus1),
        (Reduction::None, false) => Ok(loss),
        (Reduction::Sum, true) => loss.sum_all()? / loss.dim(D::Minus1)? as f64,
        (Reduction::Sum, false) => loss.sum_all(),
        (Reduction::Mean, _) => loss.sum_all()? / counted,
    }
}
