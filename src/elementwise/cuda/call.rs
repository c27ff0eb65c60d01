//! The element-wise family on CUDA: at most two launches for a loss, one for a gradient, three for both.

use super::divisor::Divisor;
use super::params::{
    CheckLaunch, CountMaskLaunch, ElementLossOutput, ElementParams, GradLaunch, LossLaunch, MaskCounts, OperandInputs,
    SpanSums,
};
use super::plan::{Alignment, MAX_AXES, OPERANDS, OperandAxes, OperandView, Spans, Variant};
use crate::check::{self, arithmetic};
use crate::cuda::gpu::{Gpu, Module};
use crate::cuda::grid::Grid;
use crate::cuda::kernels;
use crate::cuda::launch::{InputView, Launch, Workspace, alloc, output, read_element, to_host, upstream_view};
use crate::custom_op::{Arg, Argument, Locked};
use crate::elementwise::problem::{DenseKernels, ElementKernels, ElementOptions, Elements, LockedOptions};
use crate::reduction::{Denominator, LossForm};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use cudarc::driver::{CudaStream, CudaViewMut, DevicePtr};
use std::sync::Arc;

pub(super) fn module(name: &str, dtype: DType) -> Result<&'static Module> {
    Ok(match dtype {
        DType::F16 => &kernels::ELEMENTWISE_F16,
        DType::BF16 => &kernels::ELEMENTWISE_BF16,
        DType::F32 => &kernels::ELEMENTWISE_F32,
        DType::F64 => &kernels::ELEMENTWISE_F64,
        other => return Err(check::not_float(name, "input", other)),
    })
}

/// The operands of a call: their memory and how they lie.
struct ElementOperands<'a> {
    /// Input and target, for their dtypes and a message about one of their elements.
    checked: [Arg<'a, CudaStorage>; 2],
    inputs: OperandInputs<'a>,
    /// What the sum of the losses is divided by, where that is in memory.
    normalizer: Option<InputView<'a>>,
    axes: OperandAxes,
}

impl<'a> ElementOperands<'a> {
    fn new(
        name: &str,
        input: Arg<'a, CudaStorage>,
        target: Arg<'a, CudaStorage>,
        locked: &'a LockedOptions,
    ) -> Result<Self> {
        let [weight, pos_weight, mask, normalizer] = locked.args::<CudaStorage>(name)?;
        let args: [_; OPERANDS] = [Some(input), Some(target), weight, pos_weight, mask];
        let arithmetic = arithmetic(input.0.dtype());
        if [weight, pos_weight].into_iter().flatten().any(|(weight, _)| weight.dtype() != arithmetic) {
            bail!("{name}: weights of another dtype than {arithmetic:?}");
        }
        if args.into_iter().flatten().any(|(_, layout)| layout.shape() != input.1.shape()) {
            bail!("{name}: an operand of another shape than the input's {:?}", input.1.shape());
        }
        if normalizer.is_some_and(|(storage, layout)| storage.dtype() != DType::F64 || layout.shape().elem_count() != 1)
        {
            bail!("{name}: a normalizer other than one number of f64");
        }
        let views =
            args.map(|arg| arg.map(|(_, layout)| OperandView { dims: layout.dims(), strides: layout.stride() }));
        let Some(axes) = OperandAxes::merge(&views) else {
            // candle's own kernels stop at this rank as well
            bail!("{name}: shape {:?} with strides that leave more than {MAX_AXES} axes", input.1.dims())
        };
        let optional = |arg: Option<Arg<'a, CudaStorage>>| {
            arg.map(|(storage, layout)| InputView::new(storage, layout)).transpose()
        };
        let inputs = OperandInputs {
            input: InputView::new(input.0, input.1)?,
            target: InputView::new(target.0, target.1)?,
            weight: optional(weight)?,
            pos_weight: optional(pos_weight)?,
            mask: optional(mask)?,
        };
        Ok(ElementOperands { checked: [input, target], inputs, normalizer: optional(normalizer)?, axes })
    }

    /// Whether the operands lie as the dense kernels read them.
    fn are_plain(&self) -> bool {
        let OperandInputs { input, target, weight, pos_weight, mask } = &self.inputs;
        let alone = weight.is_none() && pos_weight.is_none() && mask.is_none();
        self.axes.axes == 0 && input.tag == target.tag && alone
    }
}

