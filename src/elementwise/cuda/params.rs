//! The parameters of the kernels of `kernels/elementwise/elements.cuh`: the one place that knows their order.

use super::divisor::Divisor;
use super::plan::{MAX_AXES, OPERANDS, OperandAxes, Spans};
use crate::cuda::grid::Grid;
use crate::cuda::launch::{InputView, Launch};
use crate::elementwise::problem::TERM_PARAMETERS;
use candle_core::Result;
use cudarc::driver::{CudaSlice, CudaViewMut, DeviceRepr};

/// Sizes and options of a launch: `ElementParams` of the kernels, field for field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ElementParams {
    pub elements: i64,
    pub span: i64,
    pub smooth_scale: f64,
    pub smooth_shift: f64,
    pub grad_scale: f64,
    pub parameters: [f64; TERM_PARAMETERS],
    pub normalizer: f64,
    /// Of the kernels that all terms share.
    pub term: i32,
    pub counted: i32,
    pub target_dtype: i32,
    pub mask_dtype: i32,
    pub unit_target: i32,
    pub small: i32,
    pub phase: i32,
    pub upstream_each: i32,
    pub contiguous: i32,
    pub axes: i32,
    pub group: Divisor,
    pub size: [Divisor; MAX_AXES],
    pub stride: [[i64; MAX_AXES]; OPERANDS],
}

// SAFETY: a C struct of numbers, the same as the kernels' `ElementParams`
unsafe impl DeviceRepr for ElementParams {}

impl ElementParams {
    /// With the axes along which the operands are walked.
    pub fn walking(self, axes: &OperandAxes) -> Self {
        ElementParams {
            contiguous: axes.contiguous,
            axes: axes.axes as i32,
            size: axes.size.map(Divisor::new),
            stride: axes.stride,
            ..self
        }
    }
}

/// The operands' memory: `ELEMENT_OPERANDS`, the first parameters of every kernel but count_mask.
pub(super) struct OperandInputs<'a> {
    pub input: InputView<'a>,
    pub target: InputView<'a>,
    pub weight: Option<InputView<'a>>,
    pub pos_weight: Option<InputView<'a>>,
    pub mask: Option<InputView<'a>>,
}

impl OperandInputs<'_> {
    fn push<'l>(&'l self, launch: &mut Launch<'l>) {
        launch.read(&self.input.bytes).read(&self.target.bytes);
        for optional in [&self.weight, &self.pos_weight, &self.mask] {
            launch.read_if(optional.as_ref().map(|input| &input.bytes));
        }
    }
}

/// Where the losses go.
pub(super) enum ElementLossOutput<'a> {
    /// Every element's loss.
    Each(CudaViewMut<'a, u8>),
    /// The mean of every row.
    Rows(CudaViewMut<'a, u8>),
    /// All losses, reduced.
    Reduced {
        to: CudaViewMut<'a, u8>,
        /// Where several spans meet.
        spans: Option<SpanSums>,
    },
}

/// Where the spans of a sum meet.
#[derive(Clone, Copy)]
pub(super) struct SpanSums {
    /// Where in the workspace the sums begin, one for each span and, where elements are counted, one count for each.
    pub sums: u64,
    /// The address of the launch's counter, see [`crate::cuda::gpu::Gpu::ticket`].
    pub ticket: u64,
}

/// The partial counts of the elements that the mask leaves.
#[derive(Clone, Copy)]
pub(super) struct MaskCounts {
    /// Where in the workspace they begin.
    pub counts: u64,
    pub spans: Spans,
}

/// Parameters of loss_any, loss_*_dense and fused_*_dense.
pub(super) struct LossLaunch<'a> {
    pub operands: &'a OperandInputs<'a>,
    /// Where it is needed. Without a gradient, the denominator is at its start.
    pub workspace: Option<CudaViewMut<'a, u8>>,
    pub counts: Option<MaskCounts>,
    /// A double that the sum of the losses is divided by.
    pub normalizer: Option<&'a InputView<'a>>,
    pub loss: ElementLossOutput<'a>,
    pub grad: Option<CudaViewMut<'a, u8>>,
    pub params: &'a ElementParams,
}

