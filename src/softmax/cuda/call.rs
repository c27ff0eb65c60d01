//! The softmax family: the launches of each pass. The kernels are in `kernels/softmax*.cuh`, the launch shapes come from
//! [`plan::softmax`](crate::softmax::cuda::plan).

use super::plan::{Device, Form, Fused, Pass, Planner, Shape, Thresholds};
use crate::check::arithmetic;
use crate::cuda::gpu::{Gpu, Module};
use crate::cuda::grid::Grid;
use crate::cuda::kernels;
use crate::cuda::launch::{Input, Launch, Tag, alloc, output, partials};
use crate::cuda::rows::{RowParams, Strides, check_indices};
use crate::custom_op::{Arg, Argument, DeviceStorage, Locked};
use crate::reduction::Reduction;
use crate::rows::Rows;
use crate::softmax::problem::{CrossEntropy, RowStatistics, Saved, SoftmaxKernels};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use std::sync::Arc;

/// Static shared memory of the kernels, which a block's limit includes.
const STATIC_SHARED: u32 = 2 << 10;
/// The largest cluster of any GPU so far.
const LARGEST_CLUSTER: u32 = 16;

/// `Problem` of `kernels/softmax/state.cuh`, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
struct Problem {
    base: RowParams,
    x: Strides,
    t: Strides,
    spread: f64,
    mass: f64,
    scale: f64,
    softcap: f64,
    inverse_cap: f64,
    z_loss: f64,
    team: i32,
    kept: i32,
    upstream_rows: i32,
    class_last: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for Problem {}

impl Problem {
    /// A pass over rows without options.
    fn of_rows(base: RowParams, rows: &Rows) -> Self {
        Problem {
            base,
            x: Strides::of(rows),
            t: Strides::default(),
            spread: 0.0,
            mass: 0.0,
            scale: 1.0,
            softcap: 0.0,
            inverse_cap: 0.0,
            z_loss: 0.0,
            team: 1,
            kept: 0,
            upstream_rows: 0,
            class_last: rows.class_last() as i32,
        }
    }

    fn on(self, pass: &Pass) -> Self {
        let mut x = self.x;
        if let Form::Registers(_) = pass.form {
            // all rows are at one distance, that of the innermost axis where there is one
            x.outer_stride = if x.inner > 1 { x.inner_stride } else { x.outer_stride };
            x.inner = 1;
        }
        Problem { x, team: pass.team as i32, kept: pass.kept as i32, ..self }
    }
}

/// Which of a dtype's kernels: what they know of the classes beside their logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    /// Class indices and nothing else than class weights.
    Plain,
    /// Class indices with label smoothing (then without class weights), z-loss and a positive scale.
    Uniform,
    /// All else, and all of `f64`.
    General,
}

impl Detail {
    fn name(self) -> &'static str {
        match self {
            Detail::Plain => "plain",
            Detail::Uniform => "uniform",
            Detail::General => "general",
        }
    }

    /// The module of the kernels and, for `Plain`, of log-softmax.
    pub(super) fn module(self, dtype: DType) -> Result<&'static Module> {
        Ok(match (self, dtype) {
            (Detail::Plain, DType::F16) => &kernels::SOFTMAX_PLAIN_F16,
            (Detail::Plain, DType::BF16) => &kernels::SOFTMAX_PLAIN_BF16,
            (Detail::Plain, DType::F32) => &kernels::SOFTMAX_PLAIN_F32,
            (Detail::Plain, DType::F64) => &kernels::SOFTMAX_PLAIN_F64,
            (Detail::Uniform, DType::F16) => &kernels::SOFTMAX_UNIFORM_F16,
            (Detail::Uniform, DType::BF16) => &kernels::SOFTMAX_UNIFORM_BF16,
            (Detail::Uniform, DType::F32) => &kernels::SOFTMAX_UNIFORM_F32,
            (Detail::General, DType::F16) => &kernels::SOFTMAX_GENERAL_F16,
            (Detail::General, DType::BF16) => &kernels::SOFTMAX_GENERAL_BF16,
            (Detail::General, DType::F32) => &kernels::SOFTMAX_GENERAL_F32,
            (Detail::General, DType::F64) => &kernels::SOFTMAX_GENERAL_F64,
            (detail, other) => bail!("there are no {} kernels for dtype {other:?}", detail.name()),
        })
    }

    /// The uniform kernels serve plain class indices as well: there are plain ones only for what these would slow down.
    fn unless_served(self, by_uniform: bool) -> Self {
        if self == Detail::Plain && by_uniform { Detail::Uniform } else { self }
    }
}

