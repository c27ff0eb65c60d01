#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

mod check;
mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod device;
mod elementwise;
mod linear;
mod losses;
mod reduction;
mod softmax;
pub mod unfused;

pub use candle_nn::loss::{huber, mse};
pub use device::{best_device, keep_memory};
pub use losses::binary::{binary_cross_entropy, binary_cross_entropy_with_logit, binary_cross_entropy_with_logits};
pub use losses::cross_entropy::{RowStatistics, cross_entropy};
pub use losses::focal::sigmoid_focal;
pub use losses::linear_cross_entropy::{LinearGradients, linear_cross_entropy};
pub use losses::multi_label::multi_label_soft_margin;
pub use losses::nll::{log_softmax, nll};
pub use losses::{binary, cross_entropy, focal, linear_cross_entropy, multi_label, nll};
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
