//! The logistic family on CUDA: at most two launches for a loss, one for a gradient, three for both.

use super::plan::{Alignment, Axes, Divisor, MAX_AXES, OPERANDS, Problem, Spans, Variant, View};
use crate::check::{self, arithmetic};
use crate::cuda::gpu::{Gpu, Module};
use crate::cuda::kernels;
use crate::cuda::launch::{Input, Launch, alloc, output, partials, read_element, to_host};
use crate::custom_op::{Arg, Argument, Locked};
use crate::elementwise::problem::{ElementKernels, Elements, Term};
use crate::reduction::Reduction;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use std::sync::Arc;

// SAFETY: a C struct of numbers, the same as the kernels' `Problem`
unsafe impl DeviceRepr for Problem {}

pub(super) fn module(name: &str, dtype: DType) -> Result<&'static Module> {
    Ok(match dtype {
        DType::F16 => &kernels::ELEMENTWISE_F16,
        DType::BF16 => &kernels::ELEMENTWISE_BF16,
        DType::F32 => &kernels::ELEMENTWISE_F32,
        DType::F64 => &kernels::ELEMENTWISE_F64,
        other => bail!("{name}: input of dtype {other:?}, expected f16, bf16, f32 or f64"),
    })
}

impl Term {
    /// The name of the kernels that only this term has: `FOR_EACH_TERM` of `kernels/elementwise/terms.cuh`.
    fn kernel(&self) -> &'static str {
        match self {
            Term::Bce => "bce",
            Term::BceWithLogits => "bce_with_logits",
            Term::Focal { .. } => "focal",
        }
    }

    /// `TermNumber` of `kernels/elementwise/terms.cuh`.
    fn number(&self) -> i32 {
        match self {
            Term::Bce => 0,
            Term::BceWithLogits => 1,
            Term::Focal { .. } => 2,
        }
    }

    /// `TermOptions` of `kernels/elementwise/terms.cuh`.
    fn options(&self) -> (f64, f64) {
        match *self {
            Term::Bce | Term::BceWithLogits => (0.0, 0.0),
            Term::Focal { alpha, gamma } => (alpha.unwrap_or(-1.0), gamma),
        }
    }
}

/// The optional operands, locked for the time of a call.
struct Options<'a>([Option<Locked<'a>>; OPERANDS - 2]);

impl<'a> Options<'a> {
    fn lock(problem: &'a Elements) -> Self {
        let o = &problem.options;
        Options([&o.weight, &o.pos_weight, &o.mask].map(|tensor| tensor.as_ref().map(Locked::new)))
    }
}

/// The operands of a call and how they lie.
struct Operands<'a> {
    args: [Option<Arg<'a, CudaStorage>>; OPERANDS],
    axes: Axes,
}

impl<'a> Operands<'a> {
    fn new(
        problem: &Elements,
        input: Arg<'a, CudaStorage>,
        target: Arg<'a, CudaStorage>,
        options: &'a Options,
    ) -> Result<Self> {
        let mut args = [Some(input), Some(target), None, None, None];
        for (arg, option) in args[2..].iter_mut().zip(&options.0) {
            *arg = option.as_ref().map(|option| option.arg(problem.name)).transpose()?;
        }
        let views = args.map(|arg| arg.map(|(_, layout)| View { dims: layout.dims(), strides: layout.stride() }));
        match Axes::merge(&views) {
            Some(axes) => Ok(Operands { args, axes }),
            // candle's own kernels stop at this rank as well
            None => {
                bail!("{}: shape {:?} with strides that leave more than {MAX_AXES} axes", problem.name, input.1.dims())
            }
        }
    }

    fn inputs(&self) -> Result<Inputs<'_>> {
        let input = |i: usize| self.args[i].map(|(storage, layout)| Input::new(storage, layout)).transpose();
        Ok(Inputs([input(0)?, input(1)?, input(2)?, input(3)?, input(4)?]))
    }
}

/// The operands' memory, in the order of the kernels' parameters.
struct Inputs<'a>([Option<Input<'a>>; OPERANDS]);

impl<'a> Inputs<'a> {
    fn push(&'a self, launch: &mut Launch<'a>) {
        for input in &self.0 {
            launch.read_if(input.as_ref().map(|input| &input.bytes));
        }
    }

    fn mask(&self) -> Option<&Input<'a>> {
        self.0[4].as_ref()
    }
}

/// One call: what all of its launches share.
struct Call<'a> {
    options: &'a Elements,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    gpu: Arc<Gpu>,
    module: &'static Module,
    dtype: DType,
    elements: usize,
    group: usize,
}