fn planner(gpu: &Gpu) -> Planner {
    Planner {
        device: Device {
            processors: gpu.processors,
            shared_bytes: gpu.shared_bytes.saturating_sub(STATIC_SHARED),
            cluster: if gpu.clusters { LARGEST_CLUSTER } else { 1 },
        },
        thresholds: thresholds(),
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

fn form(pass: &Pass) -> String {
    match pass.form {
        Form::Rows => "rows".to_string(),
        Form::Tile => "tile".to_string(),
        Form::Strided => "strided".to_string(),
        Form::Registers(windows) => format!("registers_{windows}"),
        Form::Cluster => "cluster".to_string(),
    }
}

/// One number in the arithmetic dtype, for results of no rows.
fn constant(device: &CudaDevice, dtype: DType, value: f64) -> Result<CudaStorageSlice> {
    Ok(match dtype {
        DType::F64 => CudaStorageSlice::F64(device.clone_htod(&[value])?),
        _ => CudaStorageSlice::F32(device.clone_htod(&[value as f32])?),
    })
}

/// A cross-entropy whose tensors are at hand.
struct Task<'a> {
    options: &'a CrossEntropy,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    dtype: DType,
    rows: Rows,
    target: Input<'a>,
    weight: Option<Input<'a>>,
    problem: Problem,
    gpu: Arc<Gpu>,
}

/// Memory for the numbers that a reduction leaves, and where the scalar ones go.
struct Reduced {
    loss: CudaStorageSlice,
    denominator: CudaStorageSlice,
    statistics: CudaStorageSlice,
}

impl<'a> Task<'a> {
    fn run<R>(
        options: &'a CrossEntropy,
        (device, dtype, layout): (&CudaDevice, DType, &Layout),
        target: Arg<'a, CudaStorage>,
        body: impl FnOnce(&Task) -> Result<R>,
    ) -> Result<R> {
        let rows = options.rows(layout)?;
        let o = &options.options;
        let indices = !target.0.dtype().is_float();
        let smoothing = o.label_smoothing;
        let base =
            RowParams { keep: 1.0 - smoothing, ..RowParams::new(options.name, &rows, &o.rows, target.0.dtype())? };
        let mut problem = Problem::of_rows(base, &rows);
        problem.spread = smoothing / rows.classes.max(1) as f64;
        // the same in all rows, unless it depends on weights or probabilities
        problem.mass = if !indices || (smoothing != 0.0 && o.rows.weight.is_some()) { f64::NAN } else { smoothing };
        problem.scale = o.logit_scale;
        problem.softcap = o.softcap.unwrap_or(0.0);
        problem.inverse_cap = o.softcap.map_or(0.0, |cap| 1.0 / cap);
        problem.z_loss = o.z_loss;
        if indices {
            check_indices(options.name, &o.rows, target, &rows)?;
        } else {
            problem.t = Strides::of(&options.target_rows(target.1, &rows)?);
        }
        let weight = o.rows.weight.as_ref().map(Locked::new);
        let weight = weight.as_ref().map(|weight| weight.arg::<CudaStorage>(options.name)).transpose()?;
        let weight = weight.map(|(storage, layout)| Input::new(storage, layout)).transpose()?;
        let task = Task {
            options,
            device: device.clone(),
            stream: device.cuda_stream(),
            dtype,
            target: Input::new(target.0, target.1)?,
            weight,
            problem,
            gpu: Gpu::of(device)?,
            rows,
        };
        body(&task)
    }

    fn acc(&self) -> DType {
        arithmetic(self.dtype)
    }

    fn shape(&self) -> Shape {
        shape(&self.rows, self.dtype, self.detail())
    }

    /// Memory for `len` numbers in the arithmetic dtype.
    ///
    /// # Safety
    /// As for [`alloc`].
    unsafe fn numbers(&self, len: usize) -> Result<CudaStorageSlice> {
        // SAFETY: by this function's contract
        unsafe { alloc(&self.device, self.acc(), len.max(1)) }
    }

    /// How many numbers of a row the backward needs.
    fn kinds(&self) -> usize {
        2 + self.problem.mass.is_nan() as usize
    }

    fn detail(&self) -> Detail {
        let o = &self.options.options;
        let indices = matches!(self.target.tag, Tag::U8 | Tag::U32 | Tag::I32 | Tag::I64);
        if !indices || o.softcap.is_some() || self.dtype == DType::F64 {
            return Detail::General;
        }
        if o.label_smoothing == 0.0 && o.z_loss == 0.0 && o.logit_scale == 1.0 {
            return Detail::Plain;
        }
        // with class weights the smoothed classes count differently; a scale below 0 makes the lowest logit the largest
        let uniform = (o.label_smoothing == 0.0 || self.weight.is_none()) && o.logit_scale > 0.0;
        if uniform { Detail::Uniform } else { Detail::General }
    }

    fn planner(&self) -> Planner {
        planner(&self.gpu)
    }

    /// A launch of `softmax_<pass>_<detail>`, with the form of a pass that has several.
    fn kernel(&self, pass: &str, detail: Detail, form: Option<&Pass>) -> Result<Launch<'_>> {
        let form = form.map_or(String::new(), |pass| format!("_{}", self::form(pass)));
        let name = format!("softmax_{pass}_{}{form}", detail.name());
        Launch::new(&self.gpu, &self.stream, detail.module(self.dtype)?, &name)
    }

    fn wants_rows(&self) -> bool {
        self.options.options.rows.reduction == Reduction::None
    }

    fn wrap(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    /// The results of no rows, for which nothing is launched.
    fn reduced_nothing(&self) -> Result<Reduced> {
        let value = match self.options.options.rows.reduction {
            Reduction::Mean if self.options.options.rows.normalizer.is_none() => f64::NAN,
            _ => 0.0,
        };
        Ok(Reduced {
            loss: constant(&self.device, self.acc(), value)?,
            denominator: constant(&self.device, self.acc(), self.problem.base.normalizer)?,
            statistics: constant(&self.device, self.acc(), 0.0)?,
        })
    }

    /// The forward: a loss for each row or a scalar one, the denominator, and `kinds` numbers of each row.
    /// One launch, and a second one where rows are split over blocks.
    fn reduce(&self, x: &Input, kinds: usize) -> Result<Reduced> {
        if self.problem.base.rows == 0 {
            return self.reduced_nothing();
        }
        let shape = self.shape();
        let pass = self.planner().reduce(&shape);
        let rows = self.rows.count();
        // SAFETY: the launches below write all of these
        let mut reduced = unsafe {
            Reduced {
                loss: self.numbers(if self.wants_rows() { rows } else { 1 })?,
                denominator: self.numbers(1)?,
                statistics: self.numbers(kinds * rows)?,
            }
        };
        let mut loss = Some(output(&mut reduced.loss)?);
        let mut denominator = output(&mut reduced.denominator)?;
        let mut statistics = Some(output(&mut reduced.statistics)?);
        let (mut rows_loss, mut result) = if self.wants_rows() { (loss.take(), None) } else { (None, loss.take()) };
        let problem = self.problem.on(&pass);
        let split = pass.splits() > 1;
        let detail = self.detail().unless_served(split || pass.form == Form::Strided);
        // SAFETY: the first launch writes all states before the merge reads them
        let splits = split.then(|| unsafe { self.numbers(4 * rows * pass.splits() as usize) });
        let mut splits = splits.transpose()?;
        let mut states = splits.as_mut().map(output).transpose()?;
        let mut partials = if split { Partials::default() } else { self.partials(&pass)? };
        let mut launch = self.kernel("reduce", detail, Some(&pass))?;
        launch.value(&problem).read(&x.bytes).read(&self.target.bytes).read_if(self.weight());
        launch.write_if(states.as_mut());
        if split {
            launch.null().null().null().null().null().null();
        } else {
            launch.write_if(rows_loss.as_mut()).write_if(statistics.as_mut());
            launch.write_if(partials.sums.as_mut()).address(partials.ticket);
            launch.write_if(result.as_mut()).write(&mut denominator);
        }
        // SAFETY: the parameters of softmax_reduce_*, and the rows are inside of their tensors
        unsafe { launch.run(pass.grid)? };
        if let Some(states) = &states {
            let count = pass.splits() as i32;
            let mut launch = self.kernel("merge", detail, None)?;
            launch.value(&problem).read(&x.bytes).read(&self.target.bytes).read_if(self.weight());
            launch.read(states).value(&count).write_if(rows_loss.as_mut()).write_if(statistics.as_mut());
            launch.write_if(result.as_mut()).write(&mut denominator);
            // SAFETY: the parameters of softmax_merge_*
            unsafe { launch.run(Grid::flat(1, MERGE_THREADS))? };
        }
        Ok(reduced)
    }

    /// The number (or the weights) of the rows that count, in parts, ahead of a pass that needs it.
    fn count(&self, pass: &Pass) -> Result<Option<CudaSlice<f64>>> {
        let blocks = self.planner().counts(self.problem.base.rows as u64, pass);
        if self.problem.base.counted == 0 || blocks == 0 {
            return Ok(None);
        }
        // SAFETY: each block writes its element
        let mut counts = unsafe { partials::<f64>(&self.device, blocks as usize)? };
        let name = format!("count_rows_{}", self.acc().as_str());
        let mut launch = Launch::new(&self.gpu, &self.stream, &kernels::OPERANDS, &name)?;
        launch.value(&self.problem.base).read(&self.target.bytes).read_if(self.weight()).write(&mut counts);
        // SAFETY: the parameters of count_rows_*
        unsafe { launch.run(Grid::flat(blocks, 1024))? };
        Ok(Some(counts))
    }

    /// Writes the gradient from what the forward left, for an upstream gradient of ones where there is none; in place
    /// without `x`. One launch.
    fn emit(
        &self,
        x: Option<&Input>,
        statistics: &Input,
        denominator: &Input,
        upstream: Option<&Input>,
        upstream_rows: bool,
        grad: &mut CudaViewMut<u8>,
    ) -> Result<()> {
        let pass = self.planner().emit(&self.shape());
        let problem = Problem { upstream_rows: upstream_rows as i32, ..self.problem.on(&pass) };
        let mut launch = self.kernel("emit", self.detail().unless_served(true), Some(&pass))?;
        launch.value(&problem).read_if(bytes(x)).read(&self.target.bytes).read_if(self.weight());
        launch.read(&statistics.bytes).read(&denominator.bytes).read_if(bytes(upstream)).write(grad);
        // SAFETY: the parameters of softmax_emit_*, and the rows are inside of their tensors
        unsafe { launch.run(pass.grid) }
    }

    /// The plan for loss and gradient, with clusters that the GPU has room for.
    fn plan_fused(&self) -> Result<Fused> {
        let mut planner = self.planner();
        loop {
            let fused = planner.fused(&self.shape());
            let Fused::OnePass(pass) = &fused else { return Ok(fused) };
            if pass.form != Form::Cluster || self.kernel("fused", self.detail(), Some(pass))?.has_room(&pass.grid)? {
                return Ok(fused);
            }
            planner.device.cluster = pass.grid.cluster / 2;
        }
    }

    /// Loss and gradient. Without `x` the gradient replaces the logits in `grad`. One launch, and one ahead of it where there
    /// are many rows to count; three where rows are split over blocks.
    fn loss_and_grad(&self, x: Option<&Input>, grad: &mut CudaViewMut<u8>) -> Result<CudaStorage> {
        let rows = self.rows.count();
        let pass = match self.plan_fused()? {
            Fused::OnePass(pass) => pass,
            Fused::Split { .. } => return self.loss_and_grad_split(x, grad),
        };
        let mut problem = self.problem.on(&pass);
        let counts = self.count(&pass)?;
        problem.base.counts = counts.as_ref().map_or(0, |counts| counts.len() as i32);
        // SAFETY: the launch below writes all of it
        let mut loss = unsafe { self.numbers(if self.wants_rows() { rows } else { 1 })? };
        {
            let mut bytes = Some(output(&mut loss)?);
            let (mut rows_loss, mut result) =
                if self.wants_rows() { (bytes.take(), None) } else { (None, bytes.take()) };
            let mut partials = self.partials(&pass)?;
            let detail = self.detail().unless_served(pass.form == Form::Strided);
            let mut launch = self.kernel("fused", detail, Some(&pass))?;
            launch.value(&problem).read_if(self::bytes(x)).write(grad).read(&self.target.bytes);
            launch.read_if(self.weight()).read_if(counts.as_ref()).write_if(rows_loss.as_mut());
            launch.write_if(partials.sums.as_mut()).address(partials.ticket).write_if(result.as_mut());
            // SAFETY: the parameters of softmax_fused_*, and the rows are inside of their tensors
            unsafe { launch.run(pass.grid)? };
        }
        Ok(self.wrap(loss))
    }

    /// Few long rows, each over many blocks: the forward's two launches and the backward's one.
    fn loss_and_grad_split(&self, x: Option<&Input>, grad: &mut CudaViewMut<u8>) -> Result<CudaStorage> {
        let reduced = match x {
            Some(x) => self.reduce(x, self.kinds())?,
            None => self.reduce(&Input { bytes: grad.as_view(), tag: Tag::of(self.dtype)? }, self.kinds())?,
        };
        let denominator = self.wrap(reduced.denominator);
        let statistics = self.wrap(reduced.statistics);
        let scalar = Layout::contiguous(());
        self.emit(x, &Input::new(&statistics, &scalar)?, &Input::new(&denominator, &scalar)?, None, false, grad)?;
        Ok(self.wrap(reduced.loss))
    }

    fn weight(&self) -> Option<&CudaView<'a, u8>> {
        bytes(self.weight.as_ref())
    }

    /// Memory for a pass's partial sums, where its loss is a scalar and it has more than one block.
    fn partials(&self, pass: &Pass) -> Result<Partials> {
        if self.wants_rows() || pass.partials() == 1 {
            return Ok(Partials::default());
        }
        // SAFETY: each block writes its numbers before the last one reads any
        let sums = unsafe { partials::<f64>(&self.device, 2 * pass.partials() as usize)? };
        Ok(Partials { sums: Some(sums), ticket: self.gpu.ticket(&self.stream)? })
    }
}

