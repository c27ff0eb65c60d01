//! The softmax family in candle's tensor ops: its specification, the tests' oracle, the baseline of the benches, and
//! the path where there are no kernels.

use super::problem::{CrossEntropy, RowStatistics, STATISTICS, SoftmaxOptions};
use super::transform::RowTransform;
use crate::check::arithmetic;
use crate::composed::{ComposedIndices, as_matrix, counted_rows, reduced, scaled};
use crate::rows::layout::row_shape;
use candle_core::{DType, Result, Tensor};

/// `x - log sum exp(x)` along an axis.
pub(crate) fn log_softmax(logits: &Tensor, axis: usize) -> Result<Tensor> {
    let x = logits.to_dtype(arithmetic(logits.dtype()))?;
    let (shifted, log_sum, _) = shifted_log_sum(&x, axis, 1.0)?;
    shifted.broadcast_sub(&log_sum)?.to_dtype(logits.dtype())
}

/// Of x times a factor: `x - m`, `log sum exp(x - m)` and m along an axis.
fn shifted_log_sum(x: &Tensor, axis: usize, factor: f64) -> Result<(Tensor, Tensor, Tensor)> {
    // as a constant: the gradient of the sum of both parts does not depend on it
    let mut max = x.max_keepdim(axis)?.detach();
    let mut shifted = x.broadcast_sub(&max)?;
    if factor != 1.0 {
        (shifted, max) = ((shifted * factor)?, (max * factor)?);
    }
    let log_sum = shifted.exp()?.sum_keepdim(axis)?.log()?;
    Ok((shifted, log_sum, max))
}

/// Logits after soft cap and scale, except for the factor of their differences: see [`SoftmaxOptions::split_scale`].
fn transformed(o: &SoftmaxOptions, logits: Tensor) -> Result<Tensor> {
    let (scale, _) = o.split_scale();
    let x = if scale == 1.0 { logits } else { (logits * scale)? };
    match o.softcap {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x),
    }
}

/// The number of each row's own class, by a choice: candle's gather can't be differentiated twice where its gradient
/// depends on what it reads.
fn chosen(log_probs: &Tensor, classes: &Tensor) -> Result<Tensor> {
    let each = Tensor::arange(0, log_probs.dim(1)? as i64, log_probs.device())?;
    let own = each.broadcast_as(log_probs.shape())?.eq(&classes.unsqueeze(1)?.broadcast_as(log_probs.shape())?)?;
    own.where_cond(log_probs, &log_probs.zeros_like()?)?.sum(1)
}

/// A row transform of negative log-likelihoods n. Where n is 0 or infinite it is continued along its tangent, without
/// the products of 0 and infinity that autograd would make of the formula.
fn transformed_nll(transform: RowTransform, n: &Tensor) -> Result<Tensor> {
    let (least, most) = (n.eq(0f64)?, n.eq(f64::INFINITY)?);
    let inside = (&least + &most)?.eq(0u8)?.where_cond(n, &n.ones_like()?)?;
    // u = 1 - exp(-n) without cancellation
    let half = (&inside * 0.5)?.tanh()?;
    let u = ((&half * 2.0)? / (&half + 1.0)?)?;
    let value = match transform {
        RowTransform::Focal { gamma: 0.0 } => return Ok(n.clone()),
        RowTransform::Focal { gamma } => ((u.log()? * gamma)?.exp()? * &inside)?,
        RowTransform::Poly1 { epsilon } => (&inside + (u * epsilon)?)?,
        RowTransform::Dft => (inside.neg()?.exp()?.detach() * &inside)?,
        RowTransform::GeneralizedCe { q } => {
            let half = (&inside * (0.5 * q))?.tanh()?;
            (((&half * 2.0)? / (half + 1.0)?)? / q)?
        }
    };
    let along = |at: f64| -> Result<Tensor> {
        let (value, slope) = transform.at(at);
        // a constant where the slope is 0, which times an infinite n would be NaN
        if slope == 0.0 { n.zeros_like()? + value } else { n.affine(slope, if at == 0.0 { value } else { 0.0 }) }
    };
    least.where_cond(&along(0.0)?, &most.where_cond(&along(f64::INFINITY)?, &value)?)
}

