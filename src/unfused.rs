//! The losses composed of candle's tensor ops.
//!
//! These are the free functions of the crate's root without its kernels; a loss object takes the same path with
//! `with_fused(false)`. The path is the specification, the oracle that the fused kernels are tested against, the
//! baseline of the benchmarks, and the implementation on devices without kernels (Metal), where every loss takes it by
//! itself. Every op makes a tensor of its own, so all of this is slower and needs more memory, and in the softmax
//! family losses and gradients below the spacing of f32 around 1 are rounded to 0.
//!
//! Class indices out of range are what they are to the kernels: an error on the CPU, NaN on a device unless a check is
//! asked for. Probabilities, and integers where a label is 0 or 1, are checked on every device, which the host waits
//! for.
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
use crate::losses::l1::L1Loss;
use crate::losses::linear_cross_entropy::LinearCrossEntropyLoss;
use crate::losses::multi_label::MultiLabelSoftMarginLoss;
use crate::losses::nll::{NllLoss, log_softmax_by};
use candle_core::shape::Dim;
use candle_core::{Result, Tensor};

/// [`crate::cross_entropy()`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32], &Device::Cpu)?;
/// let loss = unfused::cross_entropy(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.407606).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    CrossEntropyLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::nll()`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[[-0.5f32, -1., -2.]], &Device::Cpu)?;
/// let target = Tensor::new(&[1u32], &Device::Cpu)?;
/// let loss = unfused::nll(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 1.0).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn nll(log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    NllLoss::new().with_fused(false).forward(log_probs, target)
}

/// [`crate::binary_cross_entropy`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
/// let loss = unfused::binary_cross_entropy(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.490415).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn binary_cross_entropy(probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceLoss::new().with_fused(false).forward(probs, target)
}

/// [`crate::binary_cross_entropy_with_logits`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
/// let loss = unfused::binary_cross_entropy_with_logits(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 1.410038).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn binary_cross_entropy_with_logits(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceWithLogitsLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::binary_cross_entropy_with_logit`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
/// let loss = unfused::binary_cross_entropy_with_logit(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 1.410038).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn binary_cross_entropy_with_logit(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    binary_cross_entropy_with_logits(logits, target)
}

/// [`crate::multi_label_soft_margin`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;
/// let loss = unfused::multi_label_soft_margin(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.892902).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn multi_label_soft_margin(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    MultiLabelSoftMarginLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::sigmoid_focal`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
/// let loss = unfused::sigmoid_focal(&input, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.640440).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn sigmoid_focal(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    SigmoidFocalLoss::new().with_fused(false).forward(logits, target)
}

/// [`crate::l1`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let input = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[0f32, 4.], &Device::Cpu)?;
/// assert_eq!(unfused::l1(&input, &target)?.to_scalar::<f32>()?, 1.5);
/// # candle_core::Result::Ok(())
/// ```
pub fn l1(input: &Tensor, target: &Tensor) -> Result<Tensor> {
    L1Loss::new().with_fused(false).forward(input, target)
}

/// [`crate::linear_cross_entropy()`] without a kernel, of all logits at once.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let hidden = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[0u32, 3, 1], &Device::Cpu)?;
/// let loss = unfused::linear_cross_entropy(&hidden, &weight, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 4f32.ln()).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, target: &Tensor) -> Result<Tensor> {
    LinearCrossEntropyLoss::new().with_fused(false).forward(hidden, weight, None, target)
}

/// [`crate::log_softmax`] without a kernel.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_loss::unfused;
/// let log_probs = unfused::log_softmax(&Tensor::new(&[[1e8f32, 1e8]], &Device::Cpu)?, 1)?;
/// assert_eq!(log_probs.to_vec2::<f32>()?, [[-std::f32::consts::LN_2; 2]]);
/// # candle_core::Result::Ok(())
/// ```
pub fn log_softmax<D: Dim>(logits: &Tensor, dim: D) -> Result<Tensor> {
    log_softmax_by(false, logits, dim)
}
