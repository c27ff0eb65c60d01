//! This crate.

use candle_fused_loss as loss;

include!("shared.rs");

/// Several yes-or-no questions for each row.
pub fn attributes(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    loss::multi_label_soft_margin(logits, target)
}