impl<'a> Call<'a> {
    fn new(options: &'a Elements, input: Arg<'a, CudaStorage>) -> Result<Self> {
        let dtype = input.0.dtype();
        Ok(Call {
            options,
            device: input.0.device().clone(),
            stream: input.0.device().cuda_stream(),
            gpu: Gpu::of(input.0.device())?,
            module: module(options.name, dtype)?,
            dtype,
            elements: input.1.shape().elem_count(),
            group: options.group(input.1),
        })
    }

    fn bytes(&self) -> u64 {
        self.dtype.size_in_bytes() as u64
    }

    fn accumulator(&self) -> DType {
        arithmetic(self.dtype)
    }

    fn storage(&self, slice: CudaStorageSlice) -> CudaStorage {
        CudaStorage { slice, device: self.device.clone() }
    }

    fn problem(&self, inputs: &Inputs, axes: &Axes, variant: Variant, span: u64) -> Problem {
        let smoothing = self.options.options.label_smoothing;
        let (alpha, gamma) = self.options.term.options();
        let tag = |input: Option<&Input>| input.map_or(0, |input| input.tag as i32);
        Problem {
            elements: self.elements as i64,
            span: span as i64,
            smooth_scale: 1.0 - smoothing,
            smooth_shift: smoothing / 2.0,
            alpha,
            gamma,
            term: self.options.term.number(),
            reduction: match self.options.options.reduction {
                Reduction::None => 0,
                Reduction::Mean => 1,
                Reduction::Sum => 2,
            },
            target_dtype: tag(inputs.0[1].as_ref()),
            mask_dtype: tag(inputs.mask()),
            small: (self.elements < wide_indices_from()) as i32,
            phase: match variant {
                Variant::Dense { phase } => phase,
                Variant::Any => 0,
            },
            upstream_each: 0,
            contiguous: axes.contiguous,
            axes: axes.axes as i32,
            group: Divisor::new(self.group),
            size: axes.size,
            stride: axes.stride,
        }
    }

    fn variant(&self, inputs: &Inputs, axes: &Axes, writes: bool, upstream: Option<&Input>) -> Variant {
        let address = |input: &Input| input.bytes.device_ptr(&self.stream).0;
        let dtype = |input: &Option<Input>| input.as_ref().map(|input| input.tag);
        let [input, target, others @ ..] = &inputs.0;
        Variant::choose(&Alignment {
            plain: axes.axes == 0 && dtype(input) == dtype(target) && others.iter().all(Option::is_none),
            input_address: input.as_ref().map_or(0, address),
            target_address: target.as_ref().map_or(0, address),
            upstream_address: upstream.map(address),
            element_bytes: self.bytes(),
            writes,
        })
    }

    /// A launch of a pass, with the operands as its first parameters.
    fn launch<'b>(&'b self, pass: &str, variant: Variant, inputs: &'b Inputs) -> Result<Launch<'b>> {
        let name = match variant {
            Variant::Dense { .. } => format!("{pass}_{}_dense", self.options.term.kernel()),
            Variant::Any => format!("{pass}_any"),
        };
        let mut launch = Launch::new(&self.gpu, &self.stream, self.module, &name)?;
        inputs.push(&mut launch);
        Ok(launch)
    }

    /// Counts the elements that the mask leaves: partial counts.
    fn count_mask(&self, inputs: &Inputs, axes: &Axes) -> Result<CudaSlice<i64>> {
        let spans = Spans::count(self.elements as u64);
        let problem = self.problem(inputs, axes, Variant::Any, spans.span);
        // SAFETY: every block writes its count
        let mut counts = unsafe { partials(&self.device, spans.count as usize) }?;
        let mut launch = Launch::new(&self.gpu, &self.stream, &kernels::OPERANDS, "count_mask")?;
        launch.read_if(inputs.mask().map(|mask| &mask.bytes)).write(&mut counts).value(&problem);
        // SAFETY: the parameters of `count_mask`; the spans cover the mask's elements
        unsafe { launch.run(spans.grid) }?;
        Ok(counts)
    }

