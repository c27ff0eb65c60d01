//! The entry points of the softmax family on CUDA: the passes that an op asks for.

use super::call::{SoftmaxCall, with_room};
use super::detail::{Detail, SoftmaxPass};
use super::params::{GradientInputs, LogSoftmaxBackwardLaunch, LogSoftmaxLaunch, SoftmaxParams};
use super::plan::RowsShape;
use crate::check::{self, arithmetic};
use crate::cuda::gpu::Gpu;
use crate::cuda::launch::{InputView, alloc, output, upstream_view};
use crate::custom_op::{Arg, Argument, Locked};
use crate::rows::cuda::{RowParams, Strides};
use crate::rows::layout::Rows;
use crate::softmax::problem::{CrossEntropy, STATISTICS, Saved, SoftmaxKernels, target_gradient_dtype};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Layout, Result, Tensor, bail};
use std::ops::Range;

/// A layout that begins where the rows do.
fn from(rows: &Rows) -> Layout {
    Layout::contiguous_with_offset((), rows.offset)
}

/// The memory of logits that a gradient may replace: contiguous ones, or rows of adjacent classes with gaps between
/// them, which are left as they are.
fn replaceable(layout: &Layout, rows: &Rows) -> Option<Range<usize>> {
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Some(start..end);
    }
    let apart = rows.inner == 1 && rows.class_stride == 1 && rows.outer_stride >= rows.classes;
    (apart && rows.outer > 0).then(|| rows.offset..rows.start(rows.outer - 1) + rows.classes)
}

impl SoftmaxKernels for CudaStorage {
    fn forward(problem: &CrossEntropy, (storage, layout): Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)> {
        let locked = problem.options.rows.lock(&problem.form);
        let call = SoftmaxCall::new(problem, (&storage.device, storage.dtype(), layout), target, &locked)?;
        call.check_target(target)?;
        let reduced = call.reduce(&InputView::new(storage, layout)?)?;
        let loss = call.wrap(reduced.loss);
        Ok((loss, call.saved(reduced.workspace)))
    }

    fn backward(
        problem: &CrossEntropy,
        saved: &Saved,
        of: Argument,
        (storage, layout): Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        let locked = problem.options.rows.lock(&problem.form);
        // the forward has checked the target
        let call = SoftmaxCall::new(problem, (&storage.device, storage.dtype(), layout), target, &locked)?;
        let len = layout.shape().elem_count();
        let dtype = match of {
            Argument::Input => call.dtype,
            Argument::Target => target_gradient_dtype(call.dtype, target.0.dtype()),
        };
        // SAFETY: the launch below writes all of it
        let mut grad = unsafe { alloc(&call.device, dtype, len.max(1))? };
        if len == 0 {
            return Ok(call.wrap(grad));
        }
        let x = InputView::new(storage, layout)?;
        let (upstream, upstream_rows) = upstream_view(problem.name, (call.rows.count(), call.arithmetic()), upstream)?;
        let saved = Locked::new(&saved.0);
        let [statistics, denominator] = call.saved_views(saved.arg::<Self>(problem.name)?)?;
        let inputs = GradientInputs {
            statistics: &statistics.bytes,
            denominator: &denominator.bytes,
            upstream: Some(&upstream.bytes),
        };
        match of {
            Argument::Input => call.emit(Some(&x), inputs, upstream_rows, output(&mut grad)?)?,
            Argument::Target => call.target_gradient(&x, inputs, (&upstream, upstream_rows), output(&mut grad)?)?,
        }
        Ok(call.wrap(grad))
    }

    fn loss_and_grad(problem: &CrossEntropy, (storage, layout): Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let locked = problem.options.rows.lock(&problem.form);
        let call = SoftmaxCall::new(problem, (&storage.device, storage.dtype(), layout), target, &locked)?;
        call.check_target(target)?;
        let len = layout.shape().elem_count();
        // SAFETY: the launches below write all of it
        let mut grad = unsafe { alloc(&call.device, call.dtype, len.max(1))? };
        if len == 0 {
            return Ok((call.wrap(call.reduced_nothing()?.loss), call.wrap(grad)));
        }
        let loss = call.loss_and_grad(Some(&InputView::new(storage, layout)?), output(&mut grad)?)?;
        Ok((loss, call.wrap(grad)))
    }

    fn loss_and_grad_inplace(
        problem: &CrossEntropy,
        logits: &mut Self,
        layout: &Layout,
        target: Arg<Self>,
    ) -> Result<Self> {
        let locked = problem.options.rows.lock(&problem.form);
        let dtype = logits.dtype();
        let call = SoftmaxCall::new(problem, (&logits.device, dtype, layout), target, &locked)?;
        call.check_target(target)?;
        if layout.shape().elem_count() == 0 {
            return Ok(call.wrap(call.reduced_nothing()?.loss));
        }
        let Some(Range { start, end }) = replaceable(layout, &call.rows) else {
            return Err(check::not_contiguous(problem.name, layout));
        };
        let size = dtype.size_in_bytes();
        call.loss_and_grad(None, output(&mut logits.slice)?.slice_mut(start * size..end * size))
    }

