//! The softmax family's calls: memory and launches of each pass. The kernels are in `kernels/softmax/`, the launch
//! shapes come from [`plan`](super::plan).

use super::detail::{Detail, KernelRef, SoftmaxPass};
use super::params::{
    CountRowsLaunch, EmitLaunch, ForwardArrays, ForwardOutput, FusedLaunch, GradientInputs, MergeLaunch, ReduceLaunch,
    ReduceOutput, SoftmaxParams, StatisticsLaunch, TargetGradientLaunch,
};
use super::plan::{DeviceLimits, Form, FusedPlan, Planner, RowPass, RowsShape, Thresholds};
use crate::check::{arithmetic, is_index};
use crate::cuda::gpu::Gpu;
use crate::cuda::grid::Grid;
use crate::cuda::launch::{InputView, Tag, Workspace, alloc, output};
use crate::custom_op::{Arg, DeviceStorage};
use crate::rows::cuda::{LossOutput, Partials, RowOperands, RowParams, Strides, TargetViews, check_indices};
use crate::rows::layout::Rows;
use crate::rows::options::LockedRowOptions;
use crate::softmax::problem::{CrossEntropy, STATISTICS, Saved, SoftmaxOptions};
use crate::softmax::transform::RowTransform;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{CudaStream, CudaViewMut};
use std::sync::Arc;

/// Static shared memory of the kernels, which counts towards a block's limit.
const STATIC_SHARED: u32 = 2 << 10;
/// The largest cluster of any GPU so far.
const LARGEST_CLUSTER: u32 = 16;
/// Threads of the block that merges split rows, a warp for each.
const MERGE_THREADS: u32 = 256;

pub(super) fn planner(gpu: &Gpu) -> Planner {
    Planner {
        device: DeviceLimits {
            processors: gpu.processors,
            shared_bytes: gpu.shared_bytes.saturating_sub(STATIC_SHARED),
            cluster: if gpu.clusters { LARGEST_CLUSTER } else { 1 },
        },
        thresholds: thresholds(),
    }
}

/// The pass that a plan makes of the largest clusters that the GPU has room for; `kernel` names the kernel of a form.
pub(super) fn with_room(
    gpu: &Gpu,
    plan: impl Fn(&Planner) -> RowPass,
    kernel: impl Fn(Form) -> Result<KernelRef>,
) -> Result<RowPass> {
    let mut planner = planner(gpu);
    loop {
        let pass = plan(&planner);
        let cluster = pass.grid.cluster;
        if cluster == 1 {
            return Ok(pass);
        }
        let KernelRef { module, name } = kernel(pass.form)?;
        if gpu.has_room(gpu.kernel(module, name)?, &pass.grid)? {
            return Ok(pass);
        }
        planner.device.cluster = cluster / 2;
    }
}

#[cfg(not(test))]
fn thresholds() -> Thresholds {
    Thresholds::default()
}

#[cfg(test)]
fn thresholds() -> Thresholds {
    super::tests::THRESHOLDS.get()
}

/// One number in the arithmetic dtype, for results of no rows.
fn constant(device: &CudaDevice, dtype: DType, value: f64) -> Result<CudaStorageSlice> {
    Ok(match dtype {
        DType::F64 => CudaStorageSlice::F64(device.clone_htod(&[value])?),
        _ => CudaStorageSlice::F32(device.clone_htod(&[value as f32])?),
    })
}

/// One call: the values that its launches share.
pub(super) struct SoftmaxCall<'a> {
    problem: &'a CrossEntropy,
    options: &'a SoftmaxOptions,
    pub device: CudaDevice,
    pub gpu: &'static Gpu,
    pub stream: Arc<CudaStream>,
    /// Of the logits.
    pub dtype: DType,
    pub rows: Rows,
    detail: Detail,
    operands: RowOperands<'a>,
    pub params: SoftmaxParams,
}

/// The results of a forward: the loss, which is the caller's, and the arrays that the kernels and the backward read.
pub(super) struct Reduced {
    pub loss: CudaStorageSlice,
    pub workspace: CudaStorageSlice,
    pub arrays: ForwardArrays,
    partials: Option<Partials>,
}

