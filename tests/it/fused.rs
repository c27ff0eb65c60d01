//! The suites that run twice, on the losses as they are: on the kernels.

/// The losses under test.
pub mod losses {
    pub use candle_fused_loss::*;

    /// Whether the losses have kernels.
    pub const FUSED: bool = true;

    /// How many epsilons a result may be off in addition to what the reference allows.
    pub const ABSOLUTE: f64 = 0.0;
}

#[path = "binary.rs"]
mod binary;
#[path = "cross_entropy.rs"]
mod cross_entropy;
#[path = "element_options.rs"]
mod element_options;
#[path = "elements.rs"]
mod elements;
#[path = "errors.rs"]
mod errors;
#[path = "focal.rs"]
mod focal;
#[path = "l1.rs"]
mod l1;
#[path = "multi_label.rs"]
mod multi_label;
#[path = "nll.rs"]
mod nll;
#[path = "row_options.rs"]
mod row_options;
#[path = "row_weights.rs"]
mod row_weights;
#[path = "semantics.rs"]
mod semantics;
