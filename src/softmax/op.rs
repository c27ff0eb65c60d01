//! The softmax family's custom ops: one problem for each row of classes.
//!
//! An op knows its options and dispatches nothing: candle calls `cpu_fwd` or `cuda_fwd` by the device of the logits, and
//! those call the kernels in [`cpu`] or `cuda`. The ops receive the caller's own
//! tensors, never reshaped copies of them, because each op in candle's graph costs its backward a zero fill and an addition.

use super::cpu;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::reduction::Reduction;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, InplaceOp2, Layout, Result, Shape, Storage, Tensor, bail,
};
use std::sync::{Arc, OnceLock};

/// Where the logits of each row lie: `outer x inner` rows of `classes` logits.
///
/// Row `r` is position `(r / inner, r % inner)`, the order of a contiguous target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub outer: usize,
    pub inner: usize,
    pub classes: usize,
    pub offset: usize,
    pub outer_stride: usize,
    pub inner_stride: usize,
    pub class_stride: usize,
    /// How many of the axes other than the class axis make up `outer`.
    pub split: usize,
}

impl Rows {
    /// The rows along `axis`, or `None` where the other axes don't merge into two strides.
    pub fn of(layout: &Layout, axis: usize) -> Option<Self> {
        let natural = Self::with_split(layout, axis, axis);
        if natural.is_some() || layout.stride()[axis] != 1 {
            return natural;
        }
        // rows of adjacent classes may be grouped anywhere
        (0..layout.dims().len()).find_map(|split| Self::with_split(layout, axis, split))
    }

    /// The rows along `axis` with the first `split` of the other axes merged into `outer` and the rest into `inner`.
    pub fn with_split(layout: &Layout, axis: usize, split: usize) -> Option<Self> {
        let mut axes: Vec<_> = layout.dims().iter().copied().zip(layout.stride().iter().copied()).collect();
        let (classes, class_stride) = axes.remove(axis);
        let (outer, outer_stride) = merge(&axes[..split])?;
        let (inner, inner_stride) = merge(&axes[split..])?;
        // the stride of an axis with one position means nothing
        let class_stride = if classes == 1 { 1 } else { class_stride };
        Some(Rows {
            outer,
            inner,
            classes,
            offset: layout.start_offset(),
            outer_stride,
            inner_stride,
            class_stride,
            split,
        })
    }

    pub fn count(&self) -> usize {
        self.outer * self.inner
    }

    /// Whether a row's classes are next to each other. The gradient is then written in the order (outer, inner, class),
    /// otherwise in the order (outer, class, inner).
    pub fn class_last(&self) -> bool {
        self.inner == 1 || self.class_stride == 1
    }

    /// The storage index of a row's class 0.
    pub fn start(&self, row: usize) -> usize {
        match self.inner {
            // the usual case, without a division
            1 => self.offset + row * self.outer_stride,
            inner => self.offset + row / inner * self.outer_stride + row % inner * self.inner_stride,
        }
    }

    /// Where a row's class 0 is written, and how far apart its classes are.
    pub fn written_start(&self, row: usize) -> usize {
        match self.class_last() {
            true => row * self.classes,
            false => row / self.inner * self.classes * self.inner + row % self.inner,
        }
    }

    pub fn written_stride(&self) -> usize {
        if self.class_last() { 1 } else { self.inner }
    }

    /// Sizes and strides in the order (outer, inner, class) or (outer, class, inner).
    pub fn axes(&self, class_last: bool) -> [(usize, usize); 3] {
        let outer = (self.outer, self.outer_stride);
        let inner = (self.inner, self.inner_stride);
        let class = (self.classes, self.class_stride);
        if class_last { [outer, inner, class] } else { [outer, class, inner] }
    }
}

/// One size and stride for several axes, if they have one.
fn merge(axes: &[(usize, usize)]) -> Option<(usize, usize)> {
    let mut merged = (1, 0);
    for &(size, stride) in axes.iter().filter(|(size, _)| *size != 1) {
        merged = match merged {
            (1, _) => (size, stride),
            (n, outer) if outer == size * stride => (n * size, stride),
            _ => return None,
        };
    }
    Some(merged)
}

/// The tensor itself where [`Rows::of`] describes it, else a contiguous copy.
fn as_rows(tensor: &Tensor, axis: usize) -> Result<Tensor> {
    // one logit broadcast to all classes is not worth a way of its own in a kernel
    let broadcast = tensor.stride()[axis] == 0 && tensor.dims()[axis] > 1;
    match Rows::of(tensor.layout(), axis) {
        Some(_) if !broadcast => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    }
}

