//! The suites that run twice, on the losses as they are: on the kernels.

/// The losses under test.
pub mod losses {
    pub use candle_fused_loss::*;

    /// How many epsilons a result may be off in addition to what the reference allows.
    pub const ABSOLUTE: f64 = 0.0;
}

#[path = "cross_entropy.rs"]
mod cross_entropy;
#[path = "nll.rs"]
mod nll;
#[path = "row_options.rs"]
mod row_options;
#[path = "semantics.rs"]
mod semantics;
