//! The options that every loss of rows with class indices has.

use crate::check;
use crate::custom_op::{Arg, DeviceStorage, Locked};
use crate::reduction::{LossForm, Normalizer, Reduction};
use crate::rows::layout::RowPlaces;
use candle_core::{DType, Result, Shape, Tensor, bail};

/// As the caller gave them, or checked for a pair of tensors: then the weights of classes are as
/// [`check::class_weights`] returns them, and those of rows as [`checked_row_weight`] does.
#[derive(Clone, Debug)]
pub(crate) struct RowOptions {
    /// A factor of the rows of each class.
    pub weight: Option<Tensor>,
    /// A factor of each row: one of 0 is ignored, whatever it holds.
    pub row_weight: Option<Tensor>,
    pub ignore_index: i64,
    /// The axis of the classes, negative from the end; by default 1, or 0 where there is no batch.
    pub class_axis: Option<isize>,
    pub reduction: Reduction,
    /// What `Mean` divides by in place of the weights of the rows that count.
    pub normalizer: Option<Normalizer>,
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
            row_weight: None,
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
        check::finite(name, "grad scale", self.grad_scale)
    }

    /// The tensors among the options, locked for the time of a call.
    pub fn lock<'a>(&'a self, form: &'a LossForm) -> LockedRowOptions<'a> {
        LockedRowOptions {
            weight: self.weight.as_ref().map(Locked::new),
            row_weight: self.row_weight.as_ref().map(Locked::new),
            normalizer: form.tensor().map(Locked::new),
        }
    }

    /// The options as the kernels read them, and what becomes of the losses, for an input of `classes` in rows of a
    /// shape.
    pub fn checked(
        &self,
        name: &str,
        (classes, rows): (usize, &[usize]),
        input: &Tensor,
        arithmetic: DType,
    ) -> Result<(Self, LossForm)> {
        let weight = check::class_weights(name, &self.weight, classes, input, arithmetic)?;
        let row_weight = self.row_weight.as_ref().map(|weight| checked_row_weight(name, weight, rows, input));
        let form = LossForm::new(name, (self.reduction, self.normalizer.as_ref()), input, &Shape::from(rows.to_vec()))?;
        Ok((RowOptions { weight, row_weight: row_weight.transpose()?, ..self.clone() }, form))
    }

    /// The options of a sum: without what belongs to a pass without a graph.
    pub fn of_sum(&self) -> Self {
        RowOptions { grad_scale: 1.0, target_check: false, ..self.clone() }
    }

    /// The weights `(N)` of checked rows, if there are any; those of a mask are 0 and 1.
    pub fn row_weights(&self, dtype: DType) -> Result<Option<Tensor>> {
        let Some(weight) = &self.row_weight else { return Ok(None) };
        let weight = weight.contiguous()?.flatten_all()?;
        if weight.dtype() == DType::U8 { weight.ne(0u8)?.to_dtype(dtype) } else { weight.to_dtype(dtype) }.map(Some)
    }
}

/// Weights of rows of that shape as the kernels read them: a detached view of the shape, of which [`RowPlaces`] says
/// where each number is.
fn checked_row_weight(name: &str, weight: &Tensor, rows: &[usize], input: &Tensor) -> Result<Tensor> {
    if !check::is_float(weight.dtype()) && weight.dtype() != DType::U8 {
        bail!(
            "{name}: row weights of dtype {:?}, expected f16, bf16, f32, f64, or u8 for a mask (`weight.ne(0)?`)",
            weight.dtype()
        );
    }
    check::same_device(name, "row weights", weight, input)?;
    let Ok(view) = weight.detach().broadcast_as(rows) else {
        bail!(
            "{name}: row weights of shape {:?}, expected a shape that broadcasts to the rows' {rows:?}",
            weight.dims()
        )
    };
    match RowPlaces::of(view.layout()) {
        Some(_) => Ok(view),
        None => view.contiguous(),
    }
}

/// The tensors among the options of a call, locked.
pub(crate) struct LockedRowOptions<'a> {
    weight: Option<Locked<'a>>,
    row_weight: Option<Locked<'a>>,
    normalizer: Option<Locked<'a>>,
}

impl LockedRowOptions<'_> {
    /// As arguments of a kernel of `name`: the weights of classes and of rows, and the normalizer.
    pub fn args<S: DeviceStorage>(&self, name: &str) -> Result<[Option<Arg<'_, S>>; 3]> {
        fn arg<'a, S: DeviceStorage>(locked: &'a Option<Locked>, name: &str) -> Result<Option<Arg<'a, S>>> {
            locked.as_ref().map(|locked| locked.arg(name)).transpose()
        }
        Ok([arg(&self.weight, name)?, arg(&self.row_weight, name)?, arg(&self.normalizer, name)?])
    }
}
