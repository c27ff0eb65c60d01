//! Cross-entropy of the logits `hidden weightᵀ + bias`, of which one chunk of rows exists at a time.
//!
//! A chunk's logits are a product in one buffer, the kernel turns them into their gradient in place, and two more
//! products bring that gradient to the inputs: 6NDV operations, the same as with all logits at once. So the gradients
//! are made in the forward, as sums that know neither the upstream gradient nor the mean's denominator; both are one
//! factor of the sums in the end, which is also why 16-bit gradients of a mean over many rows don't vanish. With
//! [`LossForm::Each`] the upstream gradient is different in each row, and the backward computes the logits once more
//! (8NDV).
//!
//! Sums are kept in the arithmetic dtype and rounded once. Where all rows are one chunk, a product is its own sum: on
//! CUDA the backward makes these products, of any reduction, from the logits' gradient that the forward left.

use super::chunks::{ChunkResults, Gradients, Unfinished, Wanted};
use super::composed;
use super::inputs::{Counted, Inputs, scalar};
use super::problem::{Linear, LinearGradients};
use crate::custom_op::{
    Arg, DeviceStorage, Locked, check_first_order, device_passes, is_composed, is_composed_in_graph,
};
use crate::reduction::LossForm;
use crate::softmax::problem::RowStatistics;
use candle_core::{CustomOp3, DType, Error, Result, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// The upstream gradient.
enum Upstream<'a> {
    /// Of a reduced loss: a scalar.
    Scalar(&'a Tensor),
    /// Of each row `(N)`, in the arithmetic dtype, and a scalar that belongs to all of them.
    Rows(&'a Tensor, &'a Tensor),
}

/// The upstream gradient of the rows as numbers that f16 can hold, and their common factor.
fn normalised(upstream: Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
    let one = scalar(1.0, upstream.device())?.to_dtype(upstream.dtype())?;
    if dtype != DType::F16 || upstream.elem_count() == 0 {
        return Ok((upstream, one));
    }
    let peak = upstream.abs()?.max(0)?;
    let factor = peak.ne(0f64)?.where_cond(&peak, &one)?;
    Ok((upstream.broadcast_div(&factor)?, factor))
}

/// The tensors that autograd may track.
fn operands<'a>(hidden: &'a Tensor, weight: &'a Tensor, bias: Option<&'a Tensor>) -> Vec<&'a Tensor> {
    [Some(hidden), Some(weight), bias].into_iter().flatten().collect()
}

/// The statistics of all rows from those of the chunks; without chunks zeros, as for rows that are ignored, whose
/// logits are never made.
fn row_statistics(
    chunks: &[RowStatistics],
    (inputs, counted): (&Inputs, &Counted),
    shape: &Shape,
) -> Result<RowStatistics> {
    let Some(joined) = RowStatistics::cat(chunks)? else {
        return RowStatistics::zeros(shape, inputs.arithmetic(), inputs.device());
    };
    joined.try_map(|_, values| counted.selection.spread_counted(values.clone(), inputs.rows())?.reshape(shape))
}

