//! Negative log-likelihood, and the log-softmax it is used with.

use crate::check::arithmetic_dtype;
use crate::nll::problem::Nll;
use crate::reduction::{Normalizer, Reduction};
use crate::rows::options::RowOptions;
use crate::softmax;
use candle_core::shape::Dim;
use candle_core::{Result, Tensor};

const NAME: &str = "nll";
const LOG_SOFTMAX: &str = "log_softmax";

/// Negative log-likelihood of log-probabilities and class indices.
///
/// For a row of log-probabilities x with target class t: `loss = -w[t] x_t`, in nats. `Mean` divides the sum by `sum
/// w[t]` over the rows that are not ignored, which without weights is their number; row weights are factors of both.
/// Applied to [`log_softmax`] of
/// logits this is [`CrossEntropyLoss`](crate::CrossEntropyLoss) of the logits, which takes half the passes.
///
/// Definition: [`torch.nn.NLLLoss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.NLLLoss.html).
///
/// # Shapes
/// Log-probabilities `(C)`, `(N, C)` or `(N, C, d1, …, dk)` in any layout with class indices of shape `()`, `(N)` or
/// `(N, d1, …, dk)`. The loss is a scalar, or with [`Reduction::None`] has the target's shape.
///
/// # Dtypes
/// Log-probabilities f16, bf16, f32 or f64; class indices u8, u32, i16, i32 or i64. The loss is f32 (f64 for f64); the
/// gradient has the input's dtype.
///
/// # Numerics
/// One number of each row is read. Ignored rows are exact zeros whatever they hold. Where all rows are ignored, `Mean`
/// is NaN.
///
/// # Errors
/// As for [`CrossEntropyLoss`](crate::CrossEntropyLoss).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{NllLoss, log_softmax};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[0.1f32, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.5, 0.2]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0, 2], &Device::Cpu)?;
/// let loss = NllLoss::new().with_ignore_index(0).forward(&log_softmax(&x, 1)?, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 1.003890).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct NllLoss {
    pub(crate) options: RowOptions,
}

impl NllLoss {
    /// The defaults: no weights, ignore index -100, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::NllLoss;
    /// let log_probs = Tensor::new(&[[-0.5f32, -1., -2.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32], &Device::Cpu)?;
    /// let loss = NllLoss::new().forward(&log_probs, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 2.0).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        NllLoss { options: RowOptions::default() }
    }

    row_setters! {
        loss: "NllLoss",
        inputs: "let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;\n\
                 let log_probs = candle_fused_loss::log_softmax(&logits, 1)?;\n\
                 let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;",
        args: "(&log_probs, &target)",
        options: self.options,
    }

    /// The loss, differentiable in the log-probabilities.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let log_probs = Tensor::new(&[[-0.5f32, -1., -2.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u32], &Device::Cpu)?;
    /// let loss = candle_fused_loss::NllLoss::new().forward(&log_probs, &target)?;
    /// assert_eq!(loss.to_scalar::<f32>()?, 1.0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
        Nll::new(NAME, &self.options, log_probs, target)?.forward(log_probs, target)
    }

    /// The loss, and its gradient in the log-probabilities for an upstream gradient of ones, without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let log_probs = Tensor::new(&[[-0.5f32, -1., -2.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u32], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::NllLoss::new().loss_and_grad(&log_probs, &target)?;
    /// assert_eq!(grad.to_vec2::<f32>()?, [[0., -1., 0.]]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, log_probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        Nll::new(NAME, &self.options, log_probs, target)?.loss_and_grad(log_probs, target)
    }
}

/// The mean negative log-likelihood of log-probabilities `(N, C)` and class indices `(N)`, in nats: [`NllLoss`] with
/// its defaults, under the signature of `candle_nn::loss::nll`.
///
/// The formula, the other shapes, dtypes, numerics, errors and the definition's source are those of [`NllLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[0.1f32, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.5, 0.2]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0, 1], &Device::Cpu)?;
/// let loss = candle_fused_loss::nll(&candle_fused_loss::log_softmax(&x, 1)?, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.799169).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn nll(log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    NllLoss::new().forward(log_probs, target)
}

/// `x - log sum exp(x)` along an axis, differentiable.
///
/// The log-probabilities are in nats, computed in f32 (f64 for f64) and rounded once to the input's dtype; the one of a
/// very probable class keeps its relative accuracy. The gradient is `g - p sum(g)` with p from the input, not from the
/// rounded result, so that a 16-bit gradient has no error but its own rounding.
///
/// Definition: [`torch.nn.LogSoftmax`](https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSoftmax.html).
///
/// # Shapes
/// Any shape, layout and axis; the result has the input's shape. Where the axis is not the last one but its elements
/// are adjacent in memory, the result keeps the input's memory order, so it is not contiguous.
///
/// # Dtypes
/// f16, bf16, f32, f64.
///
/// # Numerics
/// As for [`CrossEntropyLoss`](crate::CrossEntropyLoss): finite where the input is, or -inf for a result that is
/// beyond the dtype's lowest number; NaN only in rows without a softmax.
///
/// # Errors
/// An axis outside of the shape, or a dtype that is not a float.
///
/// # Example
/// ```
/// use candle_core::{D, Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1e8f32, 1e8]], &Device::Cpu)?;
/// let y = candle_fused_loss::log_softmax(&x, D::Minus1)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-std::f32::consts::LN_2; 2]]);
/// # Ok(())
/// # }
/// ```
pub fn log_softmax<D: Dim>(logits: &Tensor, dim: D) -> Result<Tensor> {
    log_softmax_by(true, logits, dim)
}

/// By a kernel where it is `fused`.
pub(crate) fn log_softmax_by<D: Dim>(fused: bool, logits: &Tensor, dim: D) -> Result<Tensor> {
    let axis = dim.to_index(logits.shape(), LOG_SOFTMAX)?;
    arithmetic_dtype(LOG_SOFTMAX, "logits", logits)?;
    if logits.elem_count() == 0 {
        return Ok(logits.clone());
    }
    softmax::op::log_softmax(LOG_SOFTMAX, fused, logits, axis)
}
