// Written once for every implementation: `loss` is whatever the including module's `use` line made it.

use candle_core::{Result, Tensor};

/// One of ten classes for each row of logits `(N, 10)`; the target is `(N)` class indices.
pub fn digits(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    loss::cross_entropy(logits, target)
}

/// One yes-or-no question for each row of logits `(N, 1)`; the target is `(N, 1)` zeros and ones.
pub fn cancer(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    loss::binary_cross_entropy_with_logit(logits, target)
}
