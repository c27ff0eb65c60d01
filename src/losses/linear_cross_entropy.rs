//! Cross-entropy of a linear layer's output, without the logits.

use crate::linear::problem::{LinearGradients, LinearOptions};
use crate::reduction::{Normalizer, Reduction};
use crate::softmax::problem::RowStatistics;
use crate::softmax::transform::RowTransform;
use candle_core::{Result, Tensor};

const NAME: &str = "linear_cross_entropy";

/// Cross-entropy of the logits `hidden weightᵀ + bias`, of which only a chunk of rows exists at a time.
///
/// This is the last layer of a language model and its loss in one. With a vocabulary of 32 000 and more, the logits of
/// a batch are larger than everything else in a training step. Loss and gradients are those of [`CrossEntropyLoss`] on
/// `hidden.matmul(weight.t()) + bias`, with all of its options, in nats:
///
/// ```text
/// x = hidden weightᵀ + bias
/// loss = w[t] (log sum_c exp(x_c) - x_t)
/// ```
///
/// Where an input is tracked by autograd, the forward computes the gradients too, from each chunk's logits while they
/// exist, and the backward scales them. That is 6NDV operations altogether, as many as without chunks. With
/// [`Reduction::None`] the backward computes the logits again (8NDV), as does a second backward on the same graph. On
/// CUDA a single chunk becomes the gradient of its logits in the forward and those of the inputs in the backward, 6NDV
/// with every reduction. Without tracked inputs nothing is kept.
///
/// Definition: as [`CrossEntropyLoss`]; the chunks: Liger Kernel (Hsu et al. 2024).
///
/// [`CrossEntropyLoss`]: crate::CrossEntropyLoss
///
/// # Shapes
/// Hidden states `(…, D)`, weight `(V, D)`, bias `(V)` and class indices `(…)`. The loss is a scalar, or with
/// [`Reduction::None`] has the target's shape.
///
/// # Dtypes
/// Hidden states, weight and bias f16, bf16, f32 or f64, all the same; class indices u8, u32, i16, i32 or i64. The loss
/// is f32 (f64 for f64); gradients have their input's dtype. For 16-bit inputs the gradients are summed over all rows
/// in f32 and rounded once, the mean's denominator and the upstream gradient included; the logits and their gradient
/// are f32 on the CPU, and on CUDA, where tensor cores multiply them, have the inputs' dtype.
///
/// # Numerics
/// As [`CrossEntropyLoss`]. The size of the chunks changes nothing but the rounding of sums. Ignored rows take part in
/// no product, so that their values have no effect; on the CPU they cost nothing.
///
/// # Memory
/// Beyond inputs and gradients: a chunk's logits (32 MB on the CPU, 512 MB on CUDA, or what
/// [`with_chunk_rows`](Self::with_chunk_rows) asks for), and for 16-bit inputs the f32 sums that become the gradients,
/// 4VD bytes for the weight's. With 16-bit inputs on CUDA, all rows are one chunk, without sums, if their logits take
/// no more than 512 MB and the sums would; else a chunk's logits may take as much as the weight's sum. Forwards without
/// tracked inputs stay with 512 MB. On top of that, candle's backward adds each gradient to a tensor of zeros;
/// [`loss_and_grad`](LinearCrossEntropyLoss::loss_and_grad) does not.
///
/// # Errors
/// Tensors whose shapes, dtypes or devices don't fit, options out of range, chunks of 0 rows, and on the CPU a class
/// index outside of `0..V` other than the ignore index. On CUDA that row's loss is NaN instead, and with it every
/// gradient that it enters, unless [`with_target_check`](Self::with_target_check) is on. Setters check nothing: all
/// errors come from the call that takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_fused_loss::LinearCrossEntropyLoss;
/// # fn main() -> candle_core::Result<()> {
/// let hidden = Var::zeros((2, 5, 8), DType::F32, &Device::Cpu)?; // sequences of 5, 8 features
/// let weight = Var::ones((100, 8), DType::F32, &Device::Cpu)?; // 100 classes
/// let target = Tensor::zeros((2, 5), DType::U32, &Device::Cpu)?;
/// let loss = LinearCrossEntropyLoss::new().with_z_loss(1e-4).forward(&hidden, &weight, None, &target)?;
/// let grads = loss.backward()?;
/// assert!((loss.to_scalar::<f32>()? - 4.607291).abs() < 1e-5);
/// assert_eq!(grads.get(&weight).unwrap().dims(), [100, 8]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct LinearCrossEntropyLoss {
    pub(crate) options: LinearOptions,
}

