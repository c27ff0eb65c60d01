//! NLL on CUDA: one launch for the loss, one for the gradient; for both of a few rows, one.

use super::problem::{Nll, NllKernels};
use crate::check::arithmetic;
use crate::cuda::gpu::Gpu;
use crate::cuda::grid::Grid;
use crate::cuda::kernels::NLL;
use crate::cuda::launch::{Input, Launch, Tag, alloc, output, partials};
use crate::cuda::rows::{RowParams, Strides, check_indices};
use crate::custom_op::{Arg, Locked};
use crate::reduction::Reduction;
use crate::rows::Rows;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Layout, Result, Tensor, bail};
use cudarc::driver::DeviceRepr;
use std::sync::Arc;

/// Threads of a block: `THREADS` of the kernels.
const THREADS: u32 = 256;
/// Up to here one block takes all rows, so that there is nothing to add to its sum.
const ROWS_OF_ONE_BLOCK: usize = 1024;
/// Up to so many elements it writes their gradient too: less time than another launch.
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

/// The kernels for log-probabilities of a dtype.
struct NllNames {
    loss: &'static str,
    gradient: &'static str,
}

impl NllNames {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => NllNames { loss: "nll_loss_f64", gradient: "nll_gradient_f64" },
            _ => NllNames { loss: "nll_loss_f32", gradient: "nll_gradient_f32" },
        }
    }
}

/// One call: what its launches share.
struct NllCall<'a> {
    problem: &'a Nll,
    device: CudaDevice,
    gpu: Arc<Gpu>,
    dtype: DType,
    rows: Rows,
    params: NllParams,
    target: Input<'a>,
    weight: Option<Input<'a>>,
}

impl<'a> NllCall<'a> {
    fn new(
        problem: &'a Nll,
        (storage, layout): Arg<'a, CudaStorage>,
        target: Arg<'a, CudaStorage>,
        weight: &'a Option<Locked>,
    ) -> Result<Self> {
        let (name, rows) = (problem.name, problem.rows(layout)?);
        let base = RowParams::new(name, &rows, &problem.options, target.0.dtype())?;
        let weight = weight.as_ref().map(|weight| weight.arg::<CudaStorage>(name)).transpose()?;
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
            target: Input::new(target.0, target.1)?,
            weight: weight.map(|(storage, layout)| Input::new(storage, layout)).transpose()?,
        })
    }

    fn elements(&self) -> usize {
        self.rows.count() * self.rows.classes
    }

    fn per_row(&self) -> bool {
        self.problem.options.reduction == Reduction::None
    }

    fn wrap(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    /// The loss, what its sum was divided by, and with `both` the gradient. One launch.
    fn forward(&self, x: &Input, both: bool) -> Result<(CudaStorage, Option<CudaStorage>, Option<CudaStorage>)> {
        let rows = self.rows.count();
        let blocks = match rows {
            ..=ROWS_OF_ONE_BLOCK => 1,
            _ => rows.div_ceil(THREADS as usize).min(MOST_BLOCKS),
        };
        let acc = arithmetic(self.dtype);
        // SAFETY: the launch writes all of them, the partial sums before its last block reads them
        let (mut loss, mut denominator, mut grad, mut sums) = unsafe {
            let denominator = (!both).then(|| alloc(&self.device, acc, 1)).transpose()?;
            let grad = both.then(|| alloc(&self.device, self.dtype, self.elements())).transpose()?;
            let sums =
                (!self.per_row() && blocks > 1).then(|| partials::<f64>(&self.device, 2 * blocks)).transpose()?;
            (alloc(&self.device, acc, if self.per_row() { rows } else { 1 })?, denominator, grad, sums)
        };
        let stream = self.device.cuda_stream();
        let ticket = if sums.is_some() { self.gpu.ticket(&stream)? } else { 0 };
        let mut result = Some(output(&mut loss)?);
        let mut each = if self.per_row() { result.take() } else { None };
        let mut to_denominator = denominator.as_mut().map(output).transpose()?;
        let mut to_grad = grad.as_mut().map(output).transpose()?;
        let mut launch = Launch::new(&self.gpu, &stream, &NLL, NllNames::of(self.dtype).loss)?;
        launch.value(&self.params).read(&x.bytes).read(&self.target.bytes);
        launch.read_if(self.weight.as_ref().map(|weight| &weight.bytes)).write_if(each.as_mut());
        launch.write_if(sums.as_mut()).address(ticket).write_if(result.as_mut()).write_if(to_denominator.as_mut());
        launch.write_if(to_grad.as_mut());
        // SAFETY: the parameters of nll_loss_*; the rows are inside of their tensors, and the gradient has all of them
        unsafe { launch.run(Grid::flat(blocks as u32, THREADS))? };
        let wrap = |slice: Option<CudaStorageSlice>| slice.map(|slice| self.wrap(slice));
        Ok((self.wrap(loss), wrap(denominator), wrap(grad)))
    }

    /// The gradient for an upstream gradient of each row, of all rows, or of ones. One launch.
    fn gradient(&self, denominator: &Input, upstream: Option<(&Input, bool)>) -> Result<CudaStorage> {
        // SAFETY: the launch writes all of it
        let mut grad = unsafe { alloc(&self.device, self.dtype, self.elements())? };
        let params = NllParams { upstream_rows: upstream.is_some_and(|(_, each)| each) as i32, ..self.params };
        let windows = self.elements().div_ceil(WINDOW / self.dtype.size_in_bytes());
        let blocks = windows.div_ceil(THREADS as usize).min(MOST_BLOCKS);
        let stream = self.device.cuda_stream();
        let mut to_grad = output(&mut grad)?;
        let mut launch = Launch::new(&self.gpu, &stream, &NLL, NllNames::of(self.dtype).gradient)?;
        launch.value(&params).read(&self.target.bytes);
        launch.read_if(self.weight.as_ref().map(|weight| &weight.bytes)).read(&denominator.bytes);
        launch.read_if(upstream.map(|(upstream, _)| &upstream.bytes)).write(&mut to_grad);
        // SAFETY: the parameters of nll_gradient_*, whose output has all rows
        unsafe { launch.run(Grid::flat(blocks as u32, THREADS))? };
        Ok(self.wrap(grad))
    }

    /// Loss, denominator and gradient of no rows, for which nothing is launched.
    fn nothing(&self) -> Result<[CudaStorage; 3]> {
        let constant = |value: f64, dtype: DType, len: usize| -> Result<CudaStorage> {
            let tensor = Tensor::full(value, len, &candle_core::Device::Cuda(self.device.clone()))?.to_dtype(dtype)?;
            Locked::new(&tensor).arg::<CudaStorage>(self.problem.name)?.0.try_clone(tensor.layout())
        };
        let acc = arithmetic(self.dtype);
        let loss = match self.problem.options.reduction {
            Reduction::Mean if self.problem.options.normalizer.is_none() => f64::NAN,
            _ => 0.0,
        };
        Ok([constant(loss, acc, 1)?, constant(1.0, acc, 1)?, constant(0.0, self.dtype, 1)?])
    }
}

