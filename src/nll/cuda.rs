//! NLL on CUDA: one launch for the loss, one for the gradient; for both of a few rows, one.

use super::problem::{Nll, NllKernels};
use crate::check::arithmetic;
use crate::cuda::gpu::Gpu;
use crate::cuda::grid::Grid;
use crate::cuda::kernels::NLL;
use crate::cuda::launch::{InputView, Launch, Tag, Workspace, alloc, output, upstream_view};
use crate::custom_op::{Arg, Locked};
use crate::rows::cuda::{LossOutput, Partials, RowOperands, RowParams, Strides, TargetViews, check_indices};
use crate::rows::layout::Rows;
use crate::rows::options::LockedRowOptions;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Layout, Result, Tensor, bail};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use std::sync::Arc;

/// Threads of a block: `THREADS` of the kernels.
const THREADS: u32 = 256;
/// The most rows that one block takes, so that there is nothing to add to its sum.
const ROWS_OF_ONE_BLOCK: usize = 1024;
/// The most elements whose gradient that block writes too, in less time than another launch would take.
const ELEMENTS_OF_ONE_BLOCK: usize = 64 * 1024;
/// The most blocks of a grid: their threads take several rows, or windows of the gradient, in turn.
const MOST_BLOCKS: usize = 16 * 1024;
/// Bytes that a thread writes at a time.
const WINDOW: usize = 16;

/// `nll::Params` of the kernels, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
struct NllParams {
    base: RowParams,
    x: Strides,
    dtype: Tag,
    upstream_rows: i32,
    class_last: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for NllParams {}

/// A launch of `nll_loss_*`.
struct NllLossLaunch<'a> {
    params: NllParams,
    x: &'a CudaView<'a, u8>,
    targets: TargetViews<'a>,
    loss: LossOutput<'a>,
    /// The denominator, unless there is a gradient, and then the blocks' sums; `None` if there is neither.
    workspace: Option<CudaViewMut<'a, u8>>,
    /// For few rows, which one block works through.
    grad: Option<CudaViewMut<'a, u8>>,
}

impl NllLossLaunch<'_> {
    /// # Safety
    /// The rows that the parameters describe are inside of their tensors, the outputs have room for their numbers, and
    /// with `grad` there is one block.
    unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, blocks: u32) -> Result<()> {
        let name = if self.params.dtype == Tag::F64 { "nll_loss_f64" } else { "nll_loss_f32" };
        let mut launch = Launch::new(gpu, stream, &NLL, name)?;
        let workspace = self.workspace.as_mut().map_or(0, |workspace| launch.place(workspace));
        let loss = self.loss.pointers(workspace);
        // nll_loss_*(p, x, targets, loss, partials, ticket, result, denominator, grad)
        launch.value(&self.params).read(self.x);
        self.targets.push(&mut launch);
        launch.write_if(loss.rows).address(loss.sums).address(loss.ticket).write_if(loss.result);
        launch.address(if self.grad.is_none() { workspace } else { 0 });
        launch.write_if(self.grad.as_mut());
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(Grid::flat(blocks, THREADS)) }
    }
}

/// A launch of `nll_gradient_*`.
struct NllGradientLaunch<'a> {
    params: NllParams,
    targets: TargetViews<'a>,
    denominator: &'a CudaView<'a, u8>,
    /// `None`: the grad scale.
    upstream: Option<&'a CudaView<'a, u8>>,
    grad: CudaViewMut<'a, u8>,
}

impl NllGradientLaunch<'_> {
    /// # Safety
    /// There is a target for each row, the upstream gradient has one number or one for each row as the parameters say,
    /// and `grad` has room for all rows.
    unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, blocks: u32) -> Result<()> {
        let name = if self.params.dtype == Tag::F64 { "nll_gradient_f64" } else { "nll_gradient_f32" };
        let mut launch = Launch::new(gpu, stream, &NLL, name)?;
        // nll_gradient_*(p, targets, denominator, upstream, grad)
        launch.value(&self.params);
        self.targets.push(&mut launch);
        launch.read(self.denominator).read_if(self.upstream);
        launch.write(&mut self.grad);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(Grid::flat(blocks, THREADS)) }
    }
}

