//! The element-wise family's custom ops, written once for all devices.

use super::composed;
use super::problem::{ElementKernels, Elements};
use crate::custom_op::{
    Arg, Argument, device_passes, is_composed, is_composed_in_graph, put, saved, taken, takes_gradient,
    through_autograd,
};
use candle_core::{CustomOp2, CustomOp3, Result, Shape, Tensor};
use std::sync::{Arc, OnceLock};

impl Elements {
    /// The loss, with autograd.
    pub fn forward(self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        if is_composed_in_graph(self.options.fused, &[input, target]) {
            return composed::loss(&self, input, target);
        }
        input.apply_op2(target, ElementForward { problem: Arc::new(self), denominator: OnceLock::new() })
    }

    /// The loss and the gradient of the input in one pass, without a graph.
    pub fn loss_and_grad(self, input: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        if is_composed(self.options.fused, input) {
            return through_autograd(input, self.options.grad_scale, |input| composed::loss(&self, input, target));
        }
        let op = ElementLossAndGrad { problem: self, loss: OnceLock::new() };
        let grad = input.apply_op2_no_bwd(target, &op)?;
        Ok((taken(op.loss)?, grad))
    }
}

struct ElementForward {
    problem: Arc<Elements>,
    /// The denominator of the sum of the losses: a scalar in the arithmetic dtype, 1 for a plain sum or for each.
    denominator: OnceLock<Tensor>,
}

impl ElementForward {
    fn run<S: ElementKernels>(&self, input: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, denominator) = S::forward(&self.problem, input, target)?;
        put(&self.denominator, denominator.into_tensor(()))?;
        Ok((loss, self.problem.loss_shape(input.1)))
    }
}

impl CustomOp2 for ElementForward {
    device_passes!(2, problem.name);

    fn bwd(
        &self,
        input: &Tensor,
        target: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let denominator = saved(&self.denominator, self.problem.name)?;
        let upstream = upstream.contiguous()?;
        let gradient = |of: Argument, arg: &Tensor| -> Result<Option<Tensor>> {
            if !takes_gradient(arg) {
                return Ok(None);
            }
            let op = ElementBackward { problem: self.problem.clone(), denominator: denominator.clone(), of };
            input.apply_op3_no_bwd(target, &upstream, &op)?.to_dtype(arg.dtype()).map(Some)
        };
        Ok((gradient(Argument::Input, input)?, gradient(Argument::Target, target)?))
    }
}

struct ElementBackward {
    problem: Arc<Elements>,
    denominator: Tensor,
    of: Argument,
}

impl ElementBackward {
    fn run<S: ElementKernels>(&self, input: Arg<S>, target: Arg<S>, upstream: Arg<S>) -> Result<(S, Shape)> {
        let grad = S::backward(&self.problem, &self.denominator, self.of, input, target, upstream)?;
        Ok((grad, input.1.shape().clone()))
    }
}

impl CustomOp3 for ElementBackward {
    device_passes!(3, problem.name);
}

struct ElementLossAndGrad {
    problem: Elements,
    loss: OnceLock<Tensor>,
}

impl ElementLossAndGrad {
    fn run<S: ElementKernels>(&self, input: Arg<S>, target: Arg<S>) -> Result<(S, Shape)> {
        let (loss, grad) = S::loss_and_grad(&self.problem, input, target)?;
        put(&self.loss, loss.into_tensor(self.problem.loss_shape(input.1)))?;
        Ok((grad, input.1.shape().clone()))
    }
}

impl CustomOp2 for ElementLossAndGrad {
    device_passes!(2, problem.name);
}
