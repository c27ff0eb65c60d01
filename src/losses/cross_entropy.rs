//! Cross-entropy.

use crate::check;
use crate::reduction::{Normalizer, Reduction};
use crate::softmax::problem::{RowStatistics, SoftmaxOptions};
use crate::softmax::transform::RowTransform;
use candle_core::{Result, Tensor, bail};

const NAME: &str = "cross_entropy";

/// Cross-entropy of logits and class indices or class probabilities, with every option of PyTorch and a few more.
///
/// For a row of logits x with target class t, in nats:
///
/// ```text
/// loss = w[t] (log sum_c exp(x_c) - x_t)                          class indices
/// loss = -sum_c w_c t_c log softmax(x)_c                          probabilities t
/// ```
///
/// Label smoothing e replaces the target by `(1 - e) target + e / C`, for a class index as `(1 - e) loss + (e / C)
/// sum_c w_c (log sum exp(x) - x_c)`. `Mean` divides the sum by `sum w[t]` over the rows that are not ignored, which
/// without weights is their number; with probabilities it divides by the number of rows. Row weights r
/// ([`with_row_weight`](Self::with_row_weight)) make the loss of a row `r loss` and the denominator `sum r w[t]`, or
/// `sum r`; [`with_normalizer`](Self::with_normalizer) takes the place of either.
///
/// Definition:
/// [`torch.nn.CrossEntropyLoss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html);
/// z-loss: PaLM (Chowdhery et al. 2022); soft cap: Gemma 2; row transforms:
/// [`RowTransform`](crate::RowTransform).
///
/// # Shapes
/// Logits `(C)`, `(N, C)` or `(N, C, d1, …, dk)` in any layout, or with the classes along another axis
/// ([`with_class_axis`](Self::with_class_axis)). A target of the logits' shape holds probabilities, a
/// target of shape `()`, `(N)` or `(N, d1, …, dk)` holds class indices. The loss is a scalar, or with
/// [`Reduction::None`] has the shape of class indices.
///
/// # Dtypes
/// Logits and probabilities f16, bf16, f32 or f64; class indices u8, u32, i16, i32 or i64. Arithmetic and loss are f32
/// (f64 for f64); the gradient has the logits' dtype, rounded once.
///
/// # Numerics
/// The gradient is finite for all finite logits (the z-loss's where `2 z lse` is). So is the loss, unless it is beyond
/// the largest number: it is inf where it contains a difference of logits that is, as of 3e38 and -3e38 in f32. A logit
/// scale multiplies the differences to the row's largest logit, not the logits, which could overflow. Classes at -inf
/// are fine (with a scale above 0). A row that is all -inf, or that has a +inf or a NaN, is NaN, and no other row is
/// affected. The sum over a row is kept without its largest term, so that even a loss of 4e-9 and its gradient are
/// accurate. Ignored rows, and rows of weight 0, are exact zeros whatever they hold. The bits of the result don't
/// depend on the number of threads. Where all rows are ignored, or all targets weigh 0, `Mean` is NaN and the gradient
/// zero.
///
/// # Errors
/// Tensors whose shapes, dtypes or devices don't fit, options out of range, and on the CPU a class index outside of
/// `0..C` other than the ignore index. On CUDA that row's loss and gradient are NaN instead, unless
/// [`with_target_check`](Self::with_target_check) is on. Setters check nothing: all errors come from the call that
/// takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_fused_loss::CrossEntropyLoss;
/// # fn main() -> candle_core::Result<()> {
/// let logits = Var::new(&[[1f32, 2., 3.], [1., 2., 0.], [0., 2., 1.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2i64, 0, -100], &Device::Cpu)?;
/// let loss = CrossEntropyLoss::new().with_label_smoothing(0.1).forward(&logits, &target)?;
/// let grads = loss.backward()?;
/// assert!((loss.to_scalar::<f32>()? - 0.957606).abs() < 1e-6);
/// assert_eq!(grads.get(&logits).unwrap().to_vec2::<f32>()?[2], [0., 0., 0.]); // the ignored row
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct CrossEntropyLoss {
    pub(crate) options: SoftmaxOptions,
}