impl<'a> SoftmaxCall<'a> {
    pub fn new(
        problem: &'a CrossEntropy,
        (device, dtype, layout): (&CudaDevice, DType, &Layout),
        target: Arg<'a, CudaStorage>,
        locked: &'a LockedRowOptions,
    ) -> Result<Self> {
        let (name, options) = (problem.name, &problem.options);
        let rows = problem.rows(layout)?;
        let class_indices = is_index(target.0.dtype());
        let base = RowParams::new(name, &rows, (&options.rows, &problem.form), target.0.dtype())?;
        let mut params = SoftmaxParams::of_rows(RowParams { keep: 1.0 - options.label_smoothing, ..base }, &rows);
        params.spread = options.label_smoothing / rows.classes.max(1) as f64;
        // the sum of q is the label smoothing, unless q are probabilities or have class weights in them
        if !class_indices || (options.label_smoothing != 0.0 && options.rows.weight.is_some()) {
            params.row_mass = 1;
        } else {
            params.mass = options.label_smoothing;
        }
        params = params.with_scale(options.split_scale());
        if let Some(cap) = options.softcap {
            params = params.with_softcap(cap);
        }
        params.z_loss = options.z_loss;
        (params.row_transform, params.transform_parameter) =
            options.row_transform.map_or((0, 0.0), RowTransform::of_kernels);
        let operands = RowOperands::new(name, (&rows, layout.shape(), arithmetic(dtype)), target, locked)?;
        if !class_indices {
            params.t = Strides::of(&problem.target_rows(target.1, &rows)?);
        }
        Ok(SoftmaxCall {
            problem,
            options,
            device: device.clone(),
            gpu: Gpu::of(device)?,
            stream: device.cuda_stream(),
            dtype,
            rows,
            detail: Detail::of(options, dtype, class_indices),
            operands,
            params,
        })
    }

    /// Looks for class indices out of range, where the options ask for it.
    pub fn check_target(&self, target: Arg<CudaStorage>) -> Result<()> {
        match is_index(target.0.dtype()) {
            true => check_indices(self.problem.name, &self.options.rows, target, &self.rows),
            false => Ok(()),
        }
    }

