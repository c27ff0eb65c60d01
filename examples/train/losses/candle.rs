//! What candle-nn offers.

use candle_nn::loss;

include!("shared.rs");

/// Several yes-or-no questions for each row. candle has no multi-label loss; its mean binary cross-entropy over all
/// elements is the same number.
pub fn attributes(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    loss::binary_cross_entropy_with_logit(logits, target)
}
