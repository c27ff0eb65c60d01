//! The losses composed of candle's tensor ops.
//!
//! The same free functions as at the crate's root. Loss objects have `with_fused(false)` for the same. It is the specification, the
//! oracle that the fused kernels are tested against, the baseline of the benchmarks, and the path for devices without a kernel
//! (Metal), to which the losses turn by themselves. Every op makes a tensor of its own, so all of this is slower and needs more
//! memory; and losses and gradients below the spacing of f32 around 1 are rounded to 0.
//!
//! Class indices are checked on the CPU by candle's gather; probabilities are not checked at all.
//!
//! # Example
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_fused_loss::{CrossEntropyLoss, cross_entropy, unfused};
//! # fn main() -> candle_core::Result<()> {
//! let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
//! let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
//! let fused = CrossEntropyLoss::new().with_z_loss(1e-3).forward(&logits, &target)?;
//! let composed = CrossEntropyLoss::new().with_z_loss(1e-3).with_fused(false).forward(&logits, &target)?;
//! assert!((fused - composed)?.abs()?.to_scalar::<f32>()? < 1e-6);
//! let (fused, composed) = (cross_entropy(&logits, &target)?, unfused::cross_entropy(&logits, &target)?);
//! assert!((fused - composed)?.abs()?.to_scalar::<f32>()? < 1e-6);
//! # Ok(())
//! # }
//! ```

use crate::losses::binary::{BceLoss, BceWithLogitsLoss};
use crate::losses::cross_entropy::CrossEntropyLoss;
use crate::losses::focal::SigmoidFocalLoss;
use crate::losses::linear_cross_entropy::LinearCrossEntropyLoss;
use crate::losses::multi_label::MultiLabelSoftMarginLoss;
use crate::losses::nll::NllLoss;
use candle_core::shape::Dim;
use candle_core::{Result, Tensor};

/// [`crate::cross_entropy()`] without a kernel.
pub fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    CrossEntropyLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::nll()`] without a kernel.
pub fn nll(log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    NllLoss::new().with_fused(false).forward(log_probs, target)
}

/// [`crate::binary_cross_entropy`] without a kernel.
pub fn binary_cross_entropy(probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceLoss::new().with_fused(false).forward(probs, target)
}

/// [`crate::binary_cross_entropy_with_logits`] without a kernel.
pub fn binary_cross_entropy_with_logits(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceWithLogitsLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::binary_cross_entropy_with_logit`] without a kernel.
pub fn binary_cross_entropy_with_logit(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    binary_cross_entropy_with_logits(logits, target)
}

/// [`crate::multi_label_soft_margin`] without a kernel.
pub fn multi_label_soft_margin(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    MultiLabelSoftMarginLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::sigmoid_focal`] without a kernel.
pub fn sigmoid_focal(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    SigmoidFocalLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::linear_cross_entropy()`] without a kernel.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor> {
    LinearCrossEntropyLoss::new().with_fused(false).forward(hidden, weight, None, target)
}

/// [`crate::log_softmax`] without a kernel.
pub fn log_softmax<A: Dim>(logits: &Tensor, dim: A) -> Result<Tensor> {
    crate::softmax::composed::log_softmax(logits, dim.to_index(logits.shape(), "log_softmax")?)
}