    pub fn targets(&self) -> TargetViews<'_> {
        self.operands.views()
    }

    pub fn arithmetic(&self) -> DType {
        arithmetic(self.dtype)
    }

    pub fn shape(&self) -> RowsShape {
        self.detail.shape(&self.rows, self.dtype)
    }

    pub fn planner(&self) -> Planner {
        planner(self.gpu)
    }

    pub fn kernel(&self, pass: SoftmaxPass, detail: Detail, form: Form) -> Result<KernelRef> {
        detail.kernel(self.dtype, pass, form)
    }

    pub fn wrap(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    /// Memory for `len` numbers in the arithmetic dtype.
    ///
    /// # Safety
    /// As for [`alloc`].
    pub unsafe fn numbers(&self, len: usize) -> Result<CudaStorageSlice> {
        // SAFETY: by this function's contract
        unsafe { alloc(&self.device, self.arithmetic(), len.max(1)) }
    }

    /// How many losses the reduction leaves.
    fn losses(&self) -> usize {
        if self.problem.form.is_each() { self.rows.count() } else { 1 }
    }

    /// How many numbers of the rows the backward needs.
    fn numbers_of_rows(&self) -> usize {
        let transformed = (self.params.row_transform != 0) as usize;
        (2 + self.params.row_mass as usize + transformed) * self.rows.count()
    }

    /// The results of no rows, for which nothing is launched.
    pub fn reduced_nothing(&self) -> Result<Reduced> {
        let (loss, denominator) = self.problem.form.of_nothing();
        Ok(Reduced {
            loss: constant(&self.device, self.arithmetic(), loss)?,
            workspace: constant(&self.device, self.arithmetic(), denominator)?,
            arrays: ForwardArrays { statistics: 0, denominator: 0, states: 0 },
            partials: None,
        })
    }

    /// The forward: a loss for each row or a scalar one, the denominator, and the statistics of each row. One launch,
    /// and a second one where rows are split over blocks.
    pub fn reduce(&self, x: &InputView) -> Result<Reduced> {
        let rows = self.rows.count();
        if rows == 0 {
            return self.reduced_nothing();
        }
        let pass = self.planner().reduce(&self.shape());
        // SAFETY: the launches below write all that is read
        let mut reduced = unsafe { self.reduced(&pass)? };
        if pass.splits() == 1 {
            self.launch_reduce(x, &pass, ReduceOutput::Whole(self.output(&mut reduced)?))?;
            return Ok(reduced);
        }
        let mut workspace = output(&mut reduced.workspace)?;
        let states = workspace.slice_mut(reduced.arrays.states as usize..);
        self.launch_reduce(x, &pass, ReduceOutput::Parts(states))?;
        self.launch_merge(x, &pass, self.output(&mut reduced)?)?;
        Ok(reduced)
    }

    /// The forward and the statistics of each row, in the order of
    /// [`RowStatistics`](crate::softmax::problem::RowStatistics). One launch.
    pub fn reduce_with_statistics(&self, x: &InputView) -> Result<(Reduced, [CudaStorageSlice; STATISTICS])> {
        let (rows, arithmetic) = (self.rows.count(), self.arithmetic());
        // SAFETY: the launch below writes all of it
        let numbers = |dtype: DType| unsafe { alloc(&self.device, dtype, rows.max(1)) };
        let mut numbers = [
            numbers(arithmetic)?,
            numbers(arithmetic)?,
            numbers(arithmetic)?,
            numbers(arithmetic)?,
            numbers(DType::U32)?,
            numbers(DType::F32)?,
            numbers(DType::F32)?,
        ];
        if rows == 0 {
            return Ok((self.reduced_nothing()?, numbers));
        }
        let pass = self.planner().statistics(&self.shape());
        let kernel = self.kernel(SoftmaxPass::Statistics, Detail::General, pass.form)?;
        // SAFETY: the launch below writes all that is read
        let mut reduced = unsafe { self.reduced(&pass)? };
        let [loss, lse, z_loss, entropy, argmax, correct, counted] = &mut numbers;
        let launch = StatisticsLaunch {
            params: self.params.for_pass(&pass),
            x: &x.bytes,
            targets: self.targets(),
            output: self.output(&mut reduced)?,
            numbers: [
                output(loss)?,
                output(lse)?,
                output(z_loss)?,
                output(entropy)?,
                output(argmax)?,
                output(correct)?,
                output(counted)?,
            ],
        };
        // SAFETY: the kernel and the grid are the pass's; the rows are those of the logits' layout, `RowOperands` fits
        // them, and the results have a number for each
        unsafe { launch.launch(self.gpu, &self.stream, kernel, pass.grid)? };
        Ok((reduced, numbers))
    }

    /// Room for the results of a forward by that pass: two allocations.
    ///
    /// # Safety
    /// As for [`Workspace::alloc`], and the loss as for [`alloc`].
    unsafe fn reduced(&self, pass: &RowPass) -> Result<Reduced> {
        let (rows, size) = (self.rows.count(), self.arithmetic().size_in_bytes());
        let mut workspace = Workspace::default();
        // as in `Saved`
        let statistics = workspace.add((self.numbers_of_rows() + 1) * size);
        let denominator = statistics + (self.numbers_of_rows() * size) as u64;
        // one block merges split rows
        let (parts, blocks) = if pass.splits() > 1 { (rows * pass.splits() as usize, 1) } else { (0, pass.partials()) };
        let states = workspace.add(4 * parts * size);
        let partials = self.partials(blocks, &mut workspace)?;
        // SAFETY: by this function's contract
        let (loss, memory) =
            unsafe { (self.numbers(self.losses())?, workspace.alloc(&self.device, self.arithmetic())?) };
        let Some(workspace) = memory else { bail!("{}: a workspace without a denominator", self.problem.name) };
        Ok(Reduced { loss, workspace, arrays: ForwardArrays { statistics, denominator, states }, partials })
    }

    /// What a launch over `blocks` blocks needs to make one loss of all.
    fn partials(&self, blocks: u32, workspace: &mut Workspace) -> Result<Option<Partials>> {
        Partials::of(&self.problem.form, blocks, workspace, (self.gpu, &self.stream))
    }

    fn output<'b>(&self, reduced: &'b mut Reduced) -> Result<ForwardOutput<'b>> {
        Ok(ForwardOutput {
            loss: LossOutput::new(&mut reduced.loss, &self.problem.form, reduced.partials)?,
            workspace: output(&mut reduced.workspace)?,
            arrays: reduced.arrays,
        })
    }

    /// What a forward leaves for the backward: the first numbers of its workspace.
    pub fn saved(&self, workspace: CudaStorageSlice) -> Saved {
        Saved(self.wrap(workspace).into_tensor(self.numbers_of_rows() + 1))
    }

    /// The parts of a tensor that [`Self::saved`] made: statistics and denominator.
    pub fn saved_views<'b>(&self, (storage, layout): Arg<'b, CudaStorage>) -> Result<[InputView<'b>; 2]> {
        if layout.shape().elem_count() != self.numbers_of_rows() + 1 || storage.dtype() != self.arithmetic() {
            bail!("{}: statistics of other rows than the logits'", self.problem.name);
        }
        let denominator = layout.start_offset() + self.numbers_of_rows();
        Ok([
            InputView::new(storage, layout)?,
            InputView::new(storage, &Layout::contiguous_with_offset((), denominator))?,
        ])
    }

    fn launch_reduce(&self, x: &InputView, pass: &RowPass, output: ReduceOutput) -> Result<()> {
        let detail = self.detail.unless_served(pass.splits() > 1 || pass.form == Form::Strided);
        let kernel = self.kernel(SoftmaxPass::Reduce, detail, pass.form)?;
        let launch = ReduceLaunch { params: self.params.for_pass(pass), x: &x.bytes, targets: self.targets(), output };
        // SAFETY: the kernel and the grid are the pass's; the rows are those of the logits' layout, `RowOperands`
        // fits them, and `reduce` allocated the output for all of them
        unsafe { launch.launch(self.gpu, &self.stream, kernel, pass.grid) }
    }

    fn launch_merge(&self, x: &InputView, pass: &RowPass, output: ForwardOutput) -> Result<()> {
        let kernel = self.kernel(SoftmaxPass::Merge, self.detail.unless_served(true), Form::Rows)?;
        let launch = MergeLaunch {
            params: self.params.for_pass(pass),
            x: &x.bytes,
            targets: self.targets(),
            parts: pass.splits(),
            output,
        };
        // SAFETY: the reduction left a state for each of the parts; the rows are those of the logits' layout,
        // `RowOperands` fits them, and `reduce` allocated the output for all of them
        unsafe { launch.launch(self.gpu, &self.stream, kernel, Grid::flat(1, MERGE_THREADS)) }
    }

    /// The number (or the weights) of the rows that count, in parts, ahead of a pass that needs it. One launch.
    fn count(&self, blocks: u32, counts: CudaViewMut<u8>) -> Result<()> {
        let launch = CountRowsLaunch { params: self.params.base, targets: self.targets(), counts, blocks };
        // SAFETY: `RowOperands` has an index for each row and a weight for each class, and `loss_and_grad` planned a
        // count for each block
        unsafe { launch.launch(self.gpu, &self.stream, self.arithmetic()) }
    }

    /// Writes the gradient of the logits from the statistics of a forward; in place without `x`. One launch.
    pub fn emit(
        &self,
        x: Option<&InputView>,
        inputs: GradientInputs,
        upstream_rows: bool,
        grad: CudaViewMut<u8>,
    ) -> Result<()> {
        let pass = self.planner().emit(&self.shape());
        let kernel = self.kernel(SoftmaxPass::Emit, self.detail.unless_served(true), pass.form)?;
        let launch = EmitLaunch {
            params: SoftmaxParams { upstream_rows: upstream_rows as i32, ..self.params.for_pass(&pass) },
            x: x.map(|x| &x.bytes),
            targets: self.targets(),
            inputs,
            grad,
        };
        // SAFETY: the kernel and the grid are the pass's; the rows are those of the logits' layout, `RowOperands`
        // fits them, and the gradient has as many elements as the logits
        unsafe { launch.launch(self.gpu, &self.stream, kernel, pass.grid) }
    }

    /// Writes the gradient of probability targets. One launch.
    pub fn target_gradient(
        &self,
        x: &InputView,
        inputs: GradientInputs,
        (upstream, upstream_rows): (&InputView, bool),
        grad: CudaViewMut<u8>,
    ) -> Result<()> {
        let pass = self.planner().target_gradient(&self.shape());
        let kernel = self.kernel(SoftmaxPass::TargetGradient, Detail::General, Form::Strided)?;
        let launch = TargetGradientLaunch {
            params: SoftmaxParams { upstream_rows: upstream_rows as i32, ..self.params.for_pass(&pass) },
            x: &x.bytes,
            targets: self.targets(),
            statistics: inputs.statistics,
            denominator: inputs.denominator,
            upstream: &upstream.bytes,
            grad,
        };
        // SAFETY: the grid is the pass's; the rows are those of the logits' layout, `RowOperands` fits them, and
        // the gradient has as many elements as the logits
        unsafe { launch.launch(self.gpu, &self.stream, kernel, pass.grid) }
    }

    /// The plan for loss and gradient.
    fn plan_fused(&self, in_place: bool) -> Result<FusedPlan> {
        let shape = self.shape();
        let shape = RowsShape { alike: in_place || shape.alike, ..shape };
        let plan = self.planner().fused(&shape);
        let FusedPlan::OnePass(_) = plan else { return Ok(plan) };
        let kernel = |form| self.kernel(SoftmaxPass::Fused, self.detail, form);
        Ok(FusedPlan::OnePass(with_room(self.gpu, |planner| planner.one_pass(&shape), kernel)?))
    }

    /// Loss and gradient. Without `x` the gradient replaces the logits in `grad`. One launch, and one ahead of it where
    /// there are many rows to count; three where rows are split over blocks.
    pub fn loss_and_grad(&self, x: Option<&InputView>, grad: CudaViewMut<u8>) -> Result<CudaStorage> {
        let pass = match self.plan_fused(x.is_none())? {
            FusedPlan::OnePass(pass) => pass,
            FusedPlan::Split { .. } => return self.loss_and_grad_split(x, grad),
        };
        let blocks = match self.params.base.counted {
            0 => 0,
            _ => self.planner().counts(self.params.base.rows as u64, &pass),
        };
        let mut workspace = Workspace::default();
        let counts = (blocks > 0).then(|| workspace.add(blocks as usize * size_of::<f64>()));
        let partials = self.partials(pass.partials(), &mut workspace)?;
        // SAFETY: the launches below write all that is read
        let (mut loss, mut workspace) =
            unsafe { (self.numbers(self.losses())?, workspace.alloc(&self.device, self.arithmetic())?) };
        let mut workspace = workspace.as_mut().map(output).transpose()?;
        if let (Some(at), Some(memory)) = (counts, &mut workspace) {
            self.count(blocks, memory.slice_mut(at as usize..))?;
        }
        let mut params = self.params.for_pass(&pass);
        params.base.counts = blocks as i32;
        let detail = self.detail.unless_served(pass.form == Form::Strided);
        let kernel = self.kernel(SoftmaxPass::Fused, detail, pass.form)?;
        let launch = FusedLaunch {
            params,
            x: x.map(|x| &x.bytes),
            grad,
            targets: self.targets(),
            workspace,
            counts,
            loss: LossOutput::new(&mut loss, &self.problem.form, partials)?,
        };
        let grid = Grid { overlaps: counts.is_some() && self.gpu.clusters, ..pass.grid };
        // SAFETY: the kernel and the grid are the pass's; the rows are those of the logits' layout, `RowOperands`
        // fits them, the gradient has as many elements as the logits, and blocks wait for the counts
        unsafe { launch.launch(self.gpu, &self.stream, kernel, grid)? };
        Ok(self.wrap(loss))
    }

    /// Few long rows, each over many blocks: the forward's two launches and the backward's one.
    fn loss_and_grad_split(&self, x: Option<&InputView>, grad: CudaViewMut<u8>) -> Result<CudaStorage> {
        let reduced = match x {
            Some(x) => self.reduce(x)?,
            None => self.reduce(&InputView { bytes: grad.as_view(), tag: Tag::of(self.dtype)? })?,
        };
        let workspace = self.wrap(reduced.workspace);
        let saved = Layout::contiguous(self.numbers_of_rows() + 1);
        let [statistics, denominator] = self.saved_views((&workspace, &saved))?;
        let inputs = GradientInputs { statistics: &statistics.bytes, denominator: &denominator.bytes, upstream: None };
        self.emit(x, inputs, false, grad)?;
        Ok(self.wrap(reduced.loss))
    }
}