/// One call: the values that its launches share.
struct NllCall<'a> {
    problem: &'a Nll,
    device: CudaDevice,
    gpu: &'static Gpu,
    dtype: DType,
    rows: Rows,
    params: NllParams,
    operands: RowOperands<'a>,
}

impl<'a> NllCall<'a> {
    fn new(
        problem: &'a Nll,
        (storage, layout): Arg<'a, CudaStorage>,
        target: Arg<'a, CudaStorage>,
        locked: &'a LockedRowOptions,
    ) -> Result<Self> {
        let (name, rows) = (problem.name, problem.rows(layout)?);
        let base = RowParams::new(name, &rows, (&problem.options, &problem.form), target.0.dtype())?;
        let arithmetic = arithmetic(storage.dtype());
        let operands = RowOperands::new(name, (&rows, layout.shape(), arithmetic), target, locked)?;
        Ok(NllCall {
            problem,
            device: storage.device.clone(),
            gpu: Gpu::of(&storage.device)?,
            dtype: storage.dtype(),
            params: NllParams {
                base,
                x: Strides::of(&rows),
                dtype: Tag::of(storage.dtype())?,
                upstream_rows: 0,
                class_last: rows.class_last() as i32,
            },
            rows,
            operands,
        })
    }

    fn elements(&self) -> usize {
        self.rows.count() * self.rows.classes
    }

    fn per_row(&self) -> bool {
        self.problem.form.is_each()
    }

    fn wrap(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    fn targets(&self) -> TargetViews<'_> {
        self.operands.views()
    }

    /// The loss, the divisor of its sum as the first number of its storage, and with `both`, which few rows allow, the
    /// gradient in place of the divisor. One launch.
    fn forward(&self, x: &InputView, both: bool) -> Result<(CudaStorage, Option<CudaStorage>, Option<CudaStorage>)> {
        let rows = self.rows.count();
        let blocks = match rows {
            ..=ROWS_OF_ONE_BLOCK => 1,
            _ => rows.div_ceil(THREADS as usize).min(MOST_BLOCKS),
        } as u32;
        let (arithmetic, losses) = (arithmetic(self.dtype), if self.per_row() { rows } else { 1 });
        let (form, stream) = (&self.problem.form, self.device.cuda_stream());
        let mut workspace = Workspace::default();
        if !both {
            workspace.add(arithmetic.size_in_bytes());
        }
        let partials = Partials::of(form, blocks, &mut workspace, (self.gpu, &stream))?;
        // SAFETY: the launch writes all that is read
        let (mut loss, mut workspace, mut grad) = unsafe {
            let grad = both.then(|| alloc(&self.device, self.dtype, self.elements())).transpose()?;
            (alloc(&self.device, arithmetic, losses)?, workspace.alloc(&self.device, arithmetic)?, grad)
        };
        let launch = NllLossLaunch {
            params: self.params,
            x: &x.bytes,
            targets: self.targets(),
            loss: LossOutput::new(&mut loss, form, partials)?,
            workspace: workspace.as_mut().map(output).transpose()?,
            grad: grad.as_mut().map(output).transpose()?,
        };
        // SAFETY: the rows are those of the logits' layout, `RowOperands` has a target for each, the outputs have room
        // for them, and `both` is asked for with few rows
        unsafe { launch.launch(self.gpu, &stream, blocks)? };
        let wrap = |slice: Option<CudaStorageSlice>| slice.map(|slice| self.wrap(slice));
        Ok((self.wrap(loss), wrap(workspace), wrap(grad)))
    }

