//! What the losses that are composed of candle's tensor ops share.

use crate::check;
use crate::reduction::Reduction;
use crate::rows::layout::indices_as_i64;
use crate::rows::options::RowOptions;
use candle_core::{DType, Result, Shape, Tensor};

/// `factor * value`, where a factor of 0 wins over an infinite value. The derivatives are those of the product.
pub(crate) fn scaled(factor: &Tensor, value: &Tensor) -> Result<Tensor> {
    let finite = (factor.eq(0f64)? * value.abs()?.eq(f64::INFINITY)?)?.where_cond(&value.zeros_like()?, value)?;
    factor * finite
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
        let counted = indices.ne(options.ignore_index)?;
        let on_host = target.device().is_cpu();
        if on_host || options.target_check {
            check::class_range(name, indices.to_vec1::<i64>()?, target.dtype(), classes, options.ignore_index)?;
        }
        let legal = (indices.ge(0i64)? * indices.lt(classes as i64)?)?;
        Ok(ComposedIndices {
            classes: (&counted * &legal)?.where_cond(&indices, &indices.zeros_like()?)?,
            bad: (!on_host).then(|| &counted * legal.eq(0u8)?).transpose()?,
            counted,
        })
    }

    /// `(N)`: what each row adds to a counted denominator, with class weights `(C)` the weight of its class.
    pub fn weights(&self, weight: &Option<Tensor>, dtype: DType) -> Result<Tensor> {
        let Some(weight) = weight else { return self.counted.to_dtype(dtype) };
        let legal = match &self.bad {
            Some(bad) => (&self.counted * bad.eq(0u8)?)?,
            None => self.counted.clone(),
        };
        weight.index_select(&self.classes, 0)? * legal.to_dtype(dtype)?
    }

    /// Numbers of each row `(N, …)`, NaN where its class is out of range; so is what is derived from them.
    pub fn poison(&self, values: Tensor) -> Result<Tensor> {
        let Some(bad) = &self.bad else { return Ok(values) };
        let one = Tensor::ones(bad.dims(), values.dtype(), values.device())?;
        let factor = bad.where_cond(&(&one * f64::NAN)?, &one)?;
        let shape = [&[bad.elem_count()], &vec![1; values.rank() - 1][..]].concat();
        values.broadcast_mul(&factor.reshape(shape)?)
    }

    /// `(N, C)`: the rows that count, and zeros for the others, so that their NaN goes nowhere.
    pub fn counted_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.counted.unsqueeze(1)?.broadcast_as(x.shape())?.where_cond(x, &x.zeros_like()?)
    }
}

/// Every row of classes along `axis` as a row of a matrix.
pub(crate) fn as_matrix(t: &Tensor, axis: usize) -> Result<Tensor> {
    let classes = t.dims()[axis];
    let mut order: Vec<usize> = (0..t.rank()).filter(|&other| other != axis).collect();
    order.push(axis);
    t.permute(order)?.reshape((t.elem_count() / classes, classes))
}

/// A sum over its denominator. Where that is 0 the mean is NaN or infinite, but no gradient goes out of it.
fn mean(sum: &Tensor, denominator: &Tensor) -> Result<Tensor> {
    let weightless = denominator.eq(0f64)?;
    let mean = (sum / weightless.where_cond(&denominator.ones_like()?, denominator)?)?;
    weightless.where_cond(&(sum.detach() / denominator)?, &mean)
}

/// The rows' losses as a loss returns them; `weights` are what the rows add to the denominator of a mean.
pub(crate) fn reduced(options: &RowOptions, losses: Tensor, weights: &Tensor, shape: Shape) -> Result<Tensor> {
    match (options.reduction, options.normalizer) {
        (Reduction::None, _) => losses.reshape(shape),
        (Reduction::Sum, _) => losses.sum_all(),
        (Reduction::Mean, Some(normalizer)) => losses.sum_all()? / normalizer,
        (Reduction::Mean, None) => mean(&losses.sum_all()?, &weights.sum_all()?.detach()),
    }
}