/// A second tensor of the logits' shape, grouped into rows as they are; a contiguous copy where its strides don't merge.
fn as_rows_like(tensor: &Tensor, axis: usize, split: usize) -> Result<Tensor> {
    match Rows::with_split(tensor.layout(), axis, split) {
        Some(_) => Ok(tensor.clone()),
        None => tensor.contiguous(),
    }
}

/// Class indices one after the other.
pub(crate) fn contiguous_indices(target: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let (Storage::Cuda(storage), false) = (&*target.storage_and_layout().0, target.is_contiguous()) {
        // candle's own copy has no kernel for i32, and for the others one that no CUDA graph can record
        return Ok(cuda_tensor(crate::cuda::operands::contiguous(storage, target.layout())?, target.shape()));
    }
    target.contiguous()
}

/// The rows of a tensor that went through [`as_rows`].
fn rows_of(name: &str, layout: &Layout, axis: usize) -> Result<Rows> {
    let rows = Rows::of(layout, axis);
    rows.ok_or_else(|| {
        Error::msg(format!(
            "{name}: strides {:?} of shape {:?} do not merge around axis {axis}",
            layout.stride(),
            layout.dims()
        ))
    })
}

/// The rows of a tensor that went through [`as_rows_like`].
fn rows_like(name: &str, layout: &Layout, axis: usize, like: &Rows) -> Result<Rows> {
    let rows = Rows::with_split(layout, axis, like.split);
    rows.ok_or_else(|| {
        Error::msg(format!(
            "{name}: strides {:?} of shape {:?} do not merge as the logits' do",
            layout.stride(),
            layout.dims()
        ))
    })
}

/// The shape in which a kernel writes a gradient of `shape`: with the class axis last if the rows are `class_last`.
fn written_shape(shape: &Shape, axis: usize, rows: &Rows) -> Shape {
    let mut dims = shape.dims().to_vec();
    if rows.class_last() {
        let classes = dims.remove(axis);
        dims.push(classes);
    }
    Shape::from(dims)
}

/// The inverse of [`written_shape`]: a view with the logits' shape.
fn view_as_logits(written: Tensor, axis: usize, class_last: bool) -> Result<Tensor> {
    let last = written.rank() - 1;
    if !class_last || axis == last {
        return Ok(written);
    }
    let mut order: Vec<usize> = (0..last).collect();
    order.insert(axis, last);
    written.permute(order)
}

/// A kernel's argument: where its elements are and how they lie.
pub(crate) type Arg<'a, S> = (&'a S, &'a Layout);

/// The checked options of cross-entropy and of NLL, which is cross-entropy without the softmax.
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    /// The public function, for errors that only the data can cause.
    pub name: &'static str,
    /// The class axis of the logits.
    pub axis: usize,
    /// Whether the input is log-probabilities already (NLL).
    pub log_probs: bool,
    /// Class weights: contiguous, in the arithmetic dtype, detached.
    pub weight: Option<Tensor>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    pub normalizer: Option<f64>,
    pub z_loss: f64,
    pub softcap: Option<f64>,
    pub logit_scale: f64,
    /// On CUDA: synchronise to check the values of the target. The CPU always checks them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub target_check: bool,
}

/// What the backward needs of the forward.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    /// `(2, rows)` in the arithmetic dtype: each row's maximum m, and the sum of `exp(x - m)` over the other classes.
    /// Absent for log-probabilities, whose gradient needs neither.
    pub statistics: Option<Tensor>,
    /// A scalar in the arithmetic dtype: what the sum of the rows' losses is divided by; 1 unless the reduction is Mean.
    pub denominator: Tensor,
}

/// One value for each row: the outputs of the statistics pass besides the loss.
pub(crate) struct Statistics<S> {
    pub lse: S,
    pub z_loss: S,
    pub entropy: S,
    pub argmax: S,
    pub correct: S,
}

impl<S> Statistics<S> {
    fn map<R>(self, f: impl Fn(S) -> R) -> Statistics<R> {
        Statistics {
            lse: f(self.lse),
            z_loss: f(self.z_loss),
            entropy: f(self.entropy),
            argmax: f(self.argmax),
            correct: f(self.correct),
        }
    }
}

/// Which argument a gradient is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Logits,
    /// Probability targets. The gradient is written in the arithmetic dtype, in the order of the logits' gradient.
    Target,
}

/// A tensor of its own from what a kernel wrote.
pub(crate) fn cpu_tensor(storage: CpuStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), false)
}

/// A tensor of its own from what a kernel wrote.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

impl CrossEntropy {
    /// The loss, with autograd.
    pub fn forward(self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        let (logits, target) = self.operands(logits, target)?;
        logits.apply_op2(&target, Forward { problem: Arc::new(self), saved: OnceLock::new() })
    }

