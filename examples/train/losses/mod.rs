//! The implementations of the losses that a run can choose from.
//!
//! `fused`, `unfused` and `candle` include one and the same `shared.rs` and differ in a single `use` line: that line is
//! all there is to moving from `candle_nn::loss` to this crate.

mod candle;
mod fused;
mod unfused;

use candle_core::{Result, Tensor};
use clap::ValueEnum;

/// Logits and target to the mean loss, a scalar.
pub type Loss = fn(&Tensor, &Tensor) -> Result<Tensor>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Implementation {
    /// This crate's kernels
    Fused,
    /// The same losses composed of candle's tensor ops
    Unfused,
    /// candle_nn::loss
    Candle,
}

impl Implementation {
    pub fn name(self) -> &'static str {
        match self {
            Implementation::Fused => "fused",
            Implementation::Unfused => "unfused",
            Implementation::Candle => "candle",
        }
    }

    pub fn digits(self) -> Loss {
        match self {
            Implementation::Fused => fused::digits,
            Implementation::Unfused => unfused::digits,
            Implementation::Candle => candle::digits,
        }
    }

    pub fn cancer(self) -> Loss {
        match self {
            Implementation::Fused => fused::cancer,
            Implementation::Unfused => unfused::cancer,
            Implementation::Candle => candle::cancer,
        }
    }

    pub fn attributes(self) -> Loss {
        match self {
            Implementation::Fused => fused::attributes,
            Implementation::Unfused => unfused::attributes,
            Implementation::Candle => candle::attributes,
        }
    }
}