impl LossLaunch<'_> {
    /// # Safety
    /// `launch` is of one of these kernels; operands and outputs hold the elements that `params` says; the grid has a
    /// team for each span.
    pub unsafe fn launch(mut self, launch: Launch, grid: Grid) -> Result<()> {
        let mut launch = launch;
        let workspace = self.workspace.as_mut().map_or(0, |workspace| launch.place(workspace));
        let (counts, count_parts) = self.counts.map_or((0, 0), |at| (workspace + at.counts, at.spans.count as i32));
        let denominator = if self.grad.is_none() { workspace } else { 0 };
        let (mut each, mut rows, mut reduced, mut sums, mut ticket) = (None, None, None, 0, 0);
        match &mut self.loss {
            ElementLossOutput::Each(to) => each = Some(to),
            ElementLossOutput::Rows(to) => rows = Some(to),
            ElementLossOutput::Reduced { to, spans } => {
                reduced = Some(to);
                if let Some(spans) = spans {
                    ticket = spans.ticket;
                    sums = workspace + spans.sums;
                }
            }
        }
        // ELEMENT_OPERANDS, ELEMENT_LOSSES, grad, ELEMENT_PARAMS
        self.operands.push(&mut launch);
        launch.address(counts).value(&count_parts).write_if(each).write_if(rows);
        launch.address(sums).address(ticket).read_if(self.normalizer.map(|normalizer| &normalizer.bytes));
        launch.write_if(reduced).address(denominator);
        launch.write_if(self.grad.as_mut()).value(self.params);
        // SAFETY: the kernel's parameters in its order; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// Parameters of grad_any, target_grad_any and grad_*_dense.
pub(super) struct GradLaunch<'a> {
    pub operands: &'a OperandInputs<'a>,
    /// One value, or one for each group.
    pub upstream: &'a InputView<'a>,
    pub denominator: &'a InputView<'a>,
    pub grad: CudaViewMut<'a, u8>,
    pub params: &'a ElementParams,
}

impl GradLaunch<'_> {
    /// # Safety
    /// As for [`LossLaunch::launch`].
    pub unsafe fn launch(mut self, launch: Launch, grid: Grid) -> Result<()> {
        let mut launch = launch;
        // ELEMENT_OPERANDS, upstream, denominator, grad, ELEMENT_PARAMS
        self.operands.push(&mut launch);
        launch.read(&self.upstream.bytes).read(&self.denominator.bytes).write(&mut self.grad).value(self.params);
        // SAFETY: the kernel's parameters in its order; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// Parameters of check_any.
pub(super) struct CheckLaunch<'a> {
    pub operands: &'a OperandInputs<'a>,
    /// The lowest index of an element that is out of range, if it is below the number that is there.
    pub bad: &'a mut CudaSlice<u64>,
    pub params: &'a ElementParams,
}

impl CheckLaunch<'_> {
    /// # Safety
    /// As for [`LossLaunch::launch`].
    pub unsafe fn launch(self, launch: Launch, grid: Grid) -> Result<()> {
        let mut launch = launch;
        // ELEMENT_OPERANDS, bad, ELEMENT_PARAMS
        self.operands.push(&mut launch);
        launch.write(self.bad).value(self.params);
        // SAFETY: the kernel's parameters in its order; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}

/// Parameters of `count_mask`, which is in `kernels/modules/mask.cu`.
pub(super) struct CountMaskLaunch<'a> {
    pub mask: &'a InputView<'a>,
    /// One partial count for each block.
    pub counts: CudaViewMut<'a, u8>,
    pub params: &'a ElementParams,
}

impl CountMaskLaunch<'_> {
    /// # Safety
    /// `launch` is of this kernel; the mask holds the elements that `params` says; the grid has a block for each count.
    pub unsafe fn launch(mut self, launch: Launch, grid: Grid) -> Result<()> {
        let mut launch = launch;
        // mask, counts, params
        launch.read(&self.mask.bytes).write(&mut self.counts).value(self.params);
        // SAFETY: the kernel's parameters in its order; the rest by this function's contract
        unsafe { launch.run(grid) }
    }
}