impl CrossEntropyLoss {
    /// The defaults: no weights, ignore index -100, no smoothing, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::CrossEntropyLoss;
    /// let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
    /// let loss = CrossEntropyLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.907606).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        CrossEntropyLoss { options: SoftmaxOptions::default() }
    }

    softmax_setters! {
        loss: "CrossEntropyLoss",
        inputs: "let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
    }

    /// The loss, differentiable in the logits and, where they are probabilities, in the targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[[20f32, 0., 0.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[0u32], &Device::Cpu)?;
    /// let loss = candle_fused_loss::CrossEntropyLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 4.122307e-9).abs() < 1e-15);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.problem(NAME, logits, target)?.forward(logits, target)
    }

    /// The loss as [`forward`](Self::forward) returns it, and its gradient in the logits for an upstream gradient of
    /// ones (with [`Reduction::None`] each row's own), in one pass and without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu)?;
    /// let target = Tensor::new(&[1u32], &Device::Cpu)?;
    /// let (loss, grad) = candle_fused_loss::CrossEntropyLoss::new().loss_and_grad(&logits, &target)?;
    /// assert_eq!(grad.to_vec2::<f32>()?, [[0.25, -0.75, 0.25, 0.25]]);
    /// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.problem(NAME, logits, target)?.loss_and_grad(logits, target)
    }

    /// As [`loss_and_grad`](Self::loss_and_grad), but the gradient overwrites the logits, and so the values of every
    /// tensor that shares their storage. With [`with_fused(false)`](Self::with_fused) too, though a gradient is
    /// allocated then and copied over the logits.
    ///
    /// # Errors
    /// In addition, logits that are not contiguous, that share their storage with the target, or that autograd tracks.
    /// `detach` alone makes those legal, but the storage stays the same: a detached variable becomes its gradient.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu)?;
    /// let target = Tensor::new(&[1u32], &Device::Cpu)?;
    /// let loss = candle_fused_loss::CrossEntropyLoss::new().loss_and_grad_inplace(&logits, &target)?;
    /// assert_eq!(logits.to_vec2::<f32>()?, [[0.25, -0.75, 0.25, 0.25]]);
    /// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad_inplace(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        if logits.track_op() {
            bail!(
                "{NAME}: logits of shape {:?} are tracked by autograd, whose backward needs the values that the \
                 gradient would replace, as does the variable of which they may be a view, expected a copy \
                 (`logits.detach().copy()?`), or loss_and_grad",
                logits.dims()
            );
        }
        if !logits.is_contiguous() {
            return Err(check::not_contiguous(NAME, logits.layout()));
        }
        self.options.problem(NAME, logits, target)?.loss_and_grad_inplace(logits, target)
    }

    /// The numbers of each row that a training loop may want to log, in one pass and without a graph. With
    /// [`with_fused(false)`](Self::with_fused) they are composed of candle's tensor ops.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu)?;
    /// let target = Tensor::new(&[1u32], &Device::Cpu)?;
    /// let rows = candle_fused_loss::CrossEntropyLoss::new().statistics(&logits, &target)?;
    /// assert!((rows.entropy.to_vec1::<f32>()?[0] - 4f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn statistics(&self, logits: &Tensor, target: &Tensor) -> Result<RowStatistics> {
        let (logits, target) = (&logits.detach(), &target.detach());
        Ok(self.options.problem(NAME, logits, target)?.forward_with_statistics(logits, target)?.1)
    }

    /// The loss as [`forward`](Self::forward) returns it, differentiable, and the statistics of each row as
    /// [`statistics`](Self::statistics) returns them, without a graph: from one pass over the logits.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Var::new(&[[1f32, 2., 3.], [5., 2., 0.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32, 1], &Device::Cpu)?;
    /// let loss = candle_fused_loss::CrossEntropyLoss::new();
    /// let (loss, rows) = loss.forward_with_statistics(&logits, &target)?;
    /// loss.backward()?;
    /// assert!((loss.to_scalar::<f32>()? - 1.731296).abs() < 1e-5);
    /// assert_eq!(rows.accuracy()?.to_scalar::<f32>()?, 0.5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward_with_statistics(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, RowStatistics)> {
        self.options.problem(NAME, logits, target)?.forward_with_statistics(logits, target)
    }
}

/// The mean cross-entropy of logits `(N, C)` and class indices `(N)`, in nats: [`CrossEntropyLoss`] with its defaults,
/// under the signature of `candle_nn::loss::cross_entropy`.
///
/// The formula, the other shapes, dtypes, numerics, errors and the definition's source are those of
/// [`CrossEntropyLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.], [0., 2., 1.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0, 1], &Device::Cpu)?;
/// let loss = candle_fused_loss::cross_entropy(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.740939).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    CrossEntropyLoss::new().forward(logits, target)
}