impl NllKernels for CudaStorage {
    fn forward(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.weight.as_ref().map(Locked::new);
        let call = NllCall::new(problem, log_probs, target, &weight)?;
        check_indices(problem.name, &problem.options, target, &call.rows)?;
        if call.elements() == 0 {
            let [loss, denominator, _] = call.nothing()?;
            return Ok((loss, denominator));
        }
        match call.forward(&Input::new(log_probs.0, log_probs.1)?, false)? {
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
        let weight = problem.options.weight.as_ref().map(Locked::new);
        let call = NllCall::new(problem, log_probs, target, &weight)?;
        if call.elements() == 0 {
            let [.., grad] = call.nothing()?;
            return Ok(grad);
        }
        let denominator = Locked::new(denominator);
        let denominator = denominator.arg::<Self>(problem.name)?;
        let each = upstream.1.shape().elem_count() != 1;
        let upstream = Input::new(upstream.0, upstream.1)?;
        call.gradient(&Input::new(denominator.0, denominator.1)?, Some((&upstream, each)))
    }

    fn loss_and_grad(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.weight.as_ref().map(Locked::new);
        let call = NllCall::new(problem, log_probs, target, &weight)?;
        check_indices(problem.name, &problem.options, target, &call.rows)?;
        if call.elements() == 0 {
            let [loss, _, grad] = call.nothing()?;
            return Ok((loss, grad));
        }
        let x = Input::new(log_probs.0, log_probs.1)?;
        let few = call.rows.count() <= ROWS_OF_ONE_BLOCK && call.elements() <= ELEMENTS_OF_ONE_BLOCK;
        match call.forward(&x, few)? {
            (loss, _, Some(grad)) => Ok((loss, grad)),
            (loss, Some(denominator), None) => {
                let denominator = Input::new(&denominator, &Layout::contiguous(()))?;
                Ok((loss, call.gradient(&denominator, None)?))
            }
            (_, None, None) => bail!("{}: neither a gradient nor a denominator", problem.name),
        }
    }
}

#[cfg(test)]
mod tests;