    /// The gradient for an upstream gradient of each row, of all rows, or of the grad scale. One launch.
    fn gradient(&self, denominator: &InputView, upstream: Option<(&InputView, bool)>) -> Result<CudaStorage> {
        // SAFETY: the launch writes all of it
        let mut grad = unsafe { alloc(&self.device, self.dtype, self.elements())? };
        let windows = self.elements().div_ceil(WINDOW / self.dtype.size_in_bytes());
        let blocks = windows.div_ceil(THREADS as usize).min(MOST_BLOCKS) as u32;
        let launch = NllGradientLaunch {
            params: NllParams { upstream_rows: upstream.is_some_and(|(_, each)| each) as i32, ..self.params },
            targets: self.targets(),
            denominator: &denominator.bytes,
            upstream: upstream.map(|(upstream, _)| &upstream.bytes),
            grad: output(&mut grad)?,
        };
        // SAFETY: `RowOperands` has a target for each row, `upstream_view` found the upstream gradient to fit, and the
        // gradient has an element for each log-probability
        unsafe { launch.launch(self.gpu, &self.device.cuda_stream(), blocks)? };
        Ok(self.wrap(grad))
    }

    /// Loss, denominator and gradient of no rows, for which nothing is launched.
    fn nothing(&self) -> Result<[CudaStorage; 3]> {
        let constant = |value: f64, dtype: DType, len: usize| -> Result<CudaStorage> {
            let tensor = Tensor::full(value, len, &candle_core::Device::Cuda(self.device.clone()))?.to_dtype(dtype)?;
            Locked::new(&tensor).arg::<CudaStorage>(self.problem.name)?.0.try_clone(tensor.layout())
        };
        let acc = arithmetic(self.dtype);
        let (loss, denominator) = self.problem.form.of_nothing();
        Ok([constant(loss, acc, 1)?, constant(denominator, acc, 1)?, constant(0.0, self.dtype, 1)?])
    }
}

impl NllKernels for CudaStorage {
    fn forward(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let locked = problem.options.lock(&problem.form);
        let call = NllCall::new(problem, log_probs, target, &locked)?;
        check_indices(problem.name, &problem.options, target, &call.rows)?;
        if call.elements() == 0 {
            let [loss, denominator, _] = call.nothing()?;
            return Ok((loss, denominator));
        }
        match call.forward(&InputView::new(log_probs.0, log_probs.1)?, false)? {
            (loss, Some(denominator), _) => Ok((loss, denominator)),
            _ => bail!("{}: no denominator", problem.name),
        }
    }

    fn backward(
        problem: &Nll,
        denominator: &Tensor,
        log_probs: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        let locked = problem.options.lock(&problem.form);
        let call = NllCall::new(problem, log_probs, target, &locked)?;
        if call.elements() == 0 {
            let [.., grad] = call.nothing()?;
            return Ok(grad);
        }
        let denominator = Locked::new(denominator);
        let denominator = denominator.arg::<Self>(problem.name)?;
        let (upstream, each) = upstream_view(problem.name, (call.rows.count(), arithmetic(call.dtype)), upstream)?;
        call.gradient(&InputView::new(denominator.0, denominator.1)?, Some((&upstream, each)))
    }

    fn loss_and_grad(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let locked = problem.options.lock(&problem.form);
        let call = NllCall::new(problem, log_probs, target, &locked)?;
        check_indices(problem.name, &problem.options, target, &call.rows)?;
        if call.elements() == 0 {
            let [loss, _, grad] = call.nothing()?;
            return Ok((loss, grad));
        }
        let x = InputView::new(log_probs.0, log_probs.1)?;
        let few = call.rows.count() <= ROWS_OF_ONE_BLOCK && call.elements() <= ELEMENTS_OF_ONE_BLOCK;
        match call.forward(&x, few)? {
            (loss, _, Some(grad)) => Ok((loss, grad)),
            (loss, Some(denominator), None) => {
                let denominator = InputView::new(&denominator, &Layout::contiguous(()))?;
                Ok((loss, call.gradient(&denominator, None)?))
            }
            (_, None, None) => bail!("{}: neither a gradient nor a denominator", problem.name),
        }
    }
}

#[cfg(test)]
mod tests;
