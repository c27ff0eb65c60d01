//! The softmax family's custom ops, written once for all devices.
//!
//! The ops receive the caller's own tensors, never reshaped copies of them, because each op in candle's graph costs its
//! backward a zero fill and an addition.

use super::composed::{self, ComposedLoss};
use super::problem::{CrossEntropy, RowStatistics, Saved, SoftmaxKernels};
use crate::custom_op::{
    Arg, Argument, check_first_order, device_passes, is_composed, is_composed_in_graph, put, saved, taken,
    takes_gradient, through_autograd,
};
use crate::reduction::{Denominator, LossForm};
use crate::rows::layout::{
    as_rows, as_rows_like, contiguous_indices, row_shape, rows_like, rows_of, view_as_logits, written_shape,
};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, InplaceOp2, Layout, Result, Shape, Tensor, bail,
};
use std::sync::{Arc, OnceLock};

impl CrossEntropy {
    /// The loss, with autograd.
    pub fn forward(self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        if is_composed_in_graph(self.options.rows.fused, &[logits, target]) {
            return composed::loss(&self, logits, target);
        }
        self.forward_by_kernels(logits, target, None)
    }

    /// The loss, with autograd, and from the same pass the statistics of each row.
    pub fn forward_with_statistics(self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, RowStatistics)> {
        if is_composed_in_graph(self.options.rows.fused, &[logits, target]) {
            let composed = ComposedLoss::new(&self, logits, target)?;
            let statistics = composed.statistics(&self, logits, target)?;
            return Ok((composed.loss, statistics));
        }
        let statistics = Arc::new(OnceLock::new());
        let loss = self.forward_by_kernels(logits, target, Some(statistics.clone()))?;
        let left = statistics.get().cloned();
        Ok((loss, left.ok_or_else(|| Error::msg("a loss kernel left no statistics"))?))
    }

    /// The loss, with autograd; a pass that is given a place for statistics leaves them there.
    fn forward_by_kernels(
        self,
        logits: &Tensor,
        target: &Tensor,
        statistics: Option<Arc<OnceLock<RowStatistics>>>,
    ) -> Result<Tensor> {
        let (logits, target) = self.operands(logits, target)?;
        let op = CrossEntropyForward { problem: Arc::new(self), saved: OnceLock::new(), statistics };
        logits.apply_op2(&target, op)
    }

    /// The loss and the gradient of the logits in one pass, without a graph.
    pub fn loss_and_grad(self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        if is_composed(self.options.rows.fused, logits) {
            return through_autograd(logits, self.options.rows.grad_scale, |logits| {
                composed::loss(&self, logits, target)
            });
        }
        let (logits, target) = self.operands(&logits.detach(), &target.detach())?;
        let op = CrossEntropyLossAndGrad { problem: self, loss: OnceLock::new() };
        let grad = logits.apply_op2_no_bwd(&target, &op)?;
        let class_last = op.problem.rows(logits.layout())?.class_last();
        let grad = view_as_logits(grad, op.problem.axis, class_last)?;
        Ok((taken(op.loss)?, grad))
    }

    /// As [`Self::loss_and_grad`], the gradient replacing the contiguous logits.
    pub fn loss_and_grad_inplace(mut self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.check_storage(logits, target)?;
        if logits.elem_count() == 0 {
            // candle takes the strides of an empty tensor for a broadcast
            return Ok(self.loss_and_grad(logits, target)?.0);
        }
        if is_composed(self.options.rows.fused, logits) {
            let (loss, grad) = self.loss_and_grad(logits, target)?;
            logits.slice_set(&grad.contiguous()?, 0, 0)?;
            return Ok(loss);
        }
        // weights may be a view of the logits, whose storage is locked while it is written
        let rows = &mut self.options.rows;
        for operand in [&mut rows.weight, &mut rows.row_weight].into_iter().flatten() {
            *operand = operand.copy()?;
        }
        self.form = match self.form {
            LossForm::Scalar(Denominator::Tensor(tensor)) => LossForm::Scalar(Denominator::Tensor(tensor.copy()?)),
            form => form,
        };
        let (_, target) = self.operands(logits, &target.detach())?;
        let op = CrossEntropyLossAndGrad { problem: self, loss: OnceLock::new() };
        logits.inplace_op2(&target, &op)?;
        taken(op.loss)
    }

