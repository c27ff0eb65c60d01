//! NLL as the kernels are asked for it.

use crate::check;
use crate::custom_op::{Arg, DeviceStorage};
use crate::reduction::LossForm;
use crate::rows::layout::{Rows, row_shape, rows_of};
use crate::rows::options::RowOptions;
use candle_core::{Layout, Result, Shape, Tensor};

/// An NLL whose options and tensors go together.
#[derive(Clone, Debug)]
pub(crate) struct Nll {
    /// The public function, for errors that only the data can cause.
    pub name: &'static str,
    /// The class axis of the log-probabilities.
    pub axis: usize,
    /// What becomes of the rows' losses.
    pub form: LossForm,
    pub options: RowOptions,
}

impl Nll {
    /// Checks both tensors against the options.
    pub fn new(name: &'static str, options: &RowOptions, log_probs: &Tensor, target: &Tensor) -> Result<Self> {
        options.check(name)?;
        let arithmetic = check::arithmetic_dtype(name, "log-probabilities", log_probs)?;
        let axis = check::class_axis(name, log_probs, options.class_axis)?;
        check::same_device(name, "target", target, log_probs)?;
        let mut rows = log_probs.dims().to_vec();
        let classes = rows.remove(axis);
        if target.dims() != rows {
            return Err(check::not_of_rows(name, target, log_probs, axis, ""));
        }
        check::class_indices(name, target)?;
        let (options, form) = options.checked(name, (classes, &rows), log_probs, arithmetic)?;
        Ok(Nll { name, axis, form, options })
    }

    pub fn rows(&self, log_probs: &Layout) -> Result<Rows> {
        rows_of(self.name, log_probs, self.axis)
    }

    pub fn loss_shape(&self, log_probs: &Layout) -> Shape {
        self.form.shape(row_shape(log_probs, self.axis))
    }
}

/// The kernels of a device. Log-probabilities may lie in any way that [`Rows`] describes, class indices are contiguous.
pub(crate) trait NllKernels: DeviceStorage {
    /// The loss, and what its sum was divided by: a scalar in the arithmetic dtype, 1 for a plain sum or for each.
    fn forward(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)>;

    /// The loss, and the gradient of the log-probabilities for an upstream gradient of ones.
    fn loss_and_grad(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)>;

    /// The gradient of the log-probabilities, in the order that [`Rows::class_last`] says. It reads none of them.
    fn backward(
        problem: &Nll,
        denominator: &Tensor,
        log_probs: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self>;
}