    /// The loss and the gradient of the logits in one pass, without a graph.
    pub fn loss_and_grad(self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let (logits, target) = self.operands(&logits.detach(), &target.detach())?;
        let op = LossAndGrad { problem: self, loss: OnceLock::new() };
        let grad = logits.apply_op2_no_bwd(&target, &op)?;
        let grad = op.problem.as_logits(grad, &logits)?;
        Ok((taken(op.loss)?, grad))
    }

    /// As [`Self::loss_and_grad`], the gradient replacing the contiguous logits.
    pub fn loss_and_grad_inplace(mut self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        if logits.elem_count() == 0 {
            // candle takes the strides of an empty tensor for a broadcast
            return Ok(self.loss_and_grad(logits, target)?.0);
        }
        // weights may be a view of the logits, whose storage is locked while it is written
        self.weight = self.weight.as_ref().map(Tensor::copy).transpose()?;
        let (_, target) = self.operands(logits, &target.detach())?;
        let op = LossAndGrad { problem: self, loss: OnceLock::new() };
        logits.inplace_op2(&target, &op)?;
        taken(op.loss)
    }

    /// The loss of each row and five more values for each.
    pub fn statistics(self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Statistics<Tensor>)> {
        let (logits, target) = self.operands(&logits.detach(), &target.detach())?;
        let op = RowStatistics { problem: self, rest: OnceLock::new() };
        let loss = logits.apply_op2_no_bwd(&target, &op)?;
        Ok((loss, taken(op.rest)?))
    }

    /// Both tensors as the kernels read them: logits and probabilities as rows, class indices contiguous.
    fn operands(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        let logits = match Rows::of(logits.layout(), self.axis) {
            // NLL reads one number of a row, wherever it is
            Some(_) if self.log_probs => logits.clone(),
            _ => as_rows(logits, self.axis)?,
        };
        let target = if target.dtype().is_float() {
            as_rows_like(target, self.axis, self.rows(logits.layout())?.split)?
        } else {
            contiguous_indices(target)?
        };
        Ok((logits, target))
    }

    pub fn rows(&self, logits: &Layout) -> Result<Rows> {
        rows_of(self.name, logits, self.axis)
    }

    /// The rows of probability targets.
    pub fn target_rows(&self, target: &Layout, logits: &Rows) -> Result<Rows> {
        rows_like(self.name, target, self.axis, logits)
    }

    /// The shape of the rows: the logits' without the class axis.
    fn row_shape(&self, logits: &Layout) -> Shape {
        let mut dims = logits.dims().to_vec();
        dims.remove(self.axis);
        Shape::from(dims)
    }

    fn loss_shape(&self, logits: &Layout) -> Shape {
        match self.reduction {
            Reduction::None => self.row_shape(logits),
            Reduction::Mean | Reduction::Sum => Shape::from(()),
        }
    }

    fn written_shape(&self, logits: &Layout) -> Result<Shape> {
        Ok(written_shape(logits.shape(), self.axis, &self.rows(logits)?))
    }

    fn as_logits(&self, written: Tensor, logits: &Tensor) -> Result<Tensor> {
        view_as_logits(written, self.axis, self.rows(logits.layout())?.class_last())
    }
}

/// What an op left in its side output.
pub(crate) fn taken<T>(slot: OnceLock<T>) -> Result<T> {
    slot.into_inner().ok_or_else(|| Error::msg("a loss kernel wrote no side output"))
}

pub(crate) fn put<T>(slot: &OnceLock<T>, value: T) -> Result<()> {
    slot.set(value).map_err(|_| Error::msg("a loss op ran twice"))
}

struct Forward {
    problem: Arc<CrossEntropy>,
    saved: OnceLock<Saved>,
}

