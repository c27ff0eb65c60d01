//! NLL's custom ops, written once for all devices.

use super::composed;
use super::problem::{Nll, NllKernels};
use crate::custom_op::{Arg, device_passes, is_composed, is_composed_in_graph, put, saved, taken, through_autograd};
use crate::rows::layout::{Rows, contiguous_indices, view_as_logits, written_shape};
use candle_core::{CustomOp2, CustomOp3, Result, Shape, Tensor};
use std::sync::{Arc, OnceLock};

impl Nll {
    /// The loss, with autograd.
    pub fn forward(self, log_probs: &Tensor, target: &Tensor) -> Result<Tensor> {
        if is_composed_in_graph(self.options.fused, &[log_probs, target]) {
            return composed::loss(&self, log_probs, target);
        }
        let (log_probs, target) = self.operands(log_probs, target)?;
        log_probs.apply_op2(&target, NllForward { problem: Arc::new(self), denominator: OnceLock::new() })
    }

    /// The loss and the gradient of the log-probabilities, without a graph.
    pub fn loss_and_grad(self, log_probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        if is_composed(self.options.fused, log_probs) {
            return through_autograd(log_probs, self.options.grad_scale, |log_probs| {
                composed::loss(&self, log_probs, target)
            });
        }
        let (log_probs, target) = self.operands(&log_probs.detach(), &target.detach())?;
        let op = NllLossAndGrad { problem: self, loss: OnceLock::new() };
        let grad = log_probs.apply_op2_no_bwd(&target, &op)?;
        let class_last = op.problem.rows(log_probs.layout())?.class_last();
        let grad = view_as_logits(grad, op.problem.axis, class_last)?;
        Ok((taken(op.loss)?, grad))
    }

    /// Both tensors as the kernels read them. One number of a row is read, wherever it is.
    fn operands(&self, log_probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let log_probs = match Rows::of(log_probs.layout(), self.axis) {
            Some(_) => log_probs.clone(),
            None => log_probs.contiguous()?,
        };
        Ok((log_probs, contiguous_indices(target)?))
    }
}

struct NllForward {
    problem: Arc<Nll>,
    /// A scalar in the arithmetic dtype.
    denominator: OnceLock<Tensor>,
}

impl NllForward {
    fn run<S: NllKernels>(&self, log_probs: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, denominator) = S::forward(&self.problem, log_probs, target)?;
        put(&self.denominator, denominator.into_tensor(()))?;
        Ok((loss, self.problem.loss_shape(log_probs.1)))
    }
}

impl CustomOp2 for NllForward {
    device_passes!(2, problem.name);

    fn bwd(
        &self,
        log_probs: &Tensor,
        target: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let problem = &self.problem;
        let denominator = saved(&self.denominator, problem.name)?;
        let op = NllBackward { problem: problem.clone(), denominator: denominator.clone() };
        let grad = log_probs.apply_op3_no_bwd(target, &upstream.contiguous()?, &op)?;
        let class_last = problem.rows(log_probs.layout())?.class_last();
        Ok((Some(view_as_logits(grad, problem.axis, class_last)?), None))
    }
}

struct NllBackward {
    problem: Arc<Nll>,
    denominator: Tensor,
}

impl NllBackward {
    fn run<S: NllKernels>(&self, log_probs: Arg<S>, target: Arg<S>, upstream: Arg<S>) -> Result<(S, Shape)> {
        let grad = S::backward(&self.problem, &self.denominator, log_probs, target, upstream)?;
        let rows = self.problem.rows(log_probs.1)?;
        Ok((grad, written_shape(log_probs.1.shape(), self.problem.axis, &rows)))
    }
}

impl CustomOp3 for NllBackward {
    device_passes!(3, problem.name);
}

struct NllLossAndGrad {
    problem: Nll,
    loss: OnceLock<Tensor>,
}

impl NllLossAndGrad {
    fn run<S: NllKernels>(&self, log_probs: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, grad) = S::loss_and_grad(&self.problem, log_probs, target)?;
        put(&self.loss, loss.into_tensor(self.problem.loss_shape(log_probs.1)))?;
        let rows = self.problem.rows(log_probs.1)?;
        Ok((grad, written_shape(log_probs.1.shape(), self.problem.axis, &rows)))
    }
}

impl CustomOp2 for NllLossAndGrad {
    device_passes!(2, problem.name);
}
