//! The softmax family: the launches of each pass. The kernels are in `kernels/softmax*.cuh`, the launch shapes come from
//! [`plan::softmax`](crate::plan::softmax).

use super::launch::{Input, Module, Tag, alloc, arithmetic, launch, output, partials, push, push_output, to_host};
use super::ptx;
use crate::plan::Grid;
use crate::plan::softmax::{Device, Form, Fused, Pass, Planner, Shape, Thresholds};
use crate::reduction::Reduction;
use crate::softmax::{Arg, CrossEntropy, Operand, Rows, Saved, Statistics, cuda_tensor};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{DType, Layout, Result, Storage, bail};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUfunction_attribute};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, CudaViewMut, DeviceRepr, PushKernelArg};
use std::sync::{Arc, OnceLock};

macro_rules! module {
    ($key:literal, $ptx:ident) => {
        Module { key: concat!("candle_fused_loss_", $key), ptx: ptx::$ptx }
    };
}
const F16: Module = module!("softmax_f16", SOFTMAX_F16);
const BF16: Module = module!("softmax_bf16", SOFTMAX_BF16);
const F32: Module = module!("softmax_f32", SOFTMAX_F32);
const F64: Module = module!("softmax_f64", SOFTMAX_F64);
const UNIFORM_F16: Module = module!("softmax_uniform_f16", SOFTMAX_UNIFORM_F16);
const UNIFORM_BF16: Module = module!("softmax_uniform_bf16", SOFTMAX_UNIFORM_BF16);
const UNIFORM_F32: Module = module!("softmax_uniform_f32", SOFTMAX_UNIFORM_F32);
const GENERAL_F16: Module = module!("softmax_general_f16", SOFTMAX_GENERAL_F16);
const GENERAL_BF16: Module = module!("softmax_general_bf16", SOFTMAX_GENERAL_BF16);
const GENERAL_F32: Module = module!("softmax_general_f32", SOFTMAX_GENERAL_F32);
const GENERAL_F64: Module = module!("softmax_general_f64", SOFTMAX_GENERAL_F64);

/// Static shared memory of the kernels, which a block's limit includes.
const STATIC_SHARED: u32 = 2 << 10;
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// `Strides` of `kernels/softmax.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Strides {
    inner: i64,
    outer_stride: i64,
    inner_stride: i64,
    class_stride: i64,
}

impl Strides {
    fn of(rows: &Rows) -> Self {
        Strides {
            inner: rows.inner as i64,
            outer_stride: rows.outer_stride as i64,
            inner_stride: rows.inner_stride as i64,
            class_stride: rows.class_stride as i64,
        }
    }
}