/// Threads of the block that merges split rows, a warp for each.
const MERGE_THREADS: u32 = 256;

/// The sums (loss, weight) of each block, where there are some, and what the blocks count themselves by.
#[derive(Default)]
struct Partials {
    sums: Option<CudaSlice<f64>>,
    ticket: u64,
}

fn bytes<'a, 'b>(input: Option<&'b Input<'a>>) -> Option<&'b CudaView<'a, u8>> {
    input.map(|input| &input.bytes)
}

fn shape(rows: &Rows, dtype: DType, detail: Detail) -> Shape {
    let even = rows.inner == 1 || rows.outer == 1 || rows.outer_stride == rows.inner * rows.inner_stride;
    Shape {
        even,
        light: detail != Detail::General && dtype != DType::F64,
        rows: rows.count() as u64,
        classes: rows.classes as u64,
        element: dtype.size_in_bytes() as u64,
        adjacent: rows.class_stride == 1,
        packed: rows.class_stride == 1
            && (rows.inner == 1
                || (rows.inner_stride == rows.classes && rows.outer_stride == rows.inner * rows.classes))
            && (rows.inner > 1 || rows.outer_stride == rows.classes || rows.outer == 1),
    }
}

impl SoftmaxKernels for CudaStorage {
    fn forward(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)> {
        forward(problem, logits, target)
    }

