//! The losses that a run can choose from: the same number, made in three ways.

use candle_core::{Result, Tensor};
use candle_fused_loss::{cross_entropy, linear_cross_entropy};
use clap::ValueEnum;

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

    /// The mean cross-entropy of the next piece, in nats, for hidden states `(B, T, D)`, a head `(V, D)` and the pieces
    /// that do come next `(B, T)`.
    pub fn loss(self, hidden: &Tensor, head: &Tensor, next: &Tensor) -> Result<Tensor> {
        let logits = || hidden.flatten_to(1)?.matmul(&head.t()?);
        match self {
            Implementation::Linear => linear_cross_entropy(hidden, head, next),
            Implementation::Fused => cross_entropy(&logits()?, &next.flatten_all()?),
            Implementation::Candle => candle_nn::loss::cross_entropy(&logits()?, &next.flatten_all()?),
        }
    }
}