impl Linear {
    /// The loss, with autograd.
    pub fn forward(self, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Tensor> {
        if is_composed_in_graph(self.problem.options.rows.fused, &operands(hidden, weight, bias)) {
            return composed::loss(&self, hidden, weight, bias, target);
        }
        Ok(self.attached(hidden, weight, bias, target, false)?.0)
    }

    /// The loss, with autograd, and from the same logits the statistics of each row.
    pub fn forward_with_statistics(
        self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, RowStatistics)> {
        if is_composed_in_graph(self.problem.options.rows.fused, &operands(hidden, weight, bias)) {
            return composed::loss_and_statistics(&self, hidden, weight, bias, target);
        }
        let (loss, rows) = self.attached(hidden, weight, bias, target, true)?;
        Ok((loss, rows.ok_or_else(|| Error::msg("statistics that were asked for are missing"))?))
    }

    /// The loss from the kernels, tied to its inputs, and the statistics where they are asked for.
    fn attached(
        self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
        statistics: bool,
    ) -> Result<(Tensor, Option<RowStatistics>)> {
        let inputs = Inputs::new(hidden, weight, bias, target)?;
        let wanted = Wanted {
            hidden: hidden.track_op(),
            weight: weight.track_op(),
            bias: bias.is_some_and(|bias| bias.track_op()),
            statistics: false,
        };
        let counted = Counted::new(&self, &inputs)?;
        let in_forward = match self.problem.form {
            LossForm::Each if !self.keeps_chunk(&inputs, counted.rows, wanted) => Wanted::NOTHING,
            _ => wanted,
        };
        let in_forward = Wanted { statistics, ..in_forward };
        let results = self.run(&inputs, &counted, in_forward, None)?;
        let rows = || row_statistics(&results.statistics, (&inputs, &counted), target.shape());
        let statistics = statistics.then(rows).transpose()?;
        let loss = self.reduced(&inputs, &counted, results.losses)?.reshape(self.loss_shape(target))?;
        if !wanted.gradients() {
            return Ok((loss, statistics));
        }
        let attached = Attached {
            name: self.problem.name,
            linear: self,
            target: target.detach(),
            counted,
            wanted,
            has_bias: bias.is_some(),
            loss,
            saved: Mutex::new(in_forward.gradients().then_some(results.gradients)),
        };
        let loss = match bias {
            Some(bias) => hidden.apply_op3(weight, bias, attached)?,
            // a third argument without a gradient
            None => hidden.apply_op3(weight, &inputs.target, attached)?,
        };
        Ok((loss, statistics))
    }

    /// The loss and its gradients for an upstream gradient of the grad scale, without a graph.
    pub fn loss_and_grad(
        self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, LinearGradients)> {
        if is_composed(self.problem.options.rows.fused, hidden) {
            return composed::loss_and_grad(&self, hidden, weight, bias, target);
        }
        let inputs = Inputs::new(hidden, weight, bias, target)?;
        let wanted = Wanted { hidden: true, weight: true, bias: bias.is_some(), statistics: false };
        let counted = Counted::new(&self, &inputs)?;
        let ChunkResults { losses, gradients, .. } = self.run(&inputs, &counted, wanted, None)?;
        let loss = self.reduced(&inputs, &counted, losses)?.reshape(self.loss_shape(target))?;
        let upstream = scalar(self.problem.options.rows.grad_scale, inputs.device())?;
        let of = (&inputs, &counted, wanted);
        let gradients = self.gradients(of, gradients, Upstream::Scalar(&upstream), hidden.shape())?;
        let missing = || Error::msg("a gradient that was asked for is missing");
        let hidden = gradients.hidden.ok_or_else(missing)?;
        let weight = gradients.weight.ok_or_else(missing)?;
        Ok((loss, LinearGradients { hidden, weight, bias: gradients.bias }))
    }

    pub(super) fn loss_shape(&self, target: &Tensor) -> Shape {
        self.problem.form.shape(target.shape().clone())
    }

    /// The loss as it is returned, but flat.
    fn reduced(&self, inputs: &Inputs, counted: &Counted, losses: Option<Tensor>) -> Result<Tensor> {
        let all = inputs.rows();
        let dtype = inputs.arithmetic();
        match (&self.problem.form, losses) {
            (LossForm::Each, None) => Tensor::zeros(all, dtype, inputs.device()),
            (LossForm::Each, Some(losses)) => counted.selection.spread(losses, all),
            (LossForm::Scalar(_), losses) => {
                let sum = match losses {
                    Some(losses) => losses.to_dtype(DType::F64)?.sum_all()?,
                    None => scalar(0.0, inputs.device())?,
                };
                (sum / &counted.denominator)?.to_dtype(dtype)
            }
        }
    }

    /// The gradients from what the chunks left.
    fn gradients(
        &self,
        (inputs, counted, wanted): (&Inputs, &Counted, Wanted),
        unfinished: Unfinished,
        upstream: Upstream,
        hidden_shape: &Shape,
    ) -> Result<Gradients> {
        let factor = match upstream {
            Upstream::Scalar(upstream) => {
                let factor = (upstream.to_dtype(DType::F64)? / &counted.denominator)?;
                // no gradient from rows that weigh nothing, as `over_denominator` has it
                counted.denominator.ne(0f64)?.where_cond(&factor, &factor.zeros_like()?)?
            }
            Upstream::Rows(_, factor) => factor.clone(),
        };
        let factor = factor.to_dtype(inputs.arithmetic())?;
        let rows = match upstream {
            Upstream::Rows(upstream, _) if counted.rows > 0 => {
                Some(counted.selection.rows(upstream, 0, counted.rows)?)
            }
            Upstream::Rows(..) | Upstream::Scalar(_) => None,
        };
        let Gradients { hidden, weight, bias } = match unfinished {
            Unfinished::Sums(sums) => sums.scaled(&factor, rows.as_ref(), inputs.hidden.dtype())?,
            Unfinished::Chunk(chunk) => chunk.gradients(inputs, wanted, &factor, rows.as_ref())?,
        };
        let all_rows = |hidden| counted.selection.spread(hidden, inputs.rows())?.reshape(hidden_shape);
        Ok(Gradients {
            hidden: hidden.map(all_rows).transpose()?,
            weight,
            bias: bias.map(|bias| bias.squeeze(0)).transpose()?,
        })
    }
}

/// Ties a loss that was computed already to the inputs it came from.
struct Attached {
    name: &'static str,
    linear: Linear,
    target: Tensor,
    counted: Counted,
    wanted: Wanted,
    has_bias: bool,
    loss: Tensor,
    /// What the chunks left in the forward, for the first backward. A second one computes it again: keeping it would
    /// cost as much memory as the weight's gradient itself.
    saved: Mutex<Option<Unfinished>>,
}

impl Attached {
    fn run<S: DeviceStorage>(&self, _: Arg<S>, _: Arg<S>, _: Arg<S>) -> Result<(S, Shape)> {
        let loss = Locked::new(&self.loss);
        let (storage, layout) = loss.arg::<S>(self.name)?;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }
}

impl CustomOp3 for Attached {
    device_passes!(3, name);

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        check_first_order(self.name)?;
        let inputs = Inputs::new(hidden, weight, self.has_bias.then_some(bias), &self.target)?;
        let linear = &self.linear;
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        let unfinished = |upstream| match saved {
            Some(saved) => Ok(saved),
            None => linear.run(&inputs, &self.counted, self.wanted, upstream).map(|results| results.gradients),
        };
        let of = (&inputs, &self.counted, self.wanted);
        let gradients = match linear.problem.form {
            LossForm::Scalar(_) => {
                linear.gradients(of, unfinished(None)?, Upstream::Scalar(upstream), hidden.shape())?
            }
            LossForm::Each => {
                let upstream = upstream.flatten_all()?.contiguous()?;
                let (upstream, factor) = normalised(upstream, hidden.dtype())?;
                linear.gradients(
                    of,
                    unfinished(Some(&upstream))?,
                    Upstream::Rows(&upstream, &factor),
                    hidden.shape(),
                )?
            }
        };
        Ok((gradients.hidden, gradients.weight, gradients.bias))
    }
}