    fn backward(
        problem: &CrossEntropy,
        saved: &Saved,
        of: Argument,
        logits: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        backward(problem, saved, of, logits, target, upstream)
    }

    fn loss_and_grad(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        loss_and_grad(problem, logits, target)
    }

    fn loss_and_grad_inplace(
        problem: &CrossEntropy,
        logits: &mut Self,
        layout: &Layout,
        target: Arg<Self>,
    ) -> Result<Self> {
        loss_and_grad_inplace(problem, logits, layout, target)
    }

    fn statistics(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<RowStatistics<Self>> {
        statistics(problem, logits, target)
    }

    fn log_softmax(name: &str, logits: &Self, rows: &Rows) -> Result<Self> {
        log_softmax(name, logits, rows)
    }

    fn log_softmax_backward(name: &str, output: (&Self, &Rows), upstream: (&Self, &Rows)) -> Result<Self> {
        log_softmax_backward(name, output, upstream)
    }
}

/// The loss, and what the backward needs.
fn forward(options: &CrossEntropy, logits: Arg<CudaStorage>, target: Arg<CudaStorage>) -> Result<(CudaStorage, Saved)> {
    let (storage, layout) = logits;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let kinds = task.kinds();
        let reduced = task.reduce(&Input::new(storage, layout)?, kinds)?;
        let saved = Saved {
            statistics: task.wrap(reduced.statistics).into_tensor((kinds, task.rows.count())),
            denominator: task.wrap(reduced.denominator).into_tensor(()),
        };
        Ok((task.wrap(reduced.loss), saved))
    })
}

