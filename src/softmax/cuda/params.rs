//! The parameters of the softmax family's kernels. The order in which a kernel takes them is written here, in the
//! `launch` method of its struct, and in `kernels/softmax/entry.cuh`.

use super::detail::KernelRef;
use super::plan::{Form, RowPass};
use crate::cuda::gpu::Gpu;
use crate::cuda::grid::Grid;
use crate::cuda::kernels;
use crate::cuda::launch::Launch;
use crate::rows::cuda::{LossOutput, RowParams, Strides, TargetViews};
use crate::rows::layout::Rows;
use crate::softmax::problem::STATISTICS;
use candle_core::{DType, Result};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use std::f64::consts::LOG2_E;
use std::sync::Arc;

type BytesView<'a> = &'a CudaView<'a, u8>;
type OutputView<'a> = CudaViewMut<'a, u8>;

/// `softmax::Params` of `kernels/softmax/state.cuh`, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct SoftmaxParams {
    pub base: RowParams,
    pub x: Strides,
    pub t: Strides,
    pub spread: f64,
    pub mass: f64,
    pub scale: f64,
    pub factor: f64,
    pub softcap: f64,
    pub cap_scale: f64,
    pub z_loss: f64,
    pub transform_parameter: f64,
    pub row_transform: i32,
    pub row_mass: i32,
    pub capped: i32,
    pub team: i32,
    pub kept: i32,
    pub upstream_rows: i32,
    pub rotated: i32,
    pub wave: i32,
    pub ahead: i32,
    pub class_last: i32,
    pub softcap_f32: f32,
    pub cap_scale_f32: f32,
    pub factor_exponent: f32,
    pub cap_rate: f32,
    pub cap_exponent: f32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for SoftmaxParams {}

impl SoftmaxParams {
    /// Of a pass over rows without options.
    pub fn of_rows(base: RowParams, rows: &Rows) -> Self {
        SoftmaxParams {
            base,
            x: Strides::of(rows),
            t: Strides::default(),
            spread: 0.0,
            mass: 0.0,
            scale: 1.0,
            factor: 1.0,
            softcap: 0.0,
            cap_scale: 0.0,
            z_loss: 0.0,
            transform_parameter: 0.0,
            row_transform: 0,
            row_mass: 0,
            capped: 0,
            team: 1,
            kept: 0,
            upstream_rows: 0,
            rotated: 0,
            wave: 0,
            ahead: 0,
            class_last: rows.class_last() as i32,
            softcap_f32: 0.0,
            cap_scale_f32: 0.0,
            factor_exponent: LOG2_E as f32,
            cap_rate: 0.0,
            cap_exponent: 0.0,
        }
    }

    /// The same with a scale, split as by `SoftmaxOptions::split_scale`.
    pub fn with_scale(self, (scale, factor): (f64, f64)) -> Self {
        SoftmaxParams { scale, factor, factor_exponent: (LOG2_E * factor) as f32, ..self }
    }

    /// The same with a soft cap of scaled logits.
    pub fn with_softcap(self, softcap: f64) -> Self {
        let cap_scale = self.scale / softcap;
        SoftmaxParams {
            softcap,
            cap_scale,
            capped: 1,
            softcap_f32: softcap as f32,
            cap_scale_f32: cap_scale as f32,
            cap_rate: (2.0 * LOG2_E * cap_scale) as f32,
            cap_exponent: (LOG2_E * softcap) as f32,
            ..self
        }
    }

    /// The same for one of the passes.
    pub fn for_pass(self, pass: &RowPass) -> Self {
        let mut x = self.x;
        if let Form::Registers(_) = pass.form {
            // all rows are at one distance, that of the innermost axis where there is one
            x.outer_stride = if x.inner > 1 { x.inner_stride } else { x.outer_stride };
            x.inner = 1;
        }
        let [team, kept, rotated, wave, ahead] =
            [pass.team, pass.kept, pass.rotated, pass.wave, pass.ahead].map(|n| n as i32);
        SoftmaxParams { x, team, kept, rotated, wave, ahead, ..self }
    }
}

/// Where the arrays of a forward begin in its workspace, in bytes.
#[derive(Clone, Copy)]
pub(super) struct ForwardArrays {
    /// At the start, so that the backward finds them on 16 bytes of their own storage.
    pub statistics: u64,
    pub denominator: u64,
    /// The state of each part of rows that are split over blocks.
    pub states: u64,
}

