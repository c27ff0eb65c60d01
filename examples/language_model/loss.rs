//! The losses that a run can choose from: the same number, made in three ways.

use candle_core::{Result, Tensor, bail};
use candle_fused_loss::{CrossEntropyLoss, LinearCrossEntropyLoss};
use clap::ValueEnum;

use crate::data::Batch;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Implementation {
    /// This crate's linear cross-entropy: a chunk of the logits at a time
    Linear,
    /// All logits, then this crate's cross-entropy
    Fused,
    /// All logits, then candle_nn's cross-entropy
    Candle,
}

impl Implementation {
    pub const ALL: [Self; 3] = [Self::Candle, Self::Fused, Self::Linear];

    pub fn name(self) -> &'static str {
        match self {
            Implementation::Linear => "linear",
            Implementation::Fused => "fused",
            Implementation::Candle => "candle",
        }
    }

    /// The mean cross-entropy of the next piece, in nats, for the hidden states `(B, T, D)` of a batch and a head
    /// `(V, D)`. Padding is left out. With a normalizer, the sum is divided by that instead of the batch's count.
    pub fn loss(self, hidden: &Tensor, head: &Tensor, batch: &Batch, normalizer: Option<&Tensor>) -> Result<Tensor> {
        let logits = || hidden.flatten_to(1)?.matmul(&head.t()?);
        match self {
            Implementation::Linear => {
                let mut loss = linear(batch);
                if let Some(normalizer) = normalizer {
                    loss = loss.with_normalizer(normalizer);
                }
                loss.forward(hidden, head, None, &batch.next)
            }
            Implementation::Fused => {
                let mut loss = CrossEntropyLoss::new();
                if let Some(mask) = &batch.mask {
                    loss = loss.with_row_weight(mask.flatten_all()?);
                }
                if let Some(normalizer) = normalizer {
                    loss = loss.with_normalizer(normalizer);
                }
                loss.forward(&logits()?, &batch.next.flatten_all()?)
            }
            Implementation::Candle if batch.mask.is_some() || normalizer.is_some() => bail!(
                "candle_nn's cross-entropy has no row weights for --verses and no normalizer for --accumulate: \
                 choose --loss linear or --loss fused"
            ),
            Implementation::Candle => candle_nn::loss::cross_entropy(&logits()?, &batch.next.flatten_all()?),
        }
    }
}

/// How many pieces a batch has beside its padding, a scalar on its device that nobody waits for.
pub fn count(batch: &Batch) -> Result<Tensor> {
    linear(batch).count(&batch.next)
}

fn linear(batch: &Batch) -> LinearCrossEntropyLoss {
    match &batch.mask {
        Some(mask) => LinearCrossEntropyLoss::new().with_row_weight(mask.clone()),
        None => LinearCrossEntropyLoss::new(),
    }
}