/// The gradient of the logits or of probability targets, in the order that [`Rows::class_last`] says. One launch.
fn backward(
    options: &CrossEntropy,
    saved: &Saved,
    of: Argument,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
    upstream: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    let (storage, layout) = logits;
    // what the forward checked is not waited for again
    let mut options = options.clone();
    options.options.rows.target_check = false;
    let options = &options;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let len = layout.shape().elem_count();
        let dtype = match of {
            Argument::Input => task.dtype,
            Argument::Target => task.acc(),
        };
        // SAFETY: the launch below writes all of it
        let mut grad = unsafe { alloc(&task.device, dtype, len.max(1))? };
        if len == 0 {
            return Ok(task.wrap(grad));
        }
        let mut bytes = output(&mut grad)?;
        let x = Input::new(storage, layout)?;
        let upstream_rows = upstream.1.shape().elem_count() != 1;
        let upstream = Input::new(upstream.0, upstream.1)?;
        let (statistics, denominator) = (Locked::new(&saved.statistics), Locked::new(&saved.denominator));
        let (statistics, denominator) = (statistics.arg(options.name)?, denominator.arg(options.name)?);
        let (statistics, denominator) =
            (Input::new(statistics.0, statistics.1)?, Input::new(denominator.0, denominator.1)?);
        if of == Argument::Input {
            task.emit(Some(&x), &statistics, &denominator, Some(&upstream), upstream_rows, &mut bytes)?;
            return Ok(task.wrap(grad));
        }
        let pass = task.planner().any_layout(&task.shape());
        let problem = Problem { upstream_rows: upstream_rows as i32, ..task.problem.on(&pass) };
        let module = Detail::General.module(task.dtype)?;
        let mut launch = Launch::new(&task.gpu, &task.stream, module, "softmax_target_gradient")?;
        launch.value(&problem).read(&x.bytes).read_if(task.weight()).read(&statistics.bytes);
        launch.read(&denominator.bytes).read(&upstream.bytes).write(&mut bytes);
        // SAFETY: the parameters of softmax_target_gradient, and the rows are inside of their tensors
        unsafe { launch.run(pass.grid)? };
        Ok(task.wrap(grad))
    })
}