impl LinearCrossEntropyLoss {
    /// The defaults: no class weights, ignore index -100, no smoothing, mean, chunks by memory.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::LinearCrossEntropyLoss;
    /// let hidden = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
    /// let weight = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
    /// let loss = LinearCrossEntropyLoss::new().forward(&hidden, &weight, None, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.907606).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        LinearCrossEntropyLoss { options: LinearOptions::default() }
    }

    softmax_setters! {
        loss: "LinearCrossEntropyLoss",
        inputs: "let hidden = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;\n\
                 let weight = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;",
        args: "(&hidden, &weight, None, &target)",
        options: self.options.softmax,
        grad: ".hidden",
    }

    /// Sets how many rows' logits exist at a time, at least 1; by default as many as [Memory](Self#memory) says. The
    /// loss is the same up to rounding. Fewer rows save memory, but below about 128 rows on a CPU the products become
    /// so thin that they cost time. Without effect with [`with_fused(false)`](Self::with_fused), which makes all logits
    /// at once.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::LinearCrossEntropyLoss;
    /// let hidden = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
    /// let weight = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
    /// let loss = LinearCrossEntropyLoss::new().with_chunk_rows(1).forward(&hidden, &weight, None, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.907606).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_chunk_rows(mut self, rows: usize) -> Self {
        self.options.chunk_rows = Some(rows);
        self
    }

    /// The loss, differentiable in the hidden states, the weight and the bias.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let hidden = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
    /// let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
    /// let bias = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    /// let target = Tensor::new(&[0u32, 3, 1], &Device::Cpu)?;
    /// let loss = candle_fused_loss::LinearCrossEntropyLoss::new().forward(&hidden, &weight, Some(&bias), &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Tensor> {
        self.options.problem(NAME, hidden, weight, bias, target)?.forward(hidden, weight, bias, target)
    }

    /// The loss as [`forward`](Self::forward) returns it, differentiable, and the statistics of each row, without a
    /// graph, from the same logits. Those of an ignored row, whose logits are never made, are 0, its `argmax` too.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # fn main() -> candle_core::Result<()> {
    /// let hidden = Var::new(&[[1f32, 2., 3.], [5., 2., 0.]], &Device::Cpu)?;
    /// let weight = Tensor::new(&[[1f32, 0., 0.], [0., 1., 0.], [0., 0., 1.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2u32, 1], &Device::Cpu)?;
    /// let loss = candle_fused_loss::LinearCrossEntropyLoss::new();
    /// let (loss, rows) = loss.forward_with_statistics(&hidden, &weight, None, &target)?;
    /// loss.backward()?;
    /// assert!((loss.to_scalar::<f32>()? - 1.731296).abs() < 1e-5);
    /// assert_eq!(rows.accuracy()?.to_scalar::<f32>()?, 0.5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward_with_statistics(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, RowStatistics)> {
        self.options.problem(NAME, hidden, weight, bias, target)?.forward_with_statistics(hidden, weight, bias, target)
    }

    /// The loss as [`forward`](Self::forward) returns it, and its gradients for an upstream gradient of ones, without a
    /// graph. With [`Reduction::None`] they are the gradients of the sum of the rows' losses.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let hidden = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
    /// let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
    /// let target = Tensor::new(&[0u32], &Device::Cpu)?;
    /// let (loss, grads) =
    ///     candle_fused_loss::LinearCrossEntropyLoss::new().loss_and_grad(&hidden, &weight, None, &target)?;
    /// assert_eq!(grads.weight.to_vec2::<f32>()?[1], [0.25, 0.25]);
    /// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, LinearGradients)> {
        self.options.problem(NAME, hidden, weight, bias, target)?.loss_and_grad(hidden, weight, bias, target)
    }
}

/// The mean cross-entropy of the logits `hidden weightᵀ` and class indices, in nats: [`LinearCrossEntropyLoss`] with
/// its defaults and without a bias, whose formula, shapes, dtypes, numerics, errors and source apply.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let hidden = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[0u32, 3, 1], &Device::Cpu)?;
/// let loss = candle_fused_loss::linear_cross_entropy(&hidden, &weight, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor> {
    LinearCrossEntropyLoss::new().forward(hidden, weight, None, target)
}