/// The results of a pass over the losses.
struct LossResults {
    loss: CudaStorage,
    /// What the backward takes in place of a gradient: the denominator, the first number of its storage.
    denominator: Option<CudaStorage>,
    grad: Option<CudaStorage>,
}

/// One call, for all of its launches.
struct ElementCall<'a> {
    problem: &'a Elements,
    options: &'a ElementOptions,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    gpu: &'static Gpu,
    module: &'static Module,
    /// The term's own kernels.
    dense: Option<DenseKernels>,
    dtype: DType,
    elements: usize,
    group: usize,
}

impl<'a> ElementCall<'a> {
    fn new(problem: &'a Elements, input: Arg<'a, CudaStorage>) -> Result<Self> {
        let dtype = input.0.dtype();
        Ok(ElementCall {
            problem,
            options: &problem.options,
            device: input.0.device().clone(),
            stream: input.0.device().cuda_stream(),
            gpu: Gpu::of(input.0.device())?,
            module: module(problem.name, dtype)?,
            dense: problem.term.declaration().dense,
            dtype,
            elements: input.1.shape().elem_count(),
            group: problem.group(input.1),
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

    fn params(&self, operands: &ElementOperands, variant: Variant, spans: &Spans) -> ElementParams {
        let smoothing = self.options.label_smoothing;
        let term = self.problem.term.declaration();
        let inputs = &operands.inputs;
        ElementParams {
            elements: self.elements as i64,
            span: spans.span as i64,
            smooth_scale: 1.0 - smoothing,
            smooth_shift: smoothing / 2.0,
            grad_scale: self.options.grad_scale,
            parameters: term.parameters,
            normalizer: match self.problem.form {
                LossForm::Scalar(Denominator::Value(value)) => value,
                LossForm::Scalar(Denominator::Counted) => (self.elements / self.group) as f64,
                LossForm::Each | LossForm::Scalar(Denominator::Tensor(_)) => 1.0,
            },
            term: term.number,
            counted: self.counts_mask(operands) as i32,
            target_dtype: inputs.target.tag as i32,
            mask_dtype: inputs.mask.as_ref().map_or(0, |mask| mask.tag as i32),
            unit_target: self.problem.unit_operands(operands.checked[1].0.dtype()).target as i32,
            small: (self.elements < wide_indices_from()) as i32,
            phase: match variant {
                Variant::Dense { phase } => phase,
                Variant::Any => 0,
            },
            upstream_each: 0,
            group: Divisor::new(self.group),
            contiguous: 0,
            axes: 0,
            size: [Divisor::default(); MAX_AXES],
            stride: [[0; MAX_AXES]; OPERANDS],
        }
        .walking(&operands.axes)
    }

    fn variant(&self, operands: &ElementOperands, writes: bool, upstream: Option<&InputView>) -> Variant {
        let address = |input: &InputView| input.bytes.device_ptr(&self.stream).0;
        Variant::choose(&Alignment {
            plain: self.dense.is_some() && operands.are_plain(),
            input_address: address(&operands.inputs.input),
            target_address: address(&operands.inputs.target),
            upstream_address: upstream.map(address),
            element_bytes: self.bytes(),
            writes,
        })
    }

    /// A launch of the term's own kernel for a dense variant, else of the one that all terms share.
    fn launch(&self, variant: Variant, own: fn(DenseKernels) -> &'static str, any: &'static str) -> Result<Launch<'_>> {
        let name = match (variant, self.dense) {
            (Variant::Dense { .. }, Some(kernels)) => own(kernels),
            _ => any,
        };
        Launch::new(self.gpu, &self.stream, self.module, name)
    }

    /// Counts the elements that the mask leaves: partial counts.
    fn count_mask(
        &self,
        operands: &ElementOperands,
        mask: &InputView,
        spans: &Spans,
        counts: CudaViewMut<u8>,
    ) -> Result<()> {
        let params = self.params(operands, Variant::Any, spans);
        let launch = Launch::new(self.gpu, &self.stream, &kernels::MASK, "count_mask")?;
        // SAFETY: the spans cover the mask's elements, and `losses` planned a count for each
        unsafe { CountMaskLaunch { mask, counts, params: &params }.launch(launch, spans.grid) }
    }

    /// The loss, and its denominator or the gradient.
    fn losses(&self, operands: &ElementOperands, with_grad: bool) -> Result<LossResults> {
        let elements = self.elements as u64;
        let none = self.problem.form.is_each();
        let rows = none && self.group > 1;
        let each = none && !rows;
        let variant = self.variant(operands, with_grad || each, None);
        let spans = match (rows, each) {
            (true, _) => Spans::rows(elements, self.group as u64, variant, self.bytes()),
            (_, true) => Spans::each(elements, variant, self.bytes()),
            _ => Spans::sum(elements, variant, self.bytes()),
        };
        let params = self.params(operands, variant, &spans);
        let mask = operands.inputs.mask.as_ref();
        let mut workspace = Workspace::default();
        if !with_grad {
            workspace.add(self.accumulator().size_in_bytes());
        }
        let counting = self.counts_mask(operands);
        // a gradient waits for a launch that counts the elements, unless each block does so by itself
        let counts = (counting && with_grad && !spans.count_themselves(elements)).then(|| {
            let spans = Spans::count(elements);
            MaskCounts { counts: workspace.add(spans.count as usize * size_of::<i64>()), spans }
        });
        let sums = if none { None } else { self.span_sums(&spans, counting, &mut workspace)? };

        let losses = if none { self.elements / self.group } else { 1 };
        // SAFETY: the kernels write all that is read
        let (mut loss, mut workspace, mut grad) = unsafe {
            (
                alloc(&self.device, self.accumulator(), losses)?,
                workspace.alloc(&self.device, self.accumulator())?,
                with_grad.then(|| alloc(&self.device, self.dtype, self.elements)).transpose()?,
            )
        };
        let mut memory = workspace.as_mut().map(output).transpose()?;
        if let (Some(mask), Some(MaskCounts { counts, spans }), Some(memory)) = (mask, &counts, &mut memory) {
            self.count_mask(operands, mask, spans, memory.slice_mut(*counts as usize..))?;
        }
        let to = output(&mut loss)?;
        let to = match (rows, each) {
            (true, _) => ElementLossOutput::Rows(to),
            (_, true) => ElementLossOutput::Each(to),
            _ => ElementLossOutput::Reduced { to, spans: sums },
        };
        let overlaps = counts.is_some();
        let launch = self.launch(variant, if with_grad { |own| own.fused } else { |own| own.loss }, "loss_any")?;
        let parameters = LossLaunch {
            operands: &operands.inputs,
            workspace: memory,
            counts,
            normalizer: operands.normalizer.as_ref(),
            loss: to,
            grad: grad.as_mut().map(output).transpose()?,
            params: &params,
        };
        let grid = Grid { overlaps: overlaps && self.gpu.clusters, ..spans.grid };
        // SAFETY: a kernel of losses, which waits for the counts; the spans cover the elements, which all operands have
        unsafe { parameters.launch(launch, grid) }?;
        let storage = |slice: Option<CudaStorageSlice>| slice.map(|slice| self.storage(slice));
        let denominator = if with_grad { None } else { storage(workspace) };
        Ok(LossResults { loss: self.storage(loss), denominator, grad: storage(grad) })
    }

    /// Whether the sum is divided by the number of elements that a mask leaves.
    fn counts_mask(&self, operands: &ElementOperands) -> bool {
        self.problem.form.is_counted() && operands.inputs.mask.is_some()
    }

    /// Where the sums of spans meet, if there are several.
    fn span_sums(&self, spans: &Spans, counting: bool, workspace: &mut Workspace) -> Result<Option<SpanSums>> {
        if spans.count <= 1 {
            return Ok(None);
        }
        let sums = workspace.add(spans.count as usize * (1 + counting as usize) * size_of::<f64>());
        Ok(Some(SpanSums { sums, ticket: self.gpu.ticket(&self.stream)? }))
    }

    /// As [`Self::losses`] for no elements, without a launch.
    fn empty(&self, input: &Layout) -> Result<LossResults> {
        let (value, denominator) = self.problem.form.of_nothing();
        let loss = vec![value; self.problem.loss_shape(input).elem_count()];
        Ok(LossResults {
            loss: constants(&self.device, self.accumulator(), &loss)?,
            denominator: Some(constants(&self.device, self.accumulator(), &[denominator])?),
            grad: Some(constants(&self.device, self.dtype, &[])?),
        })
    }

    /// The loss of any number of elements, checked if the options say so.
    fn evaluate(&self, input: Arg<CudaStorage>, target: Arg<CudaStorage>, with_grad: bool) -> Result<LossResults> {
        if self.elements == 0 {
            return self.empty(input.1);
        }
        let locked = self.problem.lock();
        let operands = ElementOperands::new(self.problem.name, input, target, &locked)?;
        if self.options.target_check && self.problem.unit_operands(target.0.dtype()).target {
            self.check(&operands)?;
        }
        self.losses(&operands, with_grad)
    }

    /// Looks for an element that is out of range and waits for the answer.
    fn check(&self, operands: &ElementOperands) -> Result<()> {
        let spans = Spans::each(self.elements as u64, Variant::Any, self.bytes());
        let params = self.params(operands, Variant::Any, &spans);
        let mut bad = self.device.clone_htod(&[u64::MAX])?;
        let launch = Launch::new(self.gpu, &self.stream, self.module, "check_any")?;
        let parameters = CheckLaunch { operands: &operands.inputs, bad: &mut bad, params: &params };
        // SAFETY: the spans cover the elements, which all operands have
        unsafe { parameters.launch(launch, spans.grid) }?;
        let at = match to_host(&self.device, &bad.as_view())?.first() {
            Some(&at) if at != u64::MAX => at as usize,
            _ => return Ok(()),
        };
        let value = |(storage, layout): Arg<CudaStorage>| -> Result<_> {
            Ok((read_element(storage, layout, at)?, storage.dtype()))
        };
        let [input, target] = operands.checked;
        Err(self.problem.out_of_range(at, value(input)?, value(target)?))
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
        match ElementCall::new(problem, input)?.evaluate(input, target, false)? {
            LossResults { loss, denominator: Some(denominator), .. } => Ok((loss, denominator)),
            _ => bail!("{}: no denominator", problem.name),
        }
    }

    fn backward(
        problem: &Elements,
        denominator: &Tensor,
        of: Argument,
        input: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        let call = ElementCall::new(problem, input)?;
        let (dtype, any) = match of {
            Argument::Input => (call.dtype, "grad_any"),
            Argument::Target => (call.accumulator(), "target_grad_any"),
        };
        if call.elements == 0 {
            return constants(&call.device, dtype, &[]);
        }
        let locked = call.problem.lock();
        let operands = ElementOperands::new(problem.name, input, target, &locked)?;
        let losses = (call.elements / call.group, arithmetic(call.dtype));
        let (upstream, upstream_each) = upstream_view(problem.name, losses, upstream)?;
        let variant = match of {
            Argument::Input if !(upstream_each && call.group > 1) => {
                call.variant(&operands, true, upstream_each.then_some(&upstream))
            }
            _ => Variant::Any,
        };
        let spans = Spans::each(call.elements as u64, variant, call.bytes());
        let params = ElementParams { upstream_each: upstream_each as i32, ..call.params(&operands, variant, &spans) };
        let denominator = Locked::new(denominator);
        let denominator = denominator.arg::<CudaStorage>(problem.name)?;

        // SAFETY: the kernel writes every element
        let mut grad = unsafe { alloc(&call.device, dtype, call.elements) }?;
        let launch = call.launch(variant, |own| own.grad, any)?;
        let parameters = GradLaunch {
            operands: &operands.inputs,
            upstream: &upstream,
            denominator: &InputView::new(denominator.0, denominator.1)?,
            grad: output(&mut grad)?,
            params: &params,
        };
        // SAFETY: a kernel of gradients; the spans cover the elements, which all operands have, and the upstream
        // gradient has one value or one for each group
        unsafe { parameters.launch(launch, spans.grid) }?;
        Ok(call.storage(grad))
    }

    fn loss_and_grad(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        match ElementCall::new(problem, input)?.evaluate(input, target, true)? {
            LossResults { loss, grad: Some(grad), .. } => Ok((loss, grad)),
            _ => bail!("{}: no gradient", problem.name),
        }
    }
}
