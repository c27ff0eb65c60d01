//! The options that every loss of rows with class indices has.

use crate::check;
use crate::custom_op::Locked;
use crate::reduction::Reduction;
use candle_core::{DType, Result, Tensor, bail};

/// As the caller gave them, or checked for a pair of tensors: then the weights are as [`check::class_weights`] returns
/// them.
#[derive(Clone, Debug)]
pub(crate) struct RowOptions {
    /// A factor of the rows of each class.
    pub weight: Option<Tensor>,
    pub ignore_index: i64,
    /// The axis of the classes, negative from the end; by default 1, or 0 where there is no batch.
    pub class_axis: Option<isize>,
    pub reduction: Reduction,
    /// What `Mean` divides by in place of the weights of the rows that count.
    pub normalizer: Option<f64>,
    /// A factor of the gradients of a pass without a graph.
    pub grad_scale: f64,
    /// On CUDA: synchronise to check the values of the target. The CPU always checks them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub target_check: bool,
    /// Whether to run the kernels where there are some, not candle's tensor ops.
    pub fused: bool,
}

impl Default for RowOptions {
    fn default() -> Self {
        RowOptions {
            weight: None,
            ignore_index: -100,
            class_axis: None,
            reduction: Reduction::Mean,
            normalizer: None,
            grad_scale: 1.0,
            target_check: false,
            fused: true,
        }
    }
}

impl RowOptions {
    /// What can be said without looking at the tensors.
    pub fn check(&self, name: &str) -> Result<()> {
        check::finite(name, "grad scale", self.grad_scale)?;
        match self.normalizer {
            Some(d) if !(d.is_finite() && d > 0.0) => bail!("{name}: normalizer {d}, expected a finite number above 0"),
            _ => Ok(()),
        }
    }

    /// The class weights, locked for the time of a call.
    pub fn lock_weight(&self) -> Option<Locked<'_>> {
        self.weight.as_ref().map(Locked::new)
    }

    /// The options as the kernels read them, for an input of `classes`.
    pub fn checked(&self, name: &str, classes: usize, input: &Tensor, arithmetic: DType) -> Result<Self> {
        let weight = check::class_weights(name, &self.weight, classes, input, arithmetic)?;
        Ok(RowOptions { weight, ..self.clone() })
    }

    /// The options of a sum: without what belongs to the denominator and to a pass without a graph.
    pub fn of_sum(&self, reduction: Reduction) -> Self {
        RowOptions { reduction, normalizer: None, grad_scale: 1.0, target_check: false, ..self.clone() }
    }

    /// What the sum of the rows' losses is divided by, for rows that count as `total`.
    pub fn denominator(&self, total: f64) -> f64 {
        match (self.reduction, self.normalizer) {
            (Reduction::Mean, Some(normalizer)) => normalizer,
            (Reduction::Mean, None) => total,
            (Reduction::None | Reduction::Sum, _) => 1.0,
        }
    }
}