impl CustomOp2 for Forward {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (loss, saved) = cpu::forward(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.saved, saved)?;
        Ok((loss, self.problem.loss_shape(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let (loss, saved) = cuda::call::forward(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.saved, saved)?;
        Ok((loss, self.problem.loss_shape(l1)))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        target: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = self.saved.get() else { bail!("{}: backward before forward", self.problem.name) };
        let upstream = upstream.contiguous()?;
        let gradient = |of: Operand, arg: &Tensor| -> Result<Option<Tensor>> {
            if !arg.track_op() || !arg.dtype().is_float() {
                return Ok(None);
            }
            let op = Backward { problem: self.problem.clone(), saved: saved.clone(), of };
            let grad = logits.apply_op3_no_bwd(target, &upstream, &op)?.to_dtype(arg.dtype())?;
            self.problem.as_logits(grad, logits).map(Some)
        };
        Ok((gradient(Operand::Logits, logits)?, gradient(Operand::Target, target)?))
    }
}

struct Backward {
    problem: Arc<CrossEntropy>,
    saved: Saved,
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
        let grad = cpu::backward(&self.problem, &self.saved, self.of, (s1, l1), (s2, l2), (s3, l3))?;
        Ok((grad, self.problem.written_shape(l1)?))
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
        let grad = cuda::call::backward(&self.problem, &self.saved, self.of, (s1, l1), (s2, l2), (s3, l3))?;
        Ok((grad, self.problem.written_shape(l1)?))
    }
}

struct LossAndGrad {
    problem: CrossEntropy,
    loss: OnceLock<Tensor>,
}

impl CustomOp2 for LossAndGrad {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (loss, grad) = cpu::loss_and_grad(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.loss, cpu_tensor(loss, self.problem.loss_shape(l1)))?;
        Ok((grad, self.problem.written_shape(l1)?))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let (loss, grad) = cuda::call::loss_and_grad(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.loss, cuda_tensor(loss, self.problem.loss_shape(l1)))?;
        Ok((grad, self.problem.written_shape(l1)?))
    }
}

impl InplaceOp2 for LossAndGrad {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let loss = cpu::loss_and_grad_inplace(&self.problem, s1, l1, (s2, l2))?;
        put(&self.loss, cpu_tensor(loss, self.problem.loss_shape(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        let loss = cuda::call::loss_and_grad_inplace(&self.problem, s1, l1, (s2, l2))?;
        put(&self.loss, cuda_tensor(loss, self.problem.loss_shape(l1)))
    }
}

struct RowStatistics {
    problem: CrossEntropy,
    rest: OnceLock<Statistics<Tensor>>,
}

impl CustomOp2 for RowStatistics {
    fn name(&self) -> &'static str {
        self.problem.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.problem.row_shape(l1);
        let (loss, rest) = cpu::statistics(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.rest, rest.map(|s| cpu_tensor(s, shape.clone())))?;
        Ok((loss, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = self.problem.row_shape(l1);
        let (loss, rest) = cuda::call::statistics(&self.problem, (s1, l1), (s2, l2))?;
        put(&self.rest, rest.map(|s| cuda_tensor(s, shape.clone())))?;
        Ok((loss, shape))
    }
}

/// `log_softmax` along any axis, with autograd.
pub(crate) fn log_softmax(name: &'static str, logits: &Tensor, axis: usize) -> Result<Tensor> {
    let logits = as_rows(logits, axis)?;
    let rows = rows_of(name, logits.layout(), axis)?;
    view_as_logits(logits.apply_op1(LogSoftmax { name, axis })?, axis, rows.class_last())
}

struct LogSoftmax {
    name: &'static str,
    axis: usize,
}

impl CustomOp1 for LogSoftmax {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = rows_of(self.name, l1, self.axis)?;
        Ok((cpu::log_softmax(self.name, s1, &rows)?, written_shape(l1.shape(), self.axis, &rows)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout) -> Result<(CudaStorage, Shape)> {
        let rows = rows_of(self.name, l1, self.axis)?;
        Ok((cuda::call::log_softmax(self.name, s1, &rows)?, written_shape(l1.shape(), self.axis, &rows)))
    }

    fn bwd(&self, logits: &Tensor, out: &Tensor, upstream: &Tensor) -> Result<Option<Tensor>> {
        let rows = rows_of(self.name, logits.layout(), self.axis)?;
        // `out` is contiguous, as the forward wrote it
        let (axis, split) = if rows.class_last() { (out.rank() - 1, out.rank() - 1) } else { (self.axis, self.axis) };
        let upstream = as_rows_like(upstream, axis, split)?;
        let grad = out.detach().apply_op2_no_bwd(&upstream, &LogSoftmaxBackward { name: self.name, axis })?;
        view_as_logits(grad, self.axis, rows.class_last()).map(Some)
    }
}

/// The gradient from the log-probabilities and the upstream gradient, in the order of the log-probabilities.
struct LogSoftmaxBackward {
    name: &'static str,
    axis: usize,
}

impl CustomOp2 for LogSoftmaxBackward {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = rows_of(self.name, l1, self.axis)?;
        let upstream = rows_like(self.name, l2, self.axis, &rows)?;
        Ok((cpu::log_softmax_backward(self.name, (s1, &rows), (s2, &upstream))?, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let rows = rows_of(self.name, l1, self.axis)?;
        let upstream = rows_like(self.name, l2, self.axis, &rows)?;
        Ok((cuda::call::log_softmax_backward(self.name, (s1, &rows), (s2, &upstream))?, l1.shape().clone()))
    }
}
