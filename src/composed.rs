//! What the losses that are composed of candle's tensor ops share.

use crate::cast::indices_as_i64;
use crate::check;
use crate::reduction::{Denominator, LossForm, Reduction};
use crate::rows::options::RowOptions;
use candle_core::{DType, Result, Shape, Tensor};

/// `factor * value`, where a factor of 0 wins over an infinite value. The derivatives are those of the product.
pub(crate) fn scaled(factor: &Tensor, value: &Tensor) -> Result<Tensor> {
    let finite = (factor.eq(0f64)? * value.abs()?.eq(f64::INFINITY)?)?.where_cond(&value.zeros_like()?, value)?;
    factor * finite
}

/// `(N)`, u8: 1 where a row counts, as its class index and its weight say.
pub(crate) fn counting_rows(indices: &Tensor, options: &RowOptions) -> Result<Tensor> {
    let counted = indices.ne(options.ignore_index)?;
    match options.row_weights(DType::F64)? {
        Some(weights) => counted * weights.ne(0f64)?,
        None => Ok(counted),
    }
}

/// Class indices that can be looked up.
pub(crate) struct ComposedIndices {
    /// `(N)`, i64: 0 where the row doesn't count or has a class out of range.
    pub classes: Tensor,
    /// `(N)`, u8: 1 where the row counts, which one with a class out of range does.
    pub counted: Tensor,
    /// `(N)`, u8: 1 where the class is out of range. On the CPU that is an error instead.
    bad: Option<Tensor>,
}

impl ComposedIndices {
    pub fn new(name: &str, target: &Tensor, classes: usize, options: &RowOptions) -> Result<Self> {
        let indices = indices_as_i64(target)?.flatten_all()?;
        let counted = counting_rows(&indices, options)?;
        let on_host = target.device().is_cpu();
        if on_host || options.target_check {
            let ignored = Tensor::full(options.ignore_index, indices.shape(), indices.device())?;
            let looked_at = counted.where_cond(&indices, &ignored)?.to_vec1::<i64>()?;
            check::class_range(name, looked_at, target.dtype(), classes, options.ignore_index)?;
        }
        let legal = (indices.ge(0i64)? * indices.lt(classes as i64)?)?;
        Ok(ComposedIndices {
            classes: (&counted * &legal)?.where_cond(&indices, &indices.zeros_like()?)?,
            bad: (!on_host).then(|| &counted * legal.eq(0u8)?).transpose()?,
            counted,
        })
    }

    /// `(N)`: the weight of each row's class, without class weights 1; 0 where the row doesn't count.
    pub fn class_weights(&self, options: &RowOptions, dtype: DType) -> Result<Tensor> {
        let Some(weight) = &options.weight else { return self.counted.to_dtype(dtype) };
        let legal = match &self.bad {
            Some(bad) => (&self.counted * bad.eq(0u8)?)?,
            None => self.counted.clone(),
        };
        weight.index_select(&self.classes, 0)? * legal.to_dtype(dtype)?
    }

    /// `(N)`: what each row adds to a counted denominator.
    pub fn weights(&self, options: &RowOptions, dtype: DType) -> Result<Tensor> {
        let weights = self.class_weights(options, dtype)?;
        match options.row_weights(dtype)? {
            Some(of_rows) => weights * self.counted.where_cond(&of_rows, &of_rows.zeros_like()?)?,
            None => Ok(weights),
        }
    }

    /// Numbers of each row `(N, …)`, NaN where its class is out of range; so is what is derived from them.
    pub fn poison(&self, values: Tensor) -> Result<Tensor> {
        let Some(bad) = &self.bad else { return Ok(values) };
        let one = Tensor::ones(bad.dims(), values.dtype(), values.device())?;
        let factor = bad.where_cond(&(&one * f64::NAN)?, &one)?;
        let shape = [&[bad.elem_count()], &vec![1; values.rank() - 1][..]].concat();
        values.broadcast_mul(&factor.reshape(shape)?)
    }
}

/// `(N, C)`: the rows that count, `(N)`, and zeros for the others, so that their NaN goes nowhere.
pub(crate) fn counted_rows(counted: &Tensor, x: &Tensor) -> Result<Tensor> {
    counted.unsqueeze(1)?.broadcast_as(x.shape())?.where_cond(x, &x.zeros_like()?)
}

/// Every row of classes along `axis` as a row of a matrix.
pub(crate) fn as_matrix(t: &Tensor, axis: usize) -> Result<Tensor> {
    let classes = t.dims()[axis];
    let mut order: Vec<usize> = (0..t.rank()).filter(|&other| other != axis).collect();
    order.push(axis);
    t.permute(order)?.reshape((t.elem_count() / classes, classes))
}

/// A sum over its denominator. Where that is 0 the mean is NaN or infinite, but no gradient goes out of it.
pub(crate) fn mean(sum: &Tensor, denominator: &Tensor) -> Result<Tensor> {
    let weightless = denominator.eq(0f64)?;
    let mean = (sum / weightless.where_cond(&denominator.ones_like()?, denominator)?)?;
    weightless.where_cond(&(sum.detach() / denominator)?, &mean)
}

/// The rows' losses as a loss returns them; `weights` are what the rows add to the denominator of a mean.
pub(crate) fn reduced(form: &LossForm, losses: Tensor, weights: &Tensor, shape: Shape) -> Result<Tensor> {
    let LossForm::Scalar(denominator) = form else { return losses.reshape(shape) };
    let sum = losses.sum_all()?;
    match denominator {
        Denominator::Counted => mean(&sum, &weights.sum_all()?.detach()),
        Denominator::Value(value) => sum / *value,
        Denominator::Tensor(tensor) => mean(&sum, &tensor.to_dtype(sum.dtype())?),
    }
}

/// What the mean of rows with these targets divides by, a scalar f64 on their device.
pub(crate) fn count_rows(name: &str, options: &RowOptions, target: &Tensor) -> Result<Tensor> {
    options.check(name)?;
    let mut rows = target.dims().to_vec();
    let classes = match &options.weight {
        _ if target.dtype().is_float() => rows.remove(check::class_axis(name, target, options.class_axis)?),
        Some(weight) => weight.elem_count(),
        // without logits, as many as there are numbers for
        None => i64::MAX as usize,
    };
    let options = RowOptions { reduction: Reduction::Mean, ..options.clone() };
    let (options, form) = options.checked(name, (classes, &rows), target, DType::F64)?;
    let constant = |value: f64| Tensor::full(value, (), target.device());
    match form {
        LossForm::Scalar(Denominator::Tensor(tensor)) => Ok(tensor),
        LossForm::Scalar(Denominator::Value(value)) => constant(value),
        _ if rows.contains(&0) => constant(0.0),
        _ if !target.dtype().is_float() => {
            check::class_indices(name, target)?;
            ComposedIndices::new(name, target, classes, &options)?.weights(&options, DType::F64)?.sum_all()
        }
        _ => match options.row_weights(DType::F64)? {
            Some(weights) => weights.sum_all(),
            None => constant(rows.iter().product::<usize>() as f64),
        },
    }
}