/// Loss and gradient.
fn loss_and_grad(
    options: &CrossEntropy,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    let (storage, layout) = logits;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let len = layout.shape().elem_count();
        // SAFETY: the launches below write all of it
        let mut grad = unsafe { alloc(&task.device, task.dtype, len.max(1))? };
        if len == 0 {
            return Ok((task.wrap(task.reduced_nothing()?.loss), task.wrap(grad)));
        }
        let mut bytes = output(&mut grad)?;
        let loss = task.loss_and_grad(Some(&Input::new(storage, layout)?), &mut bytes)?;
        Ok((loss, task.wrap(grad)))
    })
}

/// As [`loss_and_grad`]; the gradient replaces the logits, which are contiguous.
fn loss_and_grad_inplace(
    options: &CrossEntropy,
    logits: &mut CudaStorage,
    layout: &Layout,
    target: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    let (device, dtype) = (logits.device.clone(), logits.dtype());
    Task::run(options, (&device, dtype, layout), target, |task| {
        if layout.shape().elem_count() == 0 {
            return Ok(task.wrap(task.reduced_nothing()?.loss));
        }
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!(
                "{}: strides {:?} of shape {:?}, expected contiguous logits",
                options.name,
                layout.stride(),
                layout.dims()
            )
        };
        let size = dtype.size_in_bytes();
        let mut all = output(&mut logits.slice)?;
        task.loss_and_grad(None, &mut all.slice_mut(start * size..end * size))
    })
}

