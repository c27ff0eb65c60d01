//! The suites that run twice, on the losses composed of candle's tensor ops, which keep the same promises.

/// The losses under test, under the names of the crate.
pub mod losses {
    pub use candle_fused_loss::Reduction;
    pub use candle_fused_loss::unfused::*;

    /// Whether the losses have kernels.
    pub const FUSED: bool = false;

    /// How many epsilons a result may be off in addition to what the reference allows. A composed loss adds up numbers
    /// around 1 where a kernel takes them apart, so that each rounding costs an epsilon; there are a few in a row.
    pub const ABSOLUTE: f64 = 32.0;

    /// Constructors of the losses with `with_fused(false)`.
    macro_rules! composed {
        ($($loss:ident)*) => {
            $(pub struct $loss;

            impl $loss {
                #[allow(clippy::new_ret_no_self)] // the suites' `Loss::new()`
                pub fn new() -> candle_fused_loss::$loss {
                    candle_fused_loss::$loss::new().with_fused(false)
                }
            })*
        };
    }

    composed! {
        BceLoss BceWithLogitsLoss CrossEntropyLoss L1Loss LinearCrossEntropyLoss MultiLabelSoftMarginLoss NllLoss
        SigmoidFocalLoss
    }
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
