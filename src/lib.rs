#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

pub mod binary;
mod cpu;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
pub mod focal;
mod linear;
pub mod linear_cross_entropy;
mod logistic;
mod matmul;
pub mod multi_label;
pub mod nll;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod plan;
mod reduction;
mod softmax;
pub mod unfused;
mod validate;

pub use binary::{binary_cross_entropy, binary_cross_entropy_with_logit, binary_cross_entropy_with_logits};
pub use candle_nn::loss::{huber, mse};
pub use cross_entropy::{RowStatistics, cross_entropy};
pub use device::{best_device, keep_memory};
pub use focal::sigmoid_focal;
pub use linear_cross_entropy::{LinearGradients, linear_cross_entropy};
pub use multi_label::multi_label_soft_margin;
pub use nll::{log_softmax, nll};
pub use reduction::{Fused, Reduction, Unfused};

/// Cross-entropy with one kernel a pass: see [`cross_entropy::CrossEntropyLoss`].
pub type CrossEntropyLoss = cross_entropy::CrossEntropyLoss<Fused>;
/// Negative log-likelihood with one kernel a pass: see [`nll::NllLoss`].
pub type NllLoss = nll::NllLoss<Fused>;
/// Binary cross-entropy of probabilities with one kernel a pass: see [`binary::BceLoss`].
pub type BceLoss = binary::BceLoss<Fused>;
/// Binary cross-entropy of logits with one kernel a pass: see [`binary::BceWithLogitsLoss`].
pub type BceWithLogitsLoss = binary::BceWithLogitsLoss<Fused>;
/// Multi-label soft margin with one kernel a pass: see [`multi_label::MultiLabelSoftMarginLoss`].
pub type MultiLabelSoftMarginLoss = multi_label::MultiLabelSoftMarginLoss<Fused>;
/// Sigmoid focal loss with one kernel a pass: see [`focal::SigmoidFocalLoss`].
pub type SigmoidFocalLoss = focal::SigmoidFocalLoss<Fused>;
/// Cross-entropy of a linear layer's output, without the logits: see [`linear_cross_entropy::LinearCrossEntropyLoss`].
pub type LinearCrossEntropyLoss = linear_cross_entropy::LinearCrossEntropyLoss<Fused>;