/// `Problem` of `kernels/softmax.cuh`, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
struct Problem {
    rows: i64,
    ignore_index: i64,
    x: Strides,
    t: Strides,
    keep: f64,
    spread: f64,
    mass: f64,
    scale: f64,
    softcap: f64,
    inverse_cap: f64,
    z_loss: f64,
    normalizer: f64,
    classes: i32,
    target: Tag,
    log_probs: i32,
    counted: i32,
    counts: i32,
    team: i32,
    kept: i32,
    upstream_rows: i32,
    class_last: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for Problem {}

impl Problem {
    /// A pass over rows without targets.
    fn of_rows(name: &str, rows: &Rows) -> Result<Self> {
        let Ok(classes) = i32::try_from(rows.classes) else {
            bail!("{name}: {} classes, expected fewer than 2^31 on CUDA", rows.classes)
        };
        Ok(Problem {
            rows: rows.count() as i64,
            ignore_index: 0,
            x: Strides::of(rows),
            t: Strides::default(),
            keep: 1.0,
            spread: 0.0,
            mass: 0.0,
            scale: 1.0,
            softcap: 0.0,
            inverse_cap: 0.0,
            z_loss: 0.0,
            normalizer: 1.0,
            classes,
            target: Tag::U32,
            log_probs: 0,
            counted: 0,
            counts: 0,
            team: 1,
            kept: 0,
            upstream_rows: 0,
            class_last: rows.class_last() as i32,
        })
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

/// Which of a dtype's modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Detail {
    /// Class indices and nothing else than class weights.
    Plain,
    /// Class indices with label smoothing (then without class weights), z-loss and a positive scale, in `f32` arithmetic.
    Uniform,
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

    fn module(self, dtype: DType) -> Result<&'static Module> {
        Ok(match (self, dtype) {
            (Detail::Plain, DType::F16) => &F16,
            (Detail::Plain, DType::BF16) => &BF16,
            (Detail::Plain, DType::F32) => &F32,
            (Detail::Plain, DType::F64) => &F64,
            (Detail::Uniform, DType::F16) => &UNIFORM_F16,
            (Detail::Uniform, DType::BF16) => &UNIFORM_BF16,
            (Detail::Uniform, DType::F32) => &UNIFORM_F32,
            (Detail::General, DType::F16) => &GENERAL_F16,
            (Detail::General, DType::BF16) => &GENERAL_BF16,
            (Detail::General, DType::F32) => &GENERAL_F32,
            (Detail::General, DType::F64) => &GENERAL_F64,
            (_, other) => bail!("no loss kernel computes in dtype {other:?}"),
        })
    }
}

fn planner(device: &CudaDevice) -> Result<Planner> {
    /// Whether this build is for an architecture with clusters.
    static CLUSTERS: OnceLock<bool> = OnceLock::new();
    let built = *CLUSTERS.get_or_init(|| ptx::SOFTMAX_F32.contains("_cluster_4("));
    let stream = device.cuda_stream();
    let attribute = |attribute| stream.context().attribute(attribute).w();
    let built = built && attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? != 0;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok(Planner {
        device: Device {
            processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_bytes: (attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32)
                .saturating_sub(STATIC_SHARED),
            cluster: match (built, major) {
                (false, _) => 1,
                // more than 8 blocks are not portable: these have them
                (true, 9 | 10) => 16,
                (true, _) => 8,
            },
        },
        thresholds: thresholds(),
    })
}

#[cfg(not(test))]
fn thresholds() -> Thresholds {
    Thresholds::default()
}

#[cfg(test)]
fn thresholds() -> Thresholds {
    tests::THRESHOLDS.get()
}

/// A kernel of the family, allowed the shared memory that its grid asks for and the cluster that it is made for.
fn function(device: &CudaDevice, (detail, dtype): (Detail, DType), name: &str, grid: &Grid) -> Result<CudaFunction> {
    let function = detail.module(dtype)?.function(device, name)?;
    if grid.shared_bytes > SHARED_WITHOUT_ASKING {
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, grid.shared_bytes as i32).w()?;
    }
    if name.ends_with("_cluster_16") {
        let allowed = CUfunction_attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        function.set_attribute(allowed, 1).w()?;
    }
    Ok(function)
}