    /// The gradient must not overwrite the target.
    fn check_storage(&self, logits: &Tensor, target: &Tensor) -> Result<()> {
        let (of_logits, of_target) = (logits.storage_and_layout().0, target.storage_and_layout().0);
        if !std::ptr::eq(&*of_logits, &*of_target) {
            return Ok(());
        }
        bail!(
            "{}: logits and target share their storage, where the gradient would overwrite the target too, expected a \
             target of its own (`target.copy()?`), or loss_and_grad",
            self.name
        )
    }

    /// Both tensors as the kernels read them: logits and probabilities as rows, class indices contiguous.
    fn operands(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let logits = as_rows(logits, self.axis)?;
        let target = if target.dtype().is_float() {
            as_rows_like(target, self.axis, self.rows(logits.layout())?.split)?
        } else {
            contiguous_indices(target)?
        };
        Ok((logits, target))
    }

    fn written_shape(&self, logits: &Layout) -> Result<Shape> {
        Ok(written_shape(logits.shape(), self.axis, &self.rows(logits)?))
    }
}

struct CrossEntropyForward {
    problem: Arc<CrossEntropy>,
    saved: OnceLock<Saved>,
    /// Where the statistics of each row are wanted.
    statistics: Option<Arc<OnceLock<RowStatistics>>>,
}

impl CrossEntropyForward {
    fn run<S: SoftmaxKernels>(&self, logits: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, saved) = match &self.statistics {
            None => S::forward(&self.problem, logits, target)?,
            Some(statistics) => {
                let (loss, saved, numbers) = S::forward_with_statistics(&self.problem, logits, target)?;
                let shape = row_shape(logits.1, self.problem.axis);
                put(statistics, RowStatistics::in_order(numbers.map(|numbers| numbers.into_tensor(&shape))))?;
                (loss, saved)
            }
        };
        put(&self.saved, saved)?;
        Ok((loss, self.problem.loss_shape(logits.1)))
    }
}

impl CustomOp2 for CrossEntropyForward {
    device_passes!(2, problem.name);

    fn bwd(
        &self,
        logits: &Tensor,
        target: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let problem = &self.problem;
        let left = saved(&self.saved, problem.name)?;
        let upstream = upstream.contiguous()?;
        let class_last = problem.rows(logits.layout())?.class_last();
        let gradient = |of: Argument, arg: &Tensor| -> Result<Option<Tensor>> {
            if !takes_gradient(arg) {
                return Ok(None);
            }
            let op = CrossEntropyBackward { problem: problem.clone(), saved: left.clone(), of };
            let grad = logits.apply_op3_no_bwd(target, &upstream, &op)?.to_dtype(arg.dtype())?;
            view_as_logits(grad, problem.axis, class_last).map(Some)
        };
        Ok((gradient(Argument::Input, logits)?, gradient(Argument::Target, target)?))
    }
}

struct CrossEntropyBackward {
    problem: Arc<CrossEntropy>,
    saved: Saved,
    of: Argument,
}

impl CrossEntropyBackward {
    fn run<S: SoftmaxKernels>(&self, logits: Arg<S>, target: Arg<S>, upstream: Arg<S>) -> Result<(S, Shape)> {
        let grad = S::backward(&self.problem, &self.saved, self.of, logits, target, upstream)?;
        Ok((grad, self.problem.written_shape(logits.1)?))
    }
}

impl CustomOp3 for CrossEntropyBackward {
    device_passes!(3, problem.name);
}

struct CrossEntropyLossAndGrad {
    problem: CrossEntropy,
    loss: OnceLock<Tensor>,
}