/// The results of a forward.
pub(super) struct ForwardOutput<'a> {
    pub loss: LossOutput<'a>,
    pub workspace: OutputView<'a>,
    pub arrays: ForwardArrays,
}

/// Where `softmax_reduce_*` leaves the rows.
pub(super) enum ReduceOutput<'a> {
    /// Whole rows: their results.
    Whole(ForwardOutput<'a>),
    /// Rows that are split over blocks: the state of each part, for `softmax_merge_*`.
    Parts(OutputView<'a>),
}

/// A launch of `softmax_reduce_*`.
pub(super) struct ReduceLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub targets: TargetViews<'a>,
    pub output: ReduceOutput<'a>,
}

impl ReduceLaunch<'_> {
    /// # Safety
    /// `kernel` is one of `softmax_reduce_*` for the logits' dtype, the rows that the parameters describe are inside of
    /// the tensors, the outputs have room for their numbers, and `grid` is the one planned for the parameters.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        // softmax_reduce_*(p, x, targets, splits, loss, statistics, partials, ticket, result, denominator)
        launch.value(&self.params).read(self.x);
        self.targets.push(&mut launch);
        match &mut self.output {
            ReduceOutput::Parts(states) => {
                launch.write(states).null().null().null().null().null().null();
            }
            ReduceOutput::Whole(ForwardOutput { loss, workspace, arrays }) => {
                let workspace = launch.place(workspace);
                let loss = loss.pointers(workspace);
                launch.null().write_if(loss.rows).address(workspace + arrays.statistics);
                launch.address(loss.sums).address(loss.ticket).write_if(loss.result);
                launch.address(workspace + arrays.denominator);
            }
        }
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `softmax_merge_*`, which one block makes.
pub(super) struct MergeLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub targets: TargetViews<'a>,
    /// How many parts a row has. Their states, which `softmax_reduce_*` left, are in the workspace.
    pub parts: u32,
    pub output: ForwardOutput<'a>,
}

impl MergeLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_merge_*`; there are states for all parts of all rows.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let count = self.parts as i32;
        let ForwardOutput { loss, workspace, arrays } = &mut self.output;
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        let workspace = launch.place(workspace);
        let loss = loss.pointers(workspace);
        // softmax_merge_*(p, x, targets, splits, count, loss, statistics, result, denominator)
        launch.value(&self.params).read(self.x);
        self.targets.push(&mut launch);
        launch.address(workspace + arrays.states).value(&count);
        launch.write_if(loss.rows).address(workspace + arrays.statistics).write_if(loss.result);
        launch.address(workspace + arrays.denominator);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// The operands that a backward reads beside the logits and the targets.
#[derive(Clone, Copy)]
pub(super) struct GradientInputs<'a> {
    pub statistics: BytesView<'a>,
    pub denominator: BytesView<'a>,
    /// `None`: the grad scale.
    pub upstream: Option<BytesView<'a>>,
}

/// A launch of `softmax_emit_*`.
pub(super) struct EmitLaunch<'a> {
    pub params: SoftmaxParams,
    /// `None`: the logits are in `grad`, and the gradient replaces them.
    pub x: Option<BytesView<'a>>,
    pub targets: TargetViews<'a>,
    pub inputs: GradientInputs<'a>,
    pub grad: OutputView<'a>,
}

impl EmitLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_emit_*`; the statistics are those that a forward left of the same
    /// rows, and the upstream gradient has one number, or one for each row if the parameters say so.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let GradientInputs { statistics, denominator, upstream } = self.inputs;
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        // softmax_emit_*(p, x, targets, statistics, denominator, upstream, out)
        launch.value(&self.params).read_if(self.x);
        self.targets.push(&mut launch);
        launch.read(statistics).read(denominator).read_if(upstream).write(&mut self.grad);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `softmax_fused_*`.
pub(super) struct FusedLaunch<'a> {
    pub params: SoftmaxParams,
    /// `None`: the logits are in `grad`, and the gradient replaces them.
    pub x: Option<BytesView<'a>>,
    pub grad: OutputView<'a>,
    pub targets: TargetViews<'a>,
    /// Where it is needed.
    pub workspace: Option<OutputView<'a>>,
    /// Counts of the rows, where an earlier launch left them in the workspace.
    pub counts: Option<u64>,
    pub loss: LossOutput<'a>,
}