fn form(pass: &Pass) -> String {
    match pass.form {
        Form::Rows => "rows".to_string(),
        Form::Tile => "tile".to_string(),
        Form::Strided => "strided".to_string(),
        Form::Registers(windows) => format!("registers_{windows}"),
        Form::Cluster(size) => format!("cluster_{size}"),
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
    planner: Planner,
}

/// Memory for the numbers that a reduction leaves, and where the scalar ones go.
struct Reduced {
    loss: CudaStorageSlice,
    denominator: CudaStorageSlice,
    statistics: Option<CudaStorageSlice>,
}

impl<'a> Task<'a> {
    fn run<R>(
        options: &'a CrossEntropy,
        (device, dtype, layout): (&CudaDevice, DType, &Layout),
        target: Arg<'a, CudaStorage>,
        body: impl FnOnce(&Task) -> Result<R>,
    ) -> Result<R> {
        let rows = options.rows(layout)?;
        let count = rows.count();
        let indices = !target.0.dtype().is_float();
        let mut problem = Problem::of_rows(options.name, &rows)?;
        problem.ignore_index = options.ignore_index;
        problem.target = Tag::of(target.0.dtype())?;
        let smoothing = options.label_smoothing;
        problem.keep = 1.0 - smoothing;
        problem.spread = smoothing / rows.classes.max(1) as f64;
        // the same in all rows, unless it depends on weights or probabilities
        problem.mass = if !indices || (smoothing != 0.0 && options.weight.is_some()) { f64::NAN } else { smoothing };
        problem.scale = options.logit_scale;
        problem.softcap = options.softcap.unwrap_or(0.0);
        problem.inverse_cap = options.softcap.map_or(0.0, |cap| 1.0 / cap);
        problem.z_loss = options.z_loss;
        problem.log_probs = options.log_probs as i32;
        problem.class_last = rows.class_last() as i32;
        (problem.counted, problem.normalizer) = match (options.reduction, options.normalizer) {
            (Reduction::Mean, Some(normalizer)) => (0, normalizer),
            (Reduction::Mean, None) if indices => (1, 1.0),
            (Reduction::Mean, None) => (0, count as f64),
            (Reduction::None | Reduction::Sum, _) => (0, 1.0),
        };
        if !indices {
            problem.t = Strides::of(&options.target_rows(target.1, &rows)?);
        } else if target.1.contiguous_offsets().is_none() {
            bail!("{}: contiguous class indices were expected, got strides {:?}", options.name, target.1.stride());
        } else if options.target_check {
            check_targets(options, device, target, count, rows.classes)?;
        }
        let weight = options.weight.as_ref().map(|w| w.storage_and_layout());
        let weight = match &weight {
            None => None,
            Some((storage, layout)) => match &**storage {
                Storage::Cuda(storage) => Some(Input::new(storage, layout)?),
                _ => bail!("{}: class weights on another device than the logits", options.name),
            },
        };
        let task = Task {
            options,
            device: device.clone(),
            stream: device.cuda_stream(),
            dtype,
            target: Input::new(target.0, target.1)?,
            weight,
            problem,
            planner: planner(device)?,
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
        match self.options.log_probs {
            true => 0,
            false => 2 + self.problem.mass.is_nan() as usize,
        }
    }

    fn detail(&self) -> Detail {
        let o = self.options;
        let indices = matches!(self.target.tag, Tag::U8 | Tag::U32 | Tag::I32 | Tag::I64);
        if !indices || o.log_probs || o.softcap.is_some() {
            return Detail::General;
        }
        if o.label_smoothing == 0.0 && o.z_loss == 0.0 && o.logit_scale == 1.0 {
            return Detail::Plain;
        }
        // with class weights the smoothed classes count differently; a scale below 0 makes the lowest logit the largest
        let uniform = (o.label_smoothing == 0.0 || self.weight.is_none()) && o.logit_scale > 0.0;
        if uniform && self.dtype != DType::F64 { Detail::Uniform } else { Detail::General }
    }

    fn module(&self) -> (Detail, DType) {
        (self.detail(), self.dtype)
    }

    fn wants_rows(&self) -> bool {
        self.options.reduction == Reduction::None
    }

    fn wrap(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    /// The results of no rows, for which nothing is launched.
    fn reduced_nothing(&self, kinds: usize) -> Result<Reduced> {
        let value = match self.options.reduction {
            Reduction::Mean if self.options.normalizer.is_none() => f64::NAN,
            _ => 0.0,
        };
        Ok(Reduced {
            loss: constant(&self.device, self.acc(), value)?,
            denominator: constant(&self.device, self.acc(), self.problem.normalizer)?,
            statistics: (kinds > 0).then(|| constant(&self.device, self.acc(), 0.0)).transpose()?,
        })
    }

    /// The forward: a loss for each row or a scalar one, the denominator, and `kinds` numbers of each row.
    /// One launch, and a second one where rows are split over blocks.
    fn reduce(&self, x: &Input, kinds: usize) -> Result<Reduced> {
        if self.problem.rows == 0 {
            return self.reduced_nothing(kinds);
        }
        let shape = self.shape();
        let pass = match self.options.log_probs {
            true => self.planner.gather(&shape),
            false => self.planner.reduce(&shape),
        };
        let rows = self.rows.count();
        let device = &self.device;
        // SAFETY: the launches below write all of these
        let mut reduced = unsafe {
            Reduced {
                loss: self.numbers(if self.wants_rows() { rows } else { 1 })?,
                denominator: self.numbers(1)?,
                statistics: (kinds > 0).then(|| self.numbers(kinds * rows)).transpose()?,
            }
        };
        let mut loss = Some(output(&mut reduced.loss)?);
        let mut denominator = Some(output(&mut reduced.denominator)?);
        let mut statistics = reduced.statistics.as_mut().map(output).transpose()?;
        let (mut rows_loss, mut result) = if self.wants_rows() { (loss.take(), None) } else { (None, loss.take()) };
        let problem = self.problem.on(&pass);
        let name = format!("softmax_reduce_{}_{}", self.detail().name(), form(&pass));
        let function = function(device, self.module(), &name, &pass.grid)?;
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&problem).arg(&x.bytes).arg(&self.target.bytes);
        push(&mut builder, &self.weight);
        if pass.splits() > 1 {
            // SAFETY: the launch writes all states before the merge reads them
            let mut splits = unsafe { self.numbers(4 * rows * pass.splits() as usize)? };
            {
                let mut bytes = output(&mut splits)?;
                let mut none = [const { None::<CudaViewMut<u8>> }; 5];
                builder.arg(&mut bytes);
                none.iter_mut().for_each(|none| push_output(&mut builder, none));
                // SAFETY: the arguments are those of softmax_reduce_*_rows, and the rows are inside of their tensors
                unsafe { launch(&mut builder, pass.grid)? };
            }
            let splits = output(&mut splits)?;
            let count = pass.splits() as i32;
            let grid = Grid::flat(1, MERGE_THREADS);
            let function =
                self::function(device, self.module(), &format!("softmax_merge_{}", self.detail().name()), &grid)?;
            let mut builder = self.stream.launch_builder(&function);
            builder.arg(&problem).arg(&x.bytes).arg(&self.target.bytes);
            push(&mut builder, &self.weight);
            let splits = splits.as_view();
            builder.arg(&splits).arg(&count);
            push_output(&mut builder, &mut rows_loss);
            push_output(&mut builder, &mut statistics);
            push_output(&mut builder, &mut result);
            push_output(&mut builder, &mut denominator);
            // SAFETY: the arguments are those of softmax_merge_*
            unsafe { launch(&mut builder, grid)? };
            return Ok(reduced);
        }
        // SAFETY: each block writes its element
        let mut partials = unsafe { Partials::new(device, &pass, !self.wants_rows())? };
        let mut none = None;
        push_output(&mut builder, &mut none);
        push_output(&mut builder, &mut rows_loss);
        push_output(&mut builder, &mut statistics);
        {
            let mut bytes = partials.bytes()?;
            push_output(&mut builder, &mut bytes);
            push_output(&mut builder, &mut result);
            push_output(&mut builder, &mut denominator);
            // SAFETY: the arguments are those of softmax_reduce_*, and the rows are inside of their tensors
            unsafe { launch(&mut builder, pass.grid)? };
        }
        Ok(reduced)
    }

    /// The number (or the weights) of the rows that count, in parts, ahead of a pass that needs it.
    fn count(&self, pass: &Pass) -> Result<Option<CudaSlice<f64>>> {
        let blocks = self.planner.counts(self.problem.rows as u64, pass);
        if self.problem.counted == 0 || blocks == 0 {
            return Ok(None);
        }
        let grid = Grid::flat(blocks, 1024);
        let function = function(&self.device, self.module(), "softmax_count", &grid)?;
        // SAFETY: each block writes its element
        let mut counts = unsafe { partials::<f64>(&self.device, blocks as usize)? };
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&self.problem).arg(&self.target.bytes);
        push(&mut builder, &self.weight);
        builder.arg(&mut counts);
        // SAFETY: the arguments are those of softmax_count
        unsafe { launch(&mut builder, grid)? };
        Ok(Some(counts))
    }

    /// Writes the gradient from what the forward left, for an upstream gradient of ones where there is none; in place
    /// without `x`. One launch.
    fn emit(
        &self,
        x: &Option<Input>,
        statistics: &Option<Input>,
        denominator: &Input,
        upstream: &Option<Input>,
        upstream_rows: bool,
        grad: &mut CudaViewMut<u8>,
    ) -> Result<()> {
        let pass = self.planner.emit(&self.shape());
        let problem = Problem { upstream_rows: upstream_rows as i32, ..self.problem.on(&pass) };
        let name = format!("softmax_emit_{}_{}", self.detail().name(), form(&pass));
        let function = function(&self.device, self.module(), &name, &pass.grid)?;
        let mut builder = self.stream.launch_builder(&function);
        builder.arg(&problem);
        push(&mut builder, x);
        builder.arg(&self.target.bytes);
        push(&mut builder, &self.weight);
        push(&mut builder, statistics);
        builder.arg(&denominator.bytes);
        push(&mut builder, upstream);
        builder.arg(grad);
        // SAFETY: the arguments are those of softmax_emit_*, and the rows are inside of their tensors
        unsafe { launch(&mut builder, pass.grid) }
    }

    /// Loss and gradient. Without `x` the gradient replaces the logits in `grad`. One launch, and one ahead of it where there
    /// are many rows to count; three where rows are split over blocks.
    fn loss_and_grad(&self, x: Option<Input>, grad: &mut CudaViewMut<u8>) -> Result<CudaStorage> {
        let rows = self.rows.count();
        let pass = match self.planner.fused(&self.shape()) {
            Fused::OnePass(pass) => pass,
            Fused::Split { .. } => return self.loss_and_grad_split(x, grad),
        };
        let mut problem = self.problem.on(&pass);
        let counts = self.count(&pass)?;
        problem.counts = counts.as_ref().map_or(0, |counts| counts.len() as i32);
        // SAFETY: the launches below write all of it
        let mut loss = unsafe { self.numbers(if self.wants_rows() { rows } else { 1 })? };
        let mut loss_bytes = Some(output(&mut loss)?);
        let (mut rows_loss, mut result) =
            if self.wants_rows() { (loss_bytes.take(), None) } else { (None, loss_bytes.take()) };
        // SAFETY: each block writes its element
        let mut partials = unsafe { Partials::new(&self.device, &pass, !self.wants_rows())? };
        let name = format!("softmax_fused_{}_{}", self.detail().name(), form(&pass));
        let function = function(&self.device, self.module(), &name, &pass.grid)?;
        {
            let mut bytes = partials.bytes()?;
            let mut no_statistics = None;
            let null = 0u64;
            let mut builder = self.stream.launch_builder(&function);
            builder.arg(&problem);
            push(&mut builder, &x);
            builder.arg(grad).arg(&self.target.bytes);
            push(&mut builder, &self.weight);
            match &counts {
                Some(counts) => builder.arg(counts),
                None => builder.arg(&null),
            };
            push_output(&mut builder, &mut rows_loss);
            push_output(&mut builder, &mut no_statistics);
            push_output(&mut builder, &mut bytes);
            push_output(&mut builder, &mut result);
            // SAFETY: the arguments are those of softmax_fused_*, and the rows are inside of their tensors
            unsafe { launch(&mut builder, pass.grid)? };
        }
        Ok(self.wrap(loss))
    }

    /// Few long rows, each over many blocks: the forward's two launches and the backward's one.
    fn loss_and_grad_split(&self, x: Option<Input>, grad: &mut CudaViewMut<u8>) -> Result<CudaStorage> {
        let in_place;
        let reduced = match &x {
            Some(x) => self.reduce(x, self.kinds())?,
            None => {
                in_place = Input { bytes: grad.as_view(), tag: Tag::of(self.dtype)? };
                self.reduce(&in_place, self.kinds())?
            }
        };
        let denominator = self.wrap(reduced.denominator);
        let statistics = reduced.statistics.map(|s| self.wrap(s));
        let scalar = Layout::contiguous(());
        let statistics = statistics.as_ref().map(|s| Input::new(s, &scalar)).transpose()?;
        self.emit(&x, &statistics, &Input::new(&denominator, &scalar)?, &None, false, grad)?;
        Ok(self.wrap(reduced.loss))
    }
}

/// Threads of the block that merges split rows, a warp for each.
const MERGE_THREADS: u32 = 256;

/// The partial sums (loss, weight) of a pass with a scalar loss and more than one block.
struct Partials(Option<CudaSlice<f64>>);

impl Partials {
    /// # Safety
    /// It is not initialised: the pass writes them before anything reads one.
    unsafe fn new(device: &CudaDevice, pass: &Pass, scalar: bool) -> Result<Self> {
        // one block needs none
        let wanted = scalar && pass.partials() > 1;
        // SAFETY: by this function's contract
        Ok(Partials(if wanted {
            Some(unsafe { partials::<f64>(device, 2 * pass.partials() as usize)? })
        } else {
            None
        }))
    }

    fn bytes(&mut self) -> Result<Option<CudaViewMut<'_, u8>>> {
        let Some(slice) = &mut self.0 else { return Ok(None) };
        let len = slice.len() * std::mem::size_of::<f64>();
        // SAFETY: every byte of a number is a u8, and this is a view of exactly the same memory
        Ok(unsafe { slice.transmute_mut(len) })
    }
}

