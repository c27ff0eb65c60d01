//! The softmax family in candle's tensor ops: its specification, the tests' oracle, the baseline of the benches, and
//! the path where there are no kernels.

use super::problem::{CrossEntropy, RowStatistics};
use crate::check::arithmetic;
use crate::composed::{as_matrix, reduced, scaled};
use crate::rows::layout::row_shape;
use candle_core::{DType, Result, Tensor};

/// `x - log sum exp(x)` along an axis.
pub(crate) fn log_softmax(logits: &Tensor, axis: usize) -> Result<Tensor> {
    let x = logits.to_dtype(arithmetic(logits.dtype()))?;
    let (shifted, log_sum, _) = shifted_log_sum(&x, axis)?;
    shifted.broadcast_sub(&log_sum)?.to_dtype(logits.dtype())
}

/// `x - m`, `log sum exp(x - m)` and m along an axis.
fn shifted_log_sum(x: &Tensor, axis: usize) -> Result<(Tensor, Tensor, Tensor)> {
    // as a constant: the gradient of the sum of both parts does not depend on it
    let max = x.max_keepdim(axis)?.detach();
    let shifted = x.broadcast_sub(&max)?;
    let log_sum = shifted.exp()?.sum_keepdim(axis)?.log()?;
    Ok((shifted, log_sum, max))
}

/// The logits as rows of a matrix, and what follows from them.
struct ComposedRows {
    /// `(N)`, i64, where the target is class indices.
    indices: Option<Tensor>,
    /// `(N)`, 1 where the row counts, else 0.
    counted: Tensor,
    /// `(N, C)` after scale and soft cap.
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
        let indices = (!target.dtype().is_float()).then(|| target.flatten_all()?.to_dtype(DType::I64)).transpose()?;
        let counted = match &indices {
            Some(indices) => indices.ne(o.rows.ignore_index)?,
            None => Tensor::ones(x.dim(0)?, DType::U8, logits.device())?,
        };
        if indices.is_some() {
            // an ignored row is replaced by zeros, so that its NaN goes nowhere
            x = counted.unsqueeze(1)?.broadcast_as(x.shape())?.where_cond(&x, &x.zeros_like()?)?;
        }
        if o.logit_scale != 1.0 {
            x = (x * o.logit_scale)?;
        }
        if let Some(cap) = o.softcap {
            x = ((x / cap)?.tanh()? * cap)?;
        }
        let (shifted, log_sum, max) = shifted_log_sum(&x, 1)?;
        let log_probs = shifted.broadcast_sub(&log_sum)?;
        Ok(ComposedRows { indices, counted: counted.to_dtype(dtype)?, x, log_probs, lse: (log_sum + max)?.squeeze(1)? })
    }

    /// The loss of each row `(N)` without the z-loss, and what the rows add to the denominator.
    fn losses(&self, problem: &CrossEntropy, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let (rows, classes) = self.x.dims2()?;
        let (e, log_probs) = (problem.options.label_smoothing, &self.log_probs);
        let weight = match &problem.options.rows.weight {
            Some(weight) => weight.clone(),
            None => Tensor::ones(classes, self.x.dtype(), self.x.device())?,
        };
        let Some(indices) = &self.indices else {
            let target = as_matrix(target, problem.axis)?.to_dtype(self.x.dtype())?;
            let target = target.affine(1.0 - e, e / classes as f64)?.broadcast_mul(&weight)?;
            return Ok((scaled(&target, log_probs)?.sum(1)?.neg()?, self.counted.clone()));
        };
        // any class will do for an ignored row
        let safe = self.counted.ne(0f64)?.where_cond(indices, &indices.zeros_like()?)?;
        let row_weight = (weight.index_select(&safe, 0)? * &self.counted)?;
        let nll = scaled(&row_weight, &log_probs.gather(&safe.unsqueeze(1)?, 1)?.squeeze(1)?)?.neg()?;
        let mut loss = (nll * (1.0 - e))?;
        if e > 0.0 {
            let weight = weight.broadcast_as((rows, classes))?.contiguous()?;
            let smooth = scaled(&weight, log_probs)?.sum(1)?.neg()?;
            loss = (loss + (smooth * &self.counted)? * (e / classes as f64))?;
        }
        Ok((loss, row_weight))
    }

    /// `z lse^2` of the rows that count.
    fn z_loss(&self, z: f64) -> Result<Tensor> {
        (self.lse.sqr()? * &self.counted)? * z
    }
}

/// The loss.
pub(crate) fn loss(problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    let rows = ComposedRows::new(problem, logits, target)?;
    let (mut loss, weights) = rows.losses(problem, target)?;
    if problem.options.z_loss != 0.0 {
        loss = (loss + rows.z_loss(problem.options.z_loss)?)?;
    }
    reduced(&problem.options.rows, loss, &weights, row_shape(logits.layout(), problem.axis))
}

/// The rows' losses and more.
pub(crate) fn statistics(problem: &CrossEntropy, logits: &Tensor, target: &Tensor) -> Result<RowStatistics> {
    let (logits, target) = (&logits.detach(), &target.detach());
    let rows = ComposedRows::new(problem, logits, target)?;
    let (loss, _) = rows.losses(problem, target)?;
    let z_loss = rows.z_loss(problem.options.z_loss)?;
    let entropy = scaled(&rows.log_probs.exp()?, &rows.log_probs)?.sum(1)?.neg()?;
    // of the logits as they are where the row is ignored too
    let x = as_matrix(logits, problem.axis)?.to_dtype(rows.x.dtype())?;
    let x = if problem.options.logit_scale < 0.0 { x.neg()? } else { x };
    let argmax = x.argmax(1)?;
    let own = match &rows.indices {
        Some(indices) => indices.clone(),
        None => as_matrix(target, problem.axis)?.argmax(1)?.to_dtype(DType::I64)?,
    };
    let hit = argmax.to_dtype(DType::I64)?.eq(&own)?;
    let correct = (hit * rows.counted.to_dtype(DType::U8)?)?;
    let shape = &row_shape(logits.layout(), problem.axis);
    Ok(RowStatistics {
        loss: (loss + &z_loss)?.reshape(shape)?,
        lse: (&rows.lse * &rows.counted)?.reshape(shape)?,
        z_loss: z_loss.reshape(shape)?,
        entropy: (entropy * &rows.counted)?.reshape(shape)?,
        argmax: argmax.reshape(shape)?,
        correct: correct.reshape(shape)?,
    })
}