    /// The loss and its denominator, and the gradient if it is asked for.
    fn losses(&self, operands: &Operands, with_grad: bool) -> Result<(CudaStorage, CudaStorage, Option<CudaStorage>)> {
        let inputs = operands.inputs()?;
        let axes = &operands.axes;
        let elements = self.elements as u64;
        let none = self.options.options.reduction == Reduction::None;
        let rows = none && self.group > 1;
        let each = none && !rows;
        let variant = self.variant(&inputs, axes, with_grad || each, None);
        let spans = match (rows, each) {
            (true, _) => Spans::rows(elements, self.group as u64, variant, self.bytes()),
            (_, true) => Spans::each(elements, variant, self.bytes()),
            _ => Spans::sum(elements, variant, self.bytes()),
        };
        let problem = self.problem(&inputs, axes, variant, spans.span);
        let masked = inputs.mask().is_some();
        let several = !none && spans.count > 1;

        let mean = self.options.options.reduction == Reduction::Mean;
        let count_first = with_grad && masked && mean && !spans.count_themselves(elements);
        let counts = count_first.then(|| self.count_mask(&inputs, axes)).transpose()?;
        let parts = counts.as_ref().map_or(0, |counts| counts.len() as i32);

        let losses = if none { self.elements / self.group } else { 1 };
        let sums = spans.count as usize * (1 + masked as usize);
        // SAFETY: the kernels write every element of these
        let (mut loss, mut denominator, mut grad, mut sums) = unsafe {
            (
                alloc(&self.device, self.accumulator(), losses)?,
                alloc(&self.device, self.accumulator(), 1)?,
                with_grad.then(|| alloc(&self.device, self.dtype, self.elements)).transpose()?,
                several.then(|| partials::<f64>(&self.device, sums)).transpose()?,
            )
        };
        let ticket = if several { self.gpu.ticket(&self.stream)? } else { 0 };

        let pass = match variant {
            Variant::Dense { .. } if with_grad => "fused",
            _ => "loss",
        };
        let mut result = Some(output(&mut loss)?);
        let mut to_each = if each { result.take() } else { None };
        let mut to_rows = if rows { result.take() } else { None };
        let mut to_denominator = output(&mut denominator)?;
        let mut to_grad = grad.as_mut().map(output).transpose()?;
        let mut launch = self.launch(pass, variant, &inputs)?;
        launch.read_if(counts.as_ref()).value(&parts).write_if(to_each.as_mut()).write_if(to_rows.as_mut());
        launch.write_if(sums.as_mut()).address(ticket).write_if(result.as_mut()).write(&mut to_denominator);
        launch.write_if(to_grad.as_mut()).value(&problem);
        // SAFETY: the parameters of loss_* and fused_*; the spans cover the elements, which all operands have
        unsafe { launch.run(spans.grid) }?;
        Ok((self.storage(loss), self.storage(denominator), grad.map(|grad| self.storage(grad))))
    }

    /// What `losses` returns for no elements, without a launch.
    fn empty(&self, input: &Layout) -> Result<(CudaStorage, CudaStorage, CudaStorage)> {
        let rows = match input.dims() {
            [rows @ .., _] if self.options.average_rows => rows.iter().product(),
            _ => 0,
        };
        let (loss, denominator): (&[f64], f64) = match self.options.options.reduction {
            Reduction::None => (&vec![f64::NAN; rows], 1.0),
            Reduction::Mean => (&[f64::NAN], 0.0),
            Reduction::Sum => (&[0.0], 1.0),
        };
        Ok((
            constants(&self.device, self.accumulator(), loss)?,
            constants(&self.device, self.accumulator(), &[denominator])?,
            constants(&self.device, self.dtype, &[])?,
        ))
    }

    /// Looks for an element that is no probability and waits for the answer.
    fn check(&self, operands: &Operands) -> Result<()> {
        let inputs = operands.inputs()?;
        let spans = Spans::each(self.elements as u64, Variant::Any, self.bytes());
        let problem = self.problem(&inputs, &operands.axes, Variant::Any, spans.span);
        let mut bad = self.device.clone_htod(&[u64::MAX])?;
        let mut launch = self.launch("check", Variant::Any, &inputs)?;
        launch.write(&mut bad).value(&problem);
        // SAFETY: the parameters of `check_any`; the spans cover the elements, which all operands have
        unsafe { launch.run(spans.grid) }?;
        let at = match to_host(&self.device, &bad.as_view())?.first() {
            Some(&at) if at != u64::MAX => at as usize,
            _ => return Ok(()),
        };
        let value = |operand: usize| -> Result<f64> {
            let Some((storage, layout)) = operands.args[operand] else { return Ok(f64::NAN) };
            read_element(storage, layout, at)
        };
        let is_probability = |v: f64| (0.0..=1.0).contains(&v);
        let (what, v) = match value(0)? {
            x if is_probability(x) => ("target", value(1)?),
            x => ("probability", x),
        };
        let name = self.options.name;
        match self.accumulator() {
            DType::F64 => Err(check::not_in_unit_interval(name, what, v, at)),
            _ => Err(check::not_in_unit_interval(name, what, v as f32, at)),
        }
    }
}