fn shape(rows: &Rows, dtype: DType, detail: Detail) -> Shape {
    let even = rows.inner == 1 || rows.outer == 1 || rows.outer_stride == rows.inner * rows.inner_stride;
    Shape {
        simple: detail != Detail::General && dtype != DType::F64 && rows.class_stride == 1 && even,
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

/// The check that the CPU makes of every class index, at the price of waiting for the device.
fn check_targets(
    options: &CrossEntropy,
    device: &CudaDevice,
    (target, layout): Arg<CudaStorage>,
    rows: usize,
    classes: usize,
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    let range = layout.start_offset()..layout.start_offset() + rows;
    let indices: Vec<i64> = match &target.slice {
        CudaStorageSlice::U8(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::U32(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I32(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I64(s) => to_host(device, &s.slice(range))?,
        _ => bail!("class indices of dtype {:?}, expected u8, u32, i32 or i64", target.dtype()),
    };
    let bad = |&(_, &class): &(usize, &i64)| class != options.ignore_index && !(0..classes as i64).contains(&class);
    let Some((row, class)) = indices.iter().enumerate().find(bad) else { return Ok(()) };
    bail!(
        "{}: target {class} at row {row} is out of range, expected a class in 0..{classes} or the ignore_index {}",
        options.name,
        options.ignore_index
    )
}

/// The loss, and what the backward needs.
pub(crate) fn forward(
    options: &CrossEntropy,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<(CudaStorage, Saved)> {
    let (storage, layout) = logits;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let kinds = task.kinds();
        let reduced = task.reduce(&Input::new(storage, layout)?, kinds)?;
        let saved = Saved {
            statistics: reduced.statistics.map(|s| cuda_tensor(task.wrap(s), (kinds, task.rows.count()))),
            denominator: cuda_tensor(task.wrap(reduced.denominator), ()),
        };
        Ok((task.wrap(reduced.loss), saved))
    })
}

/// Calls `body` with a tensor of this crate's own.
fn with_input<R>(tensor: &candle_core::Tensor, body: impl FnOnce(Input) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => body(Input::new(storage, layout)?),
        _ => bail!("what the forward saved is not on the CUDA device"),
    }
}

/// The gradient of the logits or of probability targets, in the order that [`Rows::class_last`] says. One launch.
pub(crate) fn backward(
    options: &CrossEntropy,
    saved: &Saved,
    of: Operand,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
    upstream: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    let (storage, layout) = logits;
    // what the forward checked is not waited for again
    let options = &CrossEntropy { target_check: false, ..options.clone() };
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let len = layout.shape().elem_count();
        let dtype = match of {
            Operand::Logits => task.dtype,
            Operand::Target => task.acc(),
        };
        // SAFETY: the launch below writes all of it
        let mut grad = unsafe { alloc(&task.device, dtype, len.max(1))? };
        if len == 0 {
            return Ok(task.wrap(grad));
        }
        let mut bytes = output(&mut grad)?;
        let x = Input::new(storage, layout)?;
        let upstream_rows = upstream.1.shape().elem_count() != 1;
        let upstream = Some(Input::new(upstream.0, upstream.1)?);
        let x = Some(x);
        with_input(&saved.denominator, |denominator| match (&saved.statistics, of) {
            (None, _) => task.emit(&x, &None, &denominator, &upstream, upstream_rows, &mut bytes),
            (Some(statistics), Operand::Logits) => with_input(statistics, |statistics| {
                task.emit(&x, &Some(statistics), &denominator, &upstream, upstream_rows, &mut bytes)
            }),
            (Some(statistics), Operand::Target) => with_input(statistics, |statistics| {
                let pass = task.planner.any_layout(&task.shape());
                let problem = Problem { upstream_rows: upstream_rows as i32, ..task.problem.on(&pass) };
                let function =
                    function(&task.device, (Detail::General, task.dtype), "softmax_target_gradient", &pass.grid)?;
                let mut builder = task.stream.launch_builder(&function);
                builder.arg(&problem);
                push(&mut builder, &x);
                push(&mut builder, &task.weight);
                builder.arg(&statistics.bytes).arg(&denominator.bytes);
                push(&mut builder, &upstream);
                builder.arg(&mut bytes);
                // SAFETY: the arguments are those of softmax_target_gradient, and the rows are inside of their tensors
                unsafe { launch(&mut builder, pass.grid) }
            }),
        })?;
        Ok(task.wrap(grad))
    })
}

/// Loss and gradient.
pub(crate) fn loss_and_grad(
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
            return Ok((task.wrap(task.reduced_nothing(0)?.loss), task.wrap(grad)));
        }
        let mut bytes = output(&mut grad)?;
        let loss = task.loss_and_grad(Some(Input::new(storage, layout)?), &mut bytes)?;
        Ok((loss, task.wrap(grad)))
    })
}