    fn forward_with_statistics(
        problem: &CrossEntropy,
        (storage, layout): Arg<Self>,
        target: Arg<Self>,
    ) -> Result<(Self, Saved, [Self; STATISTICS])> {
        let locked = problem.options.rows.lock(&problem.form);
        let call = SoftmaxCall::new(problem, (&storage.device, storage.dtype(), layout), target, &locked)?;
        call.check_target(target)?;
        let (reduced, numbers) = call.reduce_with_statistics(&InputView::new(storage, layout)?)?;
        let loss = call.wrap(reduced.loss);
        let saved = call.saved(reduced.workspace);
        Ok((loss, saved, numbers.map(|numbers| call.wrap(numbers))))
    }

    fn log_softmax(name: &str, logits: &Self, rows: &Rows, save: bool) -> Result<(Self, Option<Self>)> {
        let (device, dtype) = (&logits.device, logits.dtype());
        let len = rows.count() * rows.classes;
        // SAFETY: the launch below writes all of it
        let mut log_probs = unsafe { alloc(device, dtype, len.max(1))? };
        // SAFETY: as above
        let numbers = || unsafe { alloc(device, arithmetic(dtype), (2 * rows.count()).max(1)) };
        let mut statistics = save.then(numbers).transpose()?;
        if len > 0 {
            let gpu = Gpu::of(device)?;
            let shape = Detail::Plain.shape(rows, dtype);
            let kernel = |form| Detail::Plain.kernel(dtype, SoftmaxPass::LogSoftmax, form);
            let pass = with_room(gpu, |planner| planner.one_pass(&shape), kernel)?;
            let launch = LogSoftmaxLaunch {
                params: SoftmaxParams::of_rows(RowParams::untargeted(name, rows)?, rows).for_pass(&pass),
                x: &InputView::new(logits, &from(rows))?.bytes,
                log_probs: output(&mut log_probs)?,
                statistics: statistics.as_mut().map(output).transpose()?,
            };
            // SAFETY: the kernel and the grid are the pass's; the rows are those of the tensor, whose elements all have
            // room, as has what is saved of each row
            unsafe { launch.launch(gpu, &device.cuda_stream(), kernel(pass.form)?, pass.grid)? };
        }
        let wrap = |slice| CudaStorage { slice, device: device.clone() };
        Ok((wrap(log_probs), statistics.map(wrap)))
    }

    fn log_softmax_backward(
        name: &str,
        (logits, rows): (&Self, &Rows),
        statistics: &Tensor,
        (upstream, upstream_rows): (&Self, &Rows),
    ) -> Result<Self> {
        let (device, dtype) = (&logits.device, logits.dtype());
        if upstream.dtype() != dtype {
            bail!("{name}: an upstream gradient of dtype {:?}, expected {dtype:?}", upstream.dtype());
        }
        if (upstream_rows.count(), upstream_rows.classes) != (rows.count(), rows.classes) {
            bail!("{name}: an upstream gradient of other rows than the log-probabilities'");
        }
        let statistics = Locked::new(statistics);
        let (saved, layout) = statistics.arg::<Self>(name)?;
        if layout.shape().elem_count() != 2 * rows.count() || saved.dtype() != arithmetic(dtype) {
            bail!("{name}: statistics of other rows than the logits'");
        }
        let len = rows.count() * rows.classes;
        // SAFETY: the launch below writes all of it
        let mut grad = unsafe { alloc(device, dtype, len.max(1))? };
        if len > 0 {
            let gpu = Gpu::of(device)?;
            // where classes of some tensor lie apart, two of the three lie as the gradient is written
            let adjacent = rows.class_stride == 1 && upstream_rows.class_stride == 1;
            let shape = RowsShape { adjacent: rows.class_last(), ..Detail::Plain.shape(rows, dtype) };
            let kernel = |form| Detail::Plain.kernel(dtype, SoftmaxPass::LogSoftmaxBackward, form);
            let pass = with_room(gpu, |planner| planner.log_softmax_backward(&shape, adjacent), kernel)?;
            let params = SoftmaxParams::of_rows(RowParams::untargeted(name, rows)?, rows).for_pass(&pass);
            let launch = LogSoftmaxBackwardLaunch {
                params: SoftmaxParams { t: Strides::of(upstream_rows), ..params },
                x: &InputView::new(logits, &from(rows))?.bytes,
                statistics: &InputView::new(saved, layout)?.bytes,
                upstream: &InputView::new(upstream, &from(upstream_rows))?.bytes,
                grad: output(&mut grad)?,
            };
            // SAFETY: the grid is the pass's; the rows are those of the tensors, as many in both, whose elements all
            // have room
            unsafe { launch.launch(gpu, &device.cuda_stream(), kernel(pass.form)?, pass.grid)? };
        }
        Ok(CudaStorage { slice: grad, device: device.clone() })
    }
}
