#![doc = include_str!("../README.md")]
#![deny(missing_docs)]

mod cast;
mod check;
mod composed;
mod cpu;
#[cfg(any(test, feature = "cuda"))]
mod cuda;
mod custom_op;
mod device;
mod elementwise;
mod linear;
mod losses;
mod nll;
mod reduction;
mod rows;
mod softmax;
pub mod unfused;

pub use candle_nn::loss::{huber, mse};
pub use device::{best_device, keep_memory};
pub use linear::problem::LinearGradients;
pub use losses::binary::{
    BceLoss, BceWithLogitsLoss, binary_cross_entropy, binary_cross_entropy_with_logit, binary_cross_entropy_with_logits,
};
pub use losses::cross_entropy::{CrossEntropyLoss, cross_entropy};
pub use losses::focal::{SigmoidFocalLoss, sigmoid_focal};
pub use losses::l1::{L1Loss, l1};
pub use losses::linear_cross_entropy::{LinearCrossEntropyLoss, linear_cross_entropy};
pub use losses::multi_label::{MultiLabelSoftMarginLoss, multi_label_soft_margin};
pub use losses::nll::{NllLoss, log_softmax, nll};
pub use reduction::{Normalizer, Reduction};
pub use softmax::problem::RowStatistics;
pub use softmax::transform::RowTransform;