/// The class of each row's first largest number `(N)`, u32. On some devices candle's argmax takes any of them.
fn first_largest(x: &Tensor) -> Result<Tensor> {
    let classes = x.dim(1)? as u32;
    let largest = x.broadcast_eq(&x.max_keepdim(1)?)?;
    let each = Tensor::arange(0, classes, x.device())?.broadcast_as(x.shape())?.contiguous()?;
    let none = Tensor::full(classes, x.shape(), x.device())?;
    let first = largest.where_cond(&each, &none)?.min(1)?;
    // a row of NaN has no largest number
    first.lt(classes)?.where_cond(&first, &first.zeros_like()?)
}

/// The logits as rows of a matrix, and what follows from them.
struct ComposedRows {
    /// Where the target is class indices.
    indices: Option<ComposedIndices>,
    /// `(N)`, u8: whether the row counts.
    counts: Tensor,
    /// The same as 1 and 0.
    counted: Tensor,
    /// `(N)`: the weight of the row where it counts, else 0; if there are any.
    weight: Option<Tensor>,
    /// `(N, C)`, [`transformed`].
    x: Tensor,
    /// `(N, C)`
    log_probs: Tensor,
    /// `(N)`
    lse: Tensor,
}

impl ComposedRows {
    fn new(problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<Self> {
        let o = &problem.options;
        let dtype = arithmetic(logits.dtype());
        let mut x = as_matrix(logits, problem.axis)?.to_dtype(dtype)?;
        let (rows, classes) = x.dims2()?;
        let weight = o.rows.row_weights(dtype)?;
        let (indices, counts) = if !target.dtype().is_float() {
            let indices = ComposedIndices::new(problem.name, target, classes, &o.rows)?;
            let counts = indices.counted.clone();
            (Some(indices), counts)
        } else {
            let all = || Tensor::ones(rows, DType::U8, logits.device());
            (None, weight.as_ref().map_or_else(all, |weight| weight.ne(0f64))?)
        };
        let weight = weight.map(|weight| counts.where_cond(&weight, &weight.zeros_like()?)).transpose()?;
        if indices.is_some() || weight.is_some() {
            x = counted_rows(&counts, &x)?;
        }
        let x = transformed(o, x)?;
        let (shifted, log_sum, max) = shifted_log_sum(&x, 1, o.split_scale().1)?;
        let log_probs = shifted.broadcast_sub(&log_sum)?;
        let counted = counts.to_dtype(dtype)?;
        Ok(ComposedRows { indices, counts, counted, weight, x, log_probs, lse: (log_sum + max)?.squeeze(1)? })
    }

    /// The loss of each row `(N)` with the z-loss, and what the rows add to the denominator.
    fn losses(&self, problem: &CrossEntropy, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let (o, log_probs, dtype) = (&problem.options, &self.log_probs, self.x.dtype());
        let (rows, classes) = self.x.dims2()?;
        let e = o.label_smoothing;
        let (mut loss, mut weights) = match &self.indices {
            None => {
                let target = as_matrix(target, problem.axis)?.to_dtype(dtype)?;
                let target = match &self.weight {
                    Some(_) => counted_rows(&self.counts, &target)?,
                    None => target,
                };
                let target = target.affine(1.0 - e, e / classes as f64)?;
                let target = match &o.rows.weight {
                    Some(weight) => target.broadcast_mul(weight)?,
                    None => target,
                };
                (scaled(&target, log_probs)?.sum(1)?.neg()?, self.counted.clone())
            }
            Some(indices) => {
                let weights = indices.class_weights(&o.rows, dtype)?;
                let own = match o.row_transform {
                    Some(transform) => {
                        transformed_nll(transform, &chosen(log_probs, &indices.classes)?.neg()?)?.neg()?
                    }
                    None => log_probs.gather(&indices.classes.unsqueeze(1)?, 1)?.squeeze(1)?,
                };
                ((scaled(&weights, &own)?.neg()? * (1.0 - e))?, weights)
            }
        };
        if e > 0.0 && self.indices.is_some() {
            let weight = match &o.rows.weight {
                Some(weight) => weight.broadcast_as((rows, classes))?.contiguous()?,
                None => log_probs.ones_like()?,
            };
            let smooth = scaled(&weight, log_probs)?.sum(1)?.neg()?;
            loss = (loss + (smooth * &self.counted)? * (e / classes as f64))?;
        }
        if o.z_loss != 0.0 {
            loss = (loss + self.z_loss(o.z_loss)?)?;
        }
        if let Some(weight) = &self.weight {
            (loss, weights) = (scaled(weight, &loss)?, (weights * weight)?);
        }
        match &self.indices {
            Some(indices) => Ok((indices.poison(loss)?, weights)),
            None => Ok((loss, weights)),
        }
    }

    /// `z lse^2` of the rows that count.
    fn z_loss(&self, z: f64) -> Result<Tensor> {
        (self.lse.sqr()? * &self.counted)? * z
    }

    /// The numbers of each row `(N)`.
    fn statistics(
        &self,
        problem: &CrossEntropy,
        losses: Tensor,
        (logits, target): (&Tensor, &Tensor),
    ) -> Result<[Tensor; STATISTICS]> {
        let (log_probs, lse, counted) = (self.log_probs.detach(), self.lse.detach(), &self.counted);
        let entropy = scaled(&log_probs.exp()?, &log_probs)?.sum(1)?.neg()?;
        // of the logits as they are, where the row is ignored too
        let x = as_matrix(logits, problem.axis)?.to_dtype(self.x.dtype())?;
        let argmax = first_largest(&transformed(&problem.options, x)?)?;
        let own = match &self.indices {
            Some(indices) => indices.classes.clone(),
            None => first_largest(&as_matrix(target, problem.axis)?.to_dtype(self.x.dtype())?)?.to_dtype(DType::I64)?,
        };
        let hit = argmax.to_dtype(DType::I64)?.eq(&own)?.to_dtype(DType::F32)?;
        let counts = counted.to_dtype(DType::F32)?;
        let z_loss = self.z_loss(problem.options.z_loss)?.detach();
        Ok([losses, (lse * counted)?, z_loss, (entropy * counted)?, argmax, (hit * &counts)?, counts])
    }
}

/// A loss, and what the statistics of its rows are made of.
pub(crate) struct ComposedLoss {
    pub loss: Tensor,
    /// The rows, if there are any, and their losses `(N)`.
    rows: Option<ComposedRows>,
    losses: Tensor,
}

impl ComposedLoss {
    pub fn new(problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<Self> {
        let (form, shape) = (&problem.form, row_shape(logits.layout(), problem.axis));
        if logits.elem_count() == 0 {
            // nothing to reduce, and candle reduces nothing to nothing
            let losses = logits.to_dtype(arithmetic(logits.dtype()))?.flatten_all()?;
            return Ok(ComposedLoss { loss: reduced(form, losses.clone(), &losses, shape)?, rows: None, losses });
        }
        let rows = ComposedRows::new(problem, logits, target)?;
        let (losses, weights) = rows.losses(problem, target)?;
        Ok(ComposedLoss { loss: reduced(form, losses.clone(), &weights, shape)?, rows: Some(rows), losses })
    }

    /// The rows' losses and more, without a graph.
    pub fn statistics(&self, problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<RowStatistics> {
        let (shape, losses) = (row_shape(logits.layout(), problem.axis), self.losses.detach());
        match &self.rows {
            None => RowStatistics::zeros(&shape, losses.dtype(), losses.device()),
            Some(rows) => {
                let all = rows.statistics(problem, losses, (&logits.detach(), &target.detach()))?;
                RowStatistics::in_order(all).try_map(|_, values| values.reshape(&shape))
            }
        }
    }
}

/// The loss.
pub(crate) fn loss(problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    Ok(ComposedLoss::new(problem, logits, target)?.loss)
}