/// From how many elements on the kernels divide indices in 64 bits.
fn wide_indices_from() -> usize {
    #[cfg(test)]
    if let Some(elements) = super::tests::WIDE_INDICES_FROM.get() {
        return elements;
    }
    1 << 31
}

/// A few numbers that the host knows.
fn constants(device: &CudaDevice, dtype: DType, values: &[f64]) -> Result<CudaStorage> {
    let on_cpu = Tensor::new(values, &candle_core::Device::Cpu)?.to_dtype(dtype)?;
    let (storage, _) = on_cpu.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => device.storage_from_cpu_storage(storage),
        _ => bail!("a CPU tensor that is elsewhere"),
    }
}

impl ElementKernels for CudaStorage {
    fn forward(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        forward(problem, input, target)
    }

    fn backward(
        problem: &Elements,
        denominator: &Tensor,
        of: Argument,
        input: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        backward(problem, denominator, of, input, target, upstream)
    }

    fn loss_and_grad(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        loss_and_grad(problem, input, target)
    }
}

/// The loss, and what its sum was divided by.
fn forward(
    options: &Elements,
    input: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    let call = Call::new(options, input)?;
    if call.elements == 0 {
        let (loss, denominator, _) = call.empty(input.1)?;
        return Ok((loss, denominator));
    }
    let locked = Options::lock(options);
    let operands = Operands::new(options, input, target, &locked)?;
    if options.options.target_check {
        call.check(&operands)?;
    }
    let (loss, denominator, _) = call.losses(&operands, false)?;
    Ok((loss, denominator))
}

/// The loss and the gradient of the input, in row-major order.
fn loss_and_grad(
    options: &Elements,
    input: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    let call = Call::new(options, input)?;
    if call.elements == 0 {
        let (loss, _, grad) = call.empty(input.1)?;
        return Ok((loss, grad));
    }
    let locked = Options::lock(options);
    let operands = Operands::new(options, input, target, &locked)?;
    if options.options.target_check {
        call.check(&operands)?;
    }
    match call.losses(&operands, true)? {
        (loss, _, Some(grad)) => Ok((loss, grad)),
        _ => bail!("{}: no gradient", options.name),
    }
}

/// The gradient of the input in its dtype, or of the target in the arithmetic dtype, in row-major order.
fn backward(
    options: &Elements,
    denominator: &Tensor,
    of: Argument,
    input: Arg<CudaStorage>,
    target: Arg<CudaStorage>,
    upstream: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    let call = Call::new(options, input)?;
    let dtype = match of {
        Argument::Input => call.dtype,
        Argument::Target => call.accumulator(),
    };
    if call.elements == 0 {
        return constants(&call.device, dtype, &[]);
    }
    let locked = Options::lock(options);
    let operands = Operands::new(options, input, target, &locked)?;
    let inputs = operands.inputs()?;
    let upstream_each = upstream.1.shape().elem_count() > 1;
    let upstream = Input::new(upstream.0, upstream.1)?;
    let variant = match of {
        Argument::Input if !(upstream_each && call.group > 1) => {
            call.variant(&inputs, &operands.axes, true, upstream_each.then_some(&upstream))
        }
        _ => Variant::Any,
    };
    let spans = Spans::each(call.elements as u64, variant, call.bytes());
    let mut problem = call.problem(&inputs, &operands.axes, variant, spans.span);
    problem.upstream_each = upstream_each as i32;
    let denominator = Locked::new(denominator);
    let denominator = denominator.arg::<CudaStorage>(options.name)?;
    let denominator = Input::new(denominator.0, denominator.1)?;

    // SAFETY: the kernel writes every element
    let mut grad = unsafe { alloc(&call.device, dtype, call.elements) }?;
    let mut to_grad = output(&mut grad)?;
    let pass = if of == Argument::Target { "target_grad" } else { "grad" };
    let mut launch = call.launch(pass, variant, &inputs)?;
    launch.read(&upstream.bytes).read(&denominator.bytes).write(&mut to_grad).value(&problem);
    // SAFETY: the parameters of grad_* and target_grad_any; the spans cover the elements, which all operands have, and the
    // upstream gradient has one value or one for each group
    unsafe { launch.run(spans.grid) }?;
    Ok(call.storage(grad))
}