/// As [`loss_and_grad`]; the gradient replaces the logits, which are contiguous.
pub(crate) fn loss_and_grad_inplace(
    options: &CrossEntropy,
    logits: &mut CudaStorage,
    layout: &Layout,
    target: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    let (device, dtype) = (logits.device.clone(), logits.dtype());
    Task::run(options, (&device, dtype, layout), target, |task| {
        if layout.shape().elem_count() == 0 {
            return Ok(task.wrap(task.reduced_nothing(0)?.loss));
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
pub(crate) fn statistics(
    options: &CrossEntropy,
    logits: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<(CudaStorage, Statistics<CudaStorage>)> {
    let (storage, layout) = logits;
    Task::run(options, (&storage.device, storage.dtype(), layout), target, |task| {
        let rows = task.rows.count();
        // SAFETY: the launch below writes all of these
        let (mut slices, mut argmax, mut correct) = unsafe {
            let slices = [task.numbers(rows)?, task.numbers(rows)?, task.numbers(rows)?, task.numbers(rows)?];
            (slices, alloc(&task.device, DType::U32, rows.max(1))?, alloc(&task.device, DType::U8, rows.max(1))?)
        };
        if rows > 0 {
            let pass = task.planner.statistics(&task.shape());
            let problem = task.problem.on(&pass);
            let function = function(
                &task.device,
                (Detail::General, task.dtype),
                &format!("softmax_statistics_{}", form(&pass)),
                &pass.grid,
            )?;
            let x = Input::new(storage, layout)?;
            let mut bytes = slices.iter_mut().map(output).collect::<Result<Vec<_>>>()?;
            let (mut argmax, mut correct) = (output(&mut argmax)?, output(&mut correct)?);
            let mut builder = task.stream.launch_builder(&function);
            builder.arg(&problem).arg(&x.bytes).arg(&task.target.bytes);
            push(&mut builder, &task.weight);
            for bytes in &mut bytes {
                builder.arg(bytes);
            }
            builder.arg(&mut argmax).arg(&mut correct);
            // SAFETY: the arguments are those of softmax_statistics_*, and the rows are inside of their tensors
            unsafe { launch(&mut builder, pass.grid)? };
        }
        let [loss, lse, z_loss, entropy] = slices.map(|slice| task.wrap(slice));
        Ok((loss, Statistics { lse, z_loss, entropy, argmax: task.wrap(argmax), correct: task.wrap(correct) }))
    })
}

/// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says. One launch.
pub(crate) fn log_softmax(name: &str, logits: &CudaStorage, rows: &Rows) -> Result<CudaStorage> {
    let (device, dtype) = (&logits.device, logits.dtype());
    let stream = device.cuda_stream();
    let len = rows.count() * rows.classes;
    // SAFETY: the launch below writes all of it
    let mut out = unsafe { alloc(device, dtype, len.max(1))? };
    if len > 0 {
        let pass = planner(device)?.one_pass(&shape(rows, dtype, Detail::Plain), false);
        let problem = Problem::of_rows(name, rows)?.on(&pass);
        let function =
            function(device, (Detail::Plain, dtype), &format!("softmax_log_softmax_{}", form(&pass)), &pass.grid)?;
        let x = Input::new(logits, &from(rows))?;
        let mut bytes = output(&mut out)?;
        let mut builder = stream.launch_builder(&function);
        builder.arg(&problem).arg(&x.bytes).arg(&mut bytes);
        // SAFETY: the arguments are those of softmax_log_softmax_*, and the rows are inside of their tensors
        unsafe { launch(&mut builder, pass.grid)? };
    }
    Ok(CudaStorage { slice: out, device: device.clone() })
}

/// A layout that begins where the rows do.
fn from(rows: &Rows) -> Layout {
    Layout::contiguous_with_offset((), rows.offset)
}

/// `g - exp(y) sum(g)` of each row, in the order of the log-probabilities y. One launch.
pub(crate) fn log_softmax_backward(
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
        let pass = planner(device)?.any_layout(&shape(rows, dtype, Detail::Plain));
        let problem = Problem { t: Strides::of(upstream_rows), ..Problem::of_rows(name, rows)?.on(&pass) };
        let function = function(device, (Detail::Plain, dtype), "softmax_log_softmax_backward", &pass.grid)?;
        let (y, g) = (Input::new(out, &from(rows))?, Input::new(upstream, &from(upstream_rows))?);
        let mut bytes = output(&mut grad)?;
        let mut builder = stream.launch_builder(&function);
        builder.arg(&problem).arg(&y.bytes).arg(&g.bytes).arg(&mut bytes);
        // SAFETY: the arguments are those of softmax_log_softmax_backward, and the rows are inside of their tensors
        unsafe { launch(&mut builder, pass.grid)? };
    }
    Ok(CudaStorage { slice: grad, device: device.clone() })
}

#[cfg(test)]
mod tests;