impl CrossEntropyLossAndGrad {
    fn run<S: SoftmaxKernels>(&self, logits: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, grad) = S::loss_and_grad(&self.problem, logits, target)?;
        put(&self.loss, loss.into_tensor(self.problem.loss_shape(logits.1)))?;
        Ok((grad, self.problem.written_shape(logits.1)?))
    }

    fn run_inplace<S: SoftmaxKernels>(&self, logits: &mut S, layout: &Layout, target: Arg<S>) -> Result<()> {
        let loss = S::loss_and_grad_inplace(&self.problem, logits, layout, target)?;
        put(&self.loss, loss.into_tensor(self.problem.loss_shape(layout)))
    }
}

impl CustomOp2 for CrossEntropyLossAndGrad {
    device_passes!(2, problem.name);
}

impl InplaceOp2 for CrossEntropyLossAndGrad {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        self.run_inplace(s1, l1, (s2, l2))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        self.run_inplace(s1, l1, (s2, l2))
    }
}

/// `log_softmax` along any axis, with autograd.
pub(crate) fn log_softmax(name: &'static str, fused: bool, logits: &Tensor, axis: usize) -> Result<Tensor> {
    if is_composed_in_graph(fused, &[logits]) {
        return composed::log_softmax(logits, axis);
    }
    let logits = as_rows(logits, axis)?;
    let rows = rows_of(name, logits.layout(), axis)?;
    let op = LogSoftmax { name, axis, tracked: logits.track_op(), statistics: OnceLock::new() };
    view_as_logits(logits.apply_op1(op)?, axis, rows.class_last())
}

struct LogSoftmax {
    name: &'static str,
    axis: usize,
    /// Whether there can be a backward.
    tracked: bool,
    /// Maximum and rest of each row, `(2, rows)`.
    statistics: OnceLock<Tensor>,
}

impl LogSoftmax {
    fn run<S: SoftmaxKernels>(&self, (logits, layout): Arg<S>) -> Result<(S, Shape)> {
        let rows = rows_of(self.name, layout, self.axis)?;
        let (log_probs, statistics) = S::log_softmax(self.name, logits, &rows, self.tracked)?;
        if let Some(statistics) = statistics {
            put(&self.statistics, statistics.into_tensor((2, rows.count())))?;
        }
        Ok((log_probs, written_shape(layout.shape(), self.axis, &rows)))
    }
}

impl CustomOp1 for LogSoftmax {
    device_passes!(1, name);

    fn bwd(&self, logits: &Tensor, out: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        check_first_order(self.name)?;
        let rows = rows_of(self.name, logits.layout(), self.axis)?;
        // the upstream gradient has the shape that the forward wrote
        let upstream_axis = if rows.class_last() { out.rank() - 1 } else { self.axis };
        let upstream = as_rows_like(upstream, upstream_axis, rows.split)?;
        let statistics = saved(&self.statistics, self.name)?.clone();
        let op = LogSoftmaxBackward { name: self.name, axis: self.axis, upstream_axis, statistics };
        view_as_logits(logits.apply_op2_no_bwd(&upstream, &op)?, self.axis, rows.class_last()).map(Some)
    }
}

/// The gradient from the logits, the upstream gradient and what the forward saved. It is written as the forward writes.
struct LogSoftmaxBackward {
    name: &'static str,
    axis: usize,
    upstream_axis: usize,
    statistics: Tensor,
}

impl LogSoftmaxBackward {
    fn run<S: SoftmaxKernels>(
        &self,
        (logits, layout): Arg<S>,
        (upstream, upstream_layout): Arg<S>,
    ) -> Result<(S, Shape)> {
        let rows = rows_of(self.name, layout, self.axis)?;
        let upstream_rows = rows_like(self.name, upstream_layout, self.upstream_axis, &rows)?;
        let grad = S::log_softmax_backward(self.name, (logits, &rows), &self.statistics, (upstream, &upstream_rows))?;
        Ok((grad, written_shape(layout.shape(), self.axis, &rows)))
    }
}

impl CustomOp2 for LogSoftmaxBackward {
    device_passes!(2, name);
}
