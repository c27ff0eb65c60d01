//! The suites that run twice, on the losses as they are: on the kernels.

/// The losses under test.
pub mod losses {
    pub use candle_fused_loss::*;

    /// Whether the losses have kernels.
    pub const FUSED: bool = true;
}

#[path = "cross_entropy.rs"]
mod cross_entropy;
#[path = "nll.rs"]
mod nll;
#[path = "semantics.rs"]
mod semantics;
