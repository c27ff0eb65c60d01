//! The logistic family's custom ops: one problem for each element.
//!
//! A loss of this family is a [`Term`]: a formula for the loss, the gradient and the target's gradient of one element. The
//! loops, weights, masks, reductions and dtypes are the same for all of them, in [`cpu::logistic`](crate::elementwise::cpu)
//! and `cuda::logistic`.

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::reduction::Reduction;
#[cfg(feature = "cuda")]
use crate::softmax::op::cuda_tensor;
use crate::softmax::op::{Operand, cpu_tensor, put, taken};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// The formula of one element, of an input x, a target t and a positive weight p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Term {
    /// `-(t max(ln x, -100) + (1 - t) max(ln(1 - x), -100))` for a probability x
    Bce,
    /// `t p softplus(-x) + (1 - t) softplus(x)` for a logit x
    BceWithLogits,
    /// `a u^gamma (t softplus(-x) + (1 - t) softplus(x))`, `u = t sigmoid(-x) + (1 - t) sigmoid(x)`,
    /// `a = alpha t + (1 - alpha) (1 - t)` or 1, for a logit x
    Focal { alpha: Option<f64>, gamma: f64 },
}

/// The checked options of a loss of this family.
#[derive(Clone, Debug)]
pub(crate) struct Logistic {
    /// The public function, for errors that only the data can cause.
    pub name: &'static str,
    pub term: Term,
    /// Factors of the loss and of its positive part: views of the input's shape (stride 0 where they were broadcast), in
    /// the arithmetic dtype, detached.
    pub weight: Option<Tensor>,
    pub pos_weight: Option<Tensor>,
    /// Elements where this is 0 don't count: a view of the input's shape, of any dtype, detached.
    pub mask: Option<Tensor>,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    /// Whether the elements along the last axis are averaged before the reduction, so that the axis disappears.
    pub average_rows: bool,
    /// On CUDA: synchronise to check the values of the target. The CPU always checks them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub target_check: bool,
}

impl Logistic {
    /// The loss, with autograd.
    pub fn forward(self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        input.apply_op2(target, Forward { problem: Arc::new(self), denominator: OnceLock::new() })
    }

    /// The loss and the gradient of the input in one pass, without a graph.
    pub fn loss_and_grad(self, input: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let op = LossAndGrad { problem: self, loss: OnceLock::new() };
        let grad = input.apply_op2_no_bwd(target, &op)?;
        Ok((taken(op.loss)?, grad))
    }

    /// How many adjacent elements are averaged into one loss.
    pub fn group(&self, input: &Layout) -> usize {
        match input.dims() {
            [.., last] if self.average_rows => *last,
            _ => 1,
        }
    }

    fn loss_shape(&self, input: &Layout) -> Shape {
        match (self.reduction, input.dims()) {
            (Reduction::None, [rows @ .., _]) if self.average_rows => Shape::from(rows),
            (Reduction::None, _) => input.shape().clone(),
            (Reduction::Mean | Reduction::Sum, _) => Shape::from(()),
        }
    }
}

struct Forward {
    problem: Arc<Logistic>,
    /// A scalar in the arithmetic dtype: what the sum of the losses is divided by; 1 unless the reduction is Mean.
    denominator: OnceLock<Tensor>,
}

impl CustomOp2 for Forward {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (loss, denominator) = cpu::forward(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.denominator, cpu_tensor(denominator, ()))?;
        Ok((loss, self.problem.loss_shape(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let (loss, denominator) = cuda::call::forward(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.denominator, cuda_tensor(denominator, ()))?;
        Ok((loss, self.problem.loss_shape(l1)))
    }

    fn bwd(
        &self,
        input: &Tensor,
        target: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(denominator) = self.denominator.get() else { bail!("{}: backward before forward", self.problem.name) };
        let upstream = upstream.contiguous()?;
        let gradient = |of: Operand, arg: &Tensor| -> Result<Option<Tensor>> {
            if !arg.track_op() || !arg.dtype().is_float() {
                return Ok(None);
            }
            let op = Backward { problem: self.problem.clone(), denominator: denominator.clone(), of };
            input.apply_op3_no_bwd(target, &upstream, &op)?.to_dtype(arg.dtype()).map(Some)
        };
        Ok((gradient(Operand::Logits, input)?, gradient(Operand::Target, target)?))
    }
}

struct Backward {
    problem: Arc<Logistic>,
    denominator: Tensor,
    of: Operand,
}

impl CustomOp3 for Backward {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let grad = cpu::backward(&self.problem, &self.denominator, self.of, (s1, l1), (s2, l2), (s3, l3))?;
        Ok((grad, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let grad = cuda::call::backward(&self.problem, &self.denominator, self.of, (s1, l1), (s2, l2), (s3, l3))?;
        Ok((grad, l1.shape().clone()))
    }
}

struct LossAndGrad {
    problem: Logistic,
    loss: OnceLock<Tensor>,
}

impl CustomOp2 for LossAndGrad {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (loss, grad) = cpu::loss_and_grad(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.loss, cpu_tensor(loss, self.problem.loss_shape(l1)))?;
        Ok((grad, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let (loss, grad) = cuda::call::loss_and_grad(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.loss, cuda_tensor(loss, self.problem.loss_shape(l1)))?;
        Ok((grad, l1.shape().clone()))
    }
}