impl FusedLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_fused_*`; there are as many counts as the parameters say.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        let workspace = self.workspace.as_mut().map_or(0, |workspace| launch.place(workspace));
        let loss = self.loss.pointers(workspace);
        // softmax_fused_*(p, x, out, targets, counts, loss, partials, ticket, result)
        launch.value(&self.params).read_if(self.x).write(&mut self.grad);
        self.targets.push(&mut launch);
        launch.address(self.counts.map_or(0, |counts| workspace + counts));
        launch.write_if(loss.rows).address(loss.sums).address(loss.ticket).write_if(loss.result);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `softmax_target_gradient`.
pub(super) struct TargetGradientLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub targets: TargetViews<'a>,
    pub statistics: BytesView<'a>,
    pub denominator: BytesView<'a>,
    pub upstream: BytesView<'a>,
    pub grad: OutputView<'a>,
}

impl TargetGradientLaunch<'_> {
    /// # Safety
    /// As for [`EmitLaunch::launch`] with `softmax_target_gradient`.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        // softmax_target_gradient(p, x, targets, statistics, denominator, upstream, out)
        launch.value(&self.params).read(self.x);
        self.targets.push(&mut launch);
        launch.read(self.statistics).read(self.denominator).read(self.upstream).write(&mut self.grad);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `softmax_statistics_*`.
pub(super) struct StatisticsLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub targets: TargetViews<'a>,
    pub output: ForwardOutput<'a>,
    /// In the order of [`RowStatistics`](crate::softmax::problem::RowStatistics).
    pub numbers: [OutputView<'a>; STATISTICS],
}

impl StatisticsLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_statistics_*`.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let ForwardOutput { loss, workspace, arrays } = &mut self.output;
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        let workspace = launch.place(workspace);
        let loss = loss.pointers(workspace);
        // softmax_statistics_*(p, x, targets, loss, statistics, partials, ticket, result, denominator, numbers)
        launch.value(&self.params).read(self.x);
        self.targets.push(&mut launch);
        launch.write_if(loss.rows).address(workspace + arrays.statistics).address(loss.sums).address(loss.ticket);
        launch.write_if(loss.result).address(workspace + arrays.denominator).write_all(&mut self.numbers);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of a forward of log-softmax: one of `softmax_log_softmax_*`, except `softmax_log_softmax_backward_*`.
pub(super) struct LogSoftmaxLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub log_probs: OutputView<'a>,
    /// What the backward needs, where there can be one.
    pub statistics: Option<OutputView<'a>>,
}

impl LogSoftmaxLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_log_softmax_*`, except `softmax_log_softmax_backward_*`.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        // softmax_log_softmax_*(p, x, out, statistics)
        launch.value(&self.params).read(self.x).write(&mut self.log_probs).write_if(self.statistics.as_mut());
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `softmax_log_softmax_backward_*`.
pub(super) struct LogSoftmaxBackwardLaunch<'a> {
    pub params: SoftmaxParams,
    pub x: BytesView<'a>,
    pub statistics: BytesView<'a>,
    pub upstream: BytesView<'a>,
    pub grad: OutputView<'a>,
}

impl LogSoftmaxBackwardLaunch<'_> {
    /// # Safety
    /// As for [`ReduceLaunch::launch`] with `softmax_log_softmax_backward_*`.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, kernel: KernelRef, grid: Grid) -> Result<()> {
        let mut launch = Launch::new(gpu, stream, kernel.module, kernel.name)?;
        // softmax_log_softmax_backward_*(p, x, statistics, g, out)
        launch.value(&self.params).read(self.x).read(self.statistics).read(self.upstream).write(&mut self.grad);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// A launch of `count_rows_*` of `kernels/modules/rows.cu`.
pub(super) struct CountRowsLaunch<'a> {
    pub params: RowParams,
    pub targets: TargetViews<'a>,
    /// A number for each block.
    pub counts: OutputView<'a>,
    pub blocks: u32,
}

impl CountRowsLaunch<'_> {
    /// For class weights of the arithmetic dtype.
    ///
    /// # Safety
    /// The targets and weights are inside of their tensors, and there is a count for each block.
    pub unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>, arithmetic: DType) -> Result<()> {
        let name = if arithmetic == DType::F64 { "count_rows_f64" } else { "count_rows_f32" };
        let grid = Grid::flat(self.blocks, 1024);
        let mut launch = Launch::new(gpu, stream, &kernels::ROWS, name)?;
        // count_rows_*(p, targets, counts)
        launch.value(&self.params);
        self.targets.push(&mut launch);
        launch.write(&mut self.counts);
        // SAFETY: the parameters in the order of the kernel's signature; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}