/// The rows' losses and statistics. One launch.
fn statistics(
    options: &CrossEntropy,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<RowStatistics<CudaStorage>> {
    let (storage, layout) = logits;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let rows = task.rows.count();
        // SAFETY: the launch below writes all of these
        let (mut slices, mut argmax, mut correct) = unsafe {
            let slices = [task.numbers(rows)?, task.numbers(rows)?, task.numbers(rows)?, task.numbers(rows)?];
            (slices, alloc(&task.device, DType::U32, rows.max(1))?, alloc(&task.device, DType::U8, rows.max(1))?)
        };
        if rows > 0 {
            let pass = task.planner().statistics(&task.shape());
            let problem = task.problem.on(&pass);
            let x = Input::new(storage, layout)?;
            let mut bytes = slices.iter_mut().map(output).collect::<Result<Vec<_>>>()?;
            let (mut argmax, mut correct) = (output(&mut argmax)?, output(&mut correct)?);
            let name = format!("softmax_statistics_{}", form(&pass));
            let module = Detail::General.module(task.dtype)?;
            let mut launch = Launch::new(&task.gpu, &task.stream, module, &name)?;
            launch.value(&problem).read(&x.bytes).read(&task.target.bytes).read_if(task.weight());
            for bytes in &mut bytes {
                launch.write(bytes);
            }
            launch.write(&mut argmax).write(&mut correct);
            // SAFETY: the parameters of softmax_statistics_*, and the rows are inside of their tensors
            unsafe { launch.run(pass.grid)? };
        }
        let [loss, lse, z_loss, entropy] = slices.map(|slice| task.wrap(slice));
        Ok(RowStatistics { loss, lse, z_loss, entropy, argmax: task.wrap(argmax), correct: task.wrap(correct) })
    })
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says. One launch.
fn log_softmax(name: &str, logits: &CudaStorage, rows: &Rows) -> Result<CudaStorage> {
    let (device, dtype) = (&logits.device, logits.dtype());
    let stream = device.cuda_stream();
    let len = rows.count() * rows.classes;
    // SAFETY: the launch below writes all of it
    let mut out = unsafe { alloc(device, dtype, len.max(1))? };
    if len > 0 {
        let gpu = Gpu::of(device)?;
        let pass = planner(&gpu).one_pass(&shape(rows, dtype, Detail::Plain), false);
        let problem = Problem::of_rows(RowParams::untargeted(name, rows)?, rows).on(&pass);
        let x = Input::new(logits, &from(rows))?;
        let mut bytes = output(&mut out)?;
        let kernel = format!("softmax_log_softmax_{}", form(&pass));
        let mut launch = Launch::new(&gpu, &stream, Detail::Plain.module(dtype)?, &kernel)?;
        launch.value(&problem).read(&x.bytes).write(&mut bytes);
        // SAFETY: the parameters of softmax_log_softmax_*, and the rows are inside of their tensors
        unsafe { launch.run(pass.grid)? };
    }
    Ok(CudaStorage { slice: out, device: device.clone() })
}

/// A layout that begins where the rows do.
fn from(rows: &Rows) -> Layout {
    Layout::contiguous_with_offset((), rows.offset)
}

/// `g - exp(y) sum(g)` of each row, in the order of the log-probabilities y. One launch.
fn log_softmax_backward(
    name: &str,
    (out, rows): (&CudaStorage, &Rows),
    (upstream, upstream_rows): (&CudaStorage, &Rows),
) -> Result<CudaStorage> {
    let (device, dtype) = (&out.device, out.dtype());
    let stream = device.cuda_stream();
    if upstream.dtype() != dtype {
        bail!("{name}: an upstream gradient of dtype {:?}, expected {dtype:?}", upstream.dtype());
    }
    let len = rows.count() * rows.classes;
    // SAFETY: the launch below writes all of it
    let mut grad = unsafe { alloc(device, dtype, len.max(1))? };
    if len > 0 {
        let gpu = Gpu::of(device)?;
        let pass = planner(&gpu).any_layout(&shape(rows, dtype, Detail::Plain));
        let problem = Problem {
            t: Strides::of(upstream_rows),
            ..Problem::of_rows(RowParams::untargeted(name, rows)?, rows).on(&pass)
        };
        let (y, g) = (Input::new(out, &from(rows))?, Input::new(upstream, &from(upstream_rows))?);
        let mut bytes = output(&mut grad)?;
        let mut launch = Launch::new(&gpu, &stream, Detail::Plain.module(dtype)?, "softmax_log_softmax_backward")?;
        launch.value(&problem).read(&y.bytes).read(&g.bytes).write(&mut bytes);
        // SAFETY: the parameters of softmax_log_softmax_backward, and the rows are inside of their tensors
        unsafe { launch.run(pass.grid)? };
    }
    Ok(CudaStorage { slice: grad, device: device.clone() })
}
