//! Cross-entropy of the logits `hidden weightᵀ + bias`, of which one chunk of rows exists at a time.
//!
//! A chunk's logits are a product in one buffer, the kernel turns them into their gradient in place, and two more products
//! bring that gradient to the inputs: 6NDV operations, the same as with all logits at once. So the gradients are made in
//! the forward, as sums that know neither the upstream gradient nor the mean's denominator; both are one factor of the sums
//! in the end, which is also why 16-bit gradients of a mean over many rows don't vanish. With [`Reduction::None`] the
//! upstream gradient is different in each row, and the backward computes the logits once more (8NDV).
//!
//! Sums are kept in the arithmetic dtype and rounded once. On the CPU the logits have it too, because 16-bit products run
//! in f32 there anyway; on CUDA they have the inputs' dtype, for the tensor cores.

use super::composed;
use super::matmul::product;
use super::problem::{Linear, LinearGradients};
use crate::check::arithmetic;
use crate::custom_op::has_kernels;
use crate::nll::problem::Nll;
use crate::reduction::Reduction;
use crate::row_options::RowOptions;
use crate::rows::contiguous_indices;
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Bytes of logits at a time where nothing else is asked for. On the CPU they stay near the last-level cache, and are rows
/// enough for the products; on CUDA the products need more rows than that.
const CPU_CHUNK: usize = 32 << 20;
const CUDA_CHUNK: usize = 512 << 20;
/// Bytes of a 16-bit weight that are widened at a time, on the CPU.
const TILE: usize = 2 << 20;
/// Bytes of a sum that are rounded to 16 bits at a time.
const PIECE: usize = 32 << 20;
/// Rows below which a product is mostly traffic, and classes likewise.
const LEAST_ROWS: usize = 16;
const LEAST_CLASSES: usize = 64;

/// The gradients that were asked for.
struct Gradients {
    hidden: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

/// Which gradients are asked for.
#[derive(Clone, Copy)]
struct Wanted {
    hidden: bool,
    weight: bool,
    bias: bool,
}

impl Wanted {
    const NOTHING: Self = Wanted { hidden: false, weight: false, bias: false };

    fn something(&self) -> bool {
        self.hidden || self.weight || self.bias
    }
}

/// The inputs as matrices, without a graph.
struct Inputs {
    /// `(N, D)`
    hidden: Tensor,
    /// `(V, D)`
    weight: Tensor,
    /// `(1, V)`
    bias: Option<Tensor>,
    /// `(N)`
    target: Tensor,
}

impl Inputs {
    fn new(hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Self> {
        let (classes, features) = weight.dims2()?;
        let target = contiguous_indices(&target.detach())?.flatten_all()?;
        Ok(Inputs {
            hidden: hidden.detach().reshape((target.elem_count(), features))?,
            weight: as_operand(weight.detach())?,
            bias: bias.map(|bias| bias.detach().reshape((1, classes))).transpose()?,
            // the CPU picks rows from it
            target: if target.device().is_cpu() { target.to_dtype(DType::I64)? } else { target },
        })
    }

    fn device(&self) -> &Device {
        self.hidden.device()
    }

    fn features(&self) -> usize {
        self.weight.dims()[1]
    }

    fn classes(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The dtype of the sums.
    fn arithmetic(&self) -> DType {
        arithmetic(self.hidden.dtype())
    }

    /// The dtype of the logits and of their gradient.
    fn working(&self) -> DType {
        if self.device().is_cuda() { self.hidden.dtype() } else { self.arithmetic() }
    }

    /// The weight in pieces that are cheap to widen to the working dtype: the first class and the number of them.
    fn tiles(&self) -> Vec<(usize, usize)> {
        let (classes, working) = (self.classes(), self.working());
        if self.weight.dtype() == working {
            return vec![(0, classes)];
        }
        let step = (TILE / (self.features() * working.size_in_bytes())).max(LEAST_CLASSES);
        (0..classes).step_by(step).map(|start| (start, step.min(classes - start))).collect()
    }

    fn tile(&self, (start, len): (usize, usize)) -> Result<Tensor> {
        self.weight.narrow(0, start, len)?.to_dtype(self.working())
    }
}

/// The matrix itself where a product takes it, else a contiguous copy.
fn as_operand(matrix: Tensor) -> Result<Tensor> {
    let ((rows, columns), strides) = (matrix.dims2()?, matrix.stride());
    let whole = |inner: usize, outer: usize, size: usize| inner == 1 && outer >= size;
    if whole(strides[1], strides[0], columns) || whole(strides[0], strides[1], rows) {
        Ok(matrix)
    } else {
        matrix.contiguous()
    }
}

/// The rows that are worked on. An ignored row must not come near a product: 0 times the NaN in it would be NaN.
enum Selection {
    All,
    /// The rows that count, on the CPU: what is ignored costs nothing.
    Rows(Tensor),
    /// `(N, 1)`: 1 where the row counts, on CUDA, where the number of rows can't depend on the target without waiting for
    /// the device. What is ignored is worked on as zeros.
    Mask(Tensor),
}

impl Selection {
    /// Some of the selected rows of a matrix or a vector.
    fn rows(&self, of: &Tensor, start: usize, len: usize) -> Result<Tensor> {
        match self {
            Selection::Rows(rows) => of.index_select(&rows.narrow(0, start, len)?, 0),
            Selection::All => of.narrow(0, start, len),
            Selection::Mask(mask) if of.rank() == 2 => {
                let of = of.narrow(0, start, len)?;
                mask.narrow(0, start, len)?.broadcast_as(of.shape())?.where_cond(&of, &of.zeros_like()?)
            }
            Selection::Mask(_) => of.narrow(0, start, len),
        }
    }

    /// All rows again, zeros where they don't count.
    fn spread(&self, selected: Tensor, count: usize) -> Result<Tensor> {
        let Selection::Rows(rows) = self else { return Ok(selected) };
        let mut dims = selected.dims().to_vec();
        dims[0] = count;
        let zeros = Tensor::zeros(dims, selected.dtype(), selected.device())?;
        if rows.elem_count() == 0 { Ok(zeros) } else { zeros.index_add(rows, &selected, 0) }
    }
}

/// What the targets alone decide.
struct Counted {
    selection: Selection,
    /// Selected rows.
    rows: usize,
    /// What the sum is divided by: a scalar, f64.
    denominator: Tensor,
    /// Whether any row counts: a scalar, u8.
    some: Tensor,
}

/// The sums over the rows, in the arithmetic dtype.
struct Sums {
    /// `(selected rows, D)`
    hidden: Option<Tensor>,
    /// `(V, D)`
    weight: Option<Tensor>,
    /// `(1, V)`
    bias: Option<Tensor>,
}

impl Sums {
    fn new(inputs: &Inputs, rows: usize, wanted: Wanted) -> Result<Self> {
        let zeros = |wanted: bool, rows: usize, columns: usize| {
            wanted.then(|| Tensor::zeros((rows, columns), inputs.arithmetic(), inputs.device())).transpose()
        };
        Ok(Sums {
            hidden: zeros(wanted.hidden, rows, inputs.features())?,
            weight: zeros(wanted.weight, inputs.classes(), inputs.features())?,
            bias: zeros(wanted.bias, 1, inputs.classes())?,
        })
    }
}

/// The upstream gradient.
enum Upstream<'a> {
    /// Of a reduced loss: a scalar.
    Scalar(&'a Tensor),
    /// Of each row `(N)`, in the arithmetic dtype, and a scalar that belongs to all of them.
    Rows(&'a Tensor, &'a Tensor),
}

/// The upstream gradient of the rows as numbers that f16 can hold, and their common factor.
fn normalised(upstream: Tensor, dtype: DType) -> Result<(Tensor, Tensor)> {
    let one = scalar(1.0, upstream.device())?.to_dtype(upstream.dtype())?;
    if dtype != DType::F16 || upstream.elem_count() == 0 {
        return Ok((upstream, one));
    }
    let peak = upstream.abs()?.max(0)?;
    let factor = peak.ne(0f64)?.where_cond(&peak, &one)?;
    Ok((upstream.broadcast_div(&factor)?, factor))
}

/// Rounds `sum * factor` to a dtype; the factor is a scalar tensor.
fn rounded(sum: &Tensor, factor: &Tensor, dtype: DType) -> Result<Tensor> {
    if sum.dtype() == dtype || sum.elem_count() == 0 {
        return scaled(sum, factor)?.to_dtype(dtype);
    }
    // in pieces, so that the sum is not there twice
    let result = Tensor::zeros(sum.shape(), dtype, sum.device())?;
    let rows = sum.dim(0)?;
    let step = (PIECE / (sum.elem_count() / rows * sum.dtype().size_in_bytes())).max(1);
    for start in (0..rows).step_by(step) {
        let piece = scaled(&sum.narrow(0, start, step.min(rows - start))?, factor)?.to_dtype(dtype)?;
        result.slice_set(&piece, 0, start)?;
    }
    Ok(result)
}

fn scaled(sum: &Tensor, factor: &Tensor) -> Result<Tensor> {
    if !sum.device().is_cpu() {
        return sum.broadcast_mul(&factor.to_dtype(sum.dtype())?);
    }
    // nothing to wait for, and candle's broadcasts are slow
    match factor.to_dtype(DType::F64)?.to_scalar::<f64>()? {
        1.0 => Ok(sum.clone()),
        factor => sum * factor,
    }
}

fn ones(shape: impl Into<Shape>, inputs: &Inputs) -> Result<Tensor> {
    Tensor::ones(shape, inputs.working(), inputs.device())
}

fn scalar(value: f64, device: &Device) -> Result<Tensor> {
    // not copied from the host
    Tensor::full(value, (), device)
}

impl Linear {
    fn is_composed(&self, hidden: &Tensor) -> bool {
        !self.problem.options.rows.fused || !has_kernels(hidden.device())
    }

    /// The loss, with autograd.
    pub fn forward(self, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Tensor> {
        if self.is_composed(hidden) {
            return composed::loss(&self, hidden, weight, bias, target);
        }
        let inputs = Inputs::new(hidden, weight, bias, target)?;
        let wanted = Wanted {
            hidden: hidden.track_op(),
            weight: weight.track_op(),
            bias: bias.is_some_and(|bias| bias.track_op()),
        };
        let counted = self.counted(&inputs)?;
        let in_forward = match self.problem.options.rows.reduction {
            Reduction::None => Wanted::NOTHING,
            Reduction::Mean | Reduction::Sum => wanted,
        };
        let (loss, sums) = self.run(&inputs, &counted, in_forward, None)?;
        let loss = self.reduced(&inputs, &counted, loss)?.reshape(self.loss_shape(target))?;
        if !wanted.something() {
            return Ok(loss);
        }
        let attached = Attached {
            name: self.problem.name,
            linear: self,
            target: target.detach(),
            counted,
            wanted,
            has_bias: bias.is_some(),
            loss: OnceLock::from(loss),
            saved: Mutex::new(in_forward.something().then_some(sums)),
        };
        match bias {
            Some(bias) => hidden.apply_op3(weight, bias, attached),
            // a third argument without a gradient
            None => hidden.apply_op3(weight, &inputs.target, attached),
        }
    }

    /// The loss and its gradients for an upstream gradient of ones, without a graph.
    pub fn loss_and_grad(
        self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<(Tensor, LinearGradients)> {
        if self.is_composed(hidden) {
            return composed::loss_and_grad(&self, hidden, weight, bias, target);
        }
        let inputs = Inputs::new(hidden, weight, bias, target)?;
        let wanted = Wanted { hidden: true, weight: true, bias: bias.is_some() };
        let counted = self.counted(&inputs)?;
        let (loss, sums) = self.run(&inputs, &counted, wanted, None)?;
        let loss = self.reduced(&inputs, &counted, loss)?.reshape(self.loss_shape(target))?;
        let one = scalar(1.0, inputs.device())?;
        let gradients = self.gradients(&inputs, &counted, sums, Upstream::Scalar(&one), hidden.shape())?;
        let missing = || Error::msg("a gradient that was asked for is missing");
        let hidden = gradients.hidden.ok_or_else(missing)?;
        let weight = gradients.weight.ok_or_else(missing)?;
        Ok((loss, LinearGradients { hidden, weight, bias: gradients.bias }))
    }

    fn loss_shape(&self, target: &Tensor) -> Shape {
        match self.problem.options.rows.reduction {
            Reduction::None => target.shape().clone(),
            Reduction::Mean | Reduction::Sum => Shape::from(()),
        }
    }

    /// The weight of each row with class weights, else 1; 0 where it is ignored. On the CPU this is where a class out of
    /// range is found; on CUDA it is NaN, or found if that was asked for.
    ///
    /// It is the NLL of log-probabilities that are all -1, and these take no memory.
    fn row_weights(&self, inputs: &Inputs, weight: Option<Tensor>) -> Result<Tensor> {
        let rows = inputs.target.elem_count();
        let minus_one = scalar(-1.0, inputs.device())?.to_dtype(inputs.arithmetic())?;
        let options =
            RowOptions { weight, reduction: Reduction::None, normalizer: None, ..self.problem.options.rows.clone() };
        let nll = Nll { name: self.problem.name, axis: 1, options };
        let weights = nll.forward(&minus_one.broadcast_as((rows, inputs.classes()))?, &inputs.target)?;
        // a bad row is NaN in itself, not in what it shares with others
        let numbers = weights.eq(&weights)?;
        if inputs.device().is_cpu() { Ok(weights) } else { numbers.where_cond(&weights, &weights.zeros_like()?) }
    }

    fn counted(&self, inputs: &Inputs) -> Result<Counted> {
        let (device, all) = (inputs.device(), inputs.target.elem_count());
        if all == 0 {
            let denominator = match (self.problem.options.rows.reduction, self.problem.options.rows.normalizer) {
                (Reduction::Mean, Some(normalizer)) => normalizer,
                (Reduction::Mean, None) => 0.0,
                (Reduction::None | Reduction::Sum, _) => 1.0,
            };
            return Ok(Counted {
                selection: Selection::All,
                rows: 0,
                denominator: scalar(denominator, device)?,
                some: Tensor::zeros((), DType::U8, device)?,
            });
        }
        let ones = self.row_weights(inputs, None)?;
        let count = ones.to_dtype(DType::F64)?.sum_all()?;
        let denominator = match (
            self.problem.options.rows.reduction,
            self.problem.options.rows.normalizer,
            &self.problem.options.rows.weight,
        ) {
            (Reduction::Mean, Some(normalizer), _) => scalar(normalizer, device)?,
            (Reduction::Mean, None, None) => count.clone(),
            (Reduction::Mean, None, Some(weight)) => {
                self.row_weights(inputs, Some(weight.clone()))?.to_dtype(DType::F64)?.sum_all()?
            }
            (Reduction::None | Reduction::Sum, _, _) => scalar(1.0, device)?,
        };
        let some = count.ne(0f64)?;
        let (selection, rows) = if !device.is_cpu() {
            (Selection::Mask(ones.ne(0f64)?.unsqueeze(1)?), all)
        } else {
            let rows: Vec<u32> = (0u32..)
                .zip(ones.to_dtype(DType::F64)?.to_vec1::<f64>()?)
                .filter_map(|(row, w)| (w != 0.0).then_some(row))
                .collect();
            match rows.len() {
                len if len == all => (Selection::All, all),
                len => (Selection::Rows(Tensor::from_vec(rows, len, device)?), len),
            }
        };
        Ok(Counted { selection, rows, denominator, some })
    }

    /// The rows of a chunk: what was asked for, or as many as keep the logits within the device's budget, evenly.
    fn chunk_rows(&self, inputs: &Inputs, rows: usize) -> usize {
        if let Some(asked) = self.chunk_rows {
            return asked;
        }
        let budget = if inputs.device().is_cuda() { CUDA_CHUNK } else { CPU_CHUNK };
        let most = (budget / (inputs.classes() * inputs.working().size_in_bytes())).max(LEAST_ROWS);
        rows.div_ceil(rows.div_ceil(most).max(1))
    }

    /// The losses of the selected rows or of the chunks, and the wanted sums. With an upstream gradient `(N)` for each row,
    /// that is folded into what is summed over rows.
    fn run(
        &self,
        inputs: &Inputs,
        counted: &Counted,
        wanted: Wanted,
        upstream: Option<&Tensor>,
    ) -> Result<(Option<Tensor>, Sums)> {
        let (features, classes, working) = (inputs.features(), inputs.classes(), inputs.working());
        let Counted { selection, rows, .. } = counted;
        let sums = Sums::new(inputs, *rows, wanted)?;
        if *rows == 0 {
            return Ok((None, sums));
        }
        let options = &self.problem.options;
        let rows_options = RowOptions {
            reduction: if options.rows.reduction == Reduction::None { Reduction::None } else { Reduction::Sum },
            normalizer: None,
            target_check: false,
            ..options.rows.clone()
        };
        let chunk =
            CrossEntropy { options: SoftmaxOptions { rows: rows_options, ..options.clone() }, ..self.problem.clone() };
        let step = self.chunk_rows(inputs, *rows).min(*rows);
        let tiles = inputs.tiles();
        let bias = inputs.bias.as_ref().map(|bias| bias.to_dtype(working)).transpose()?;
        let buffer = Tensor::zeros((step, classes), working, inputs.device())?;
        let ones = ones(step, inputs)?;
        let mut losses = Vec::with_capacity(rows.div_ceil(step));
        for start in (0..*rows).step_by(step) {
            let (len, first) = (step.min(rows - start), start == 0);
            let hidden = selection.rows(&inputs.hidden, start, len)?.to_dtype(working)?;
            let target = selection.rows(&inputs.target, start, len)?;
            let logits = buffer.narrow(0, 0, len)?;
            let ones = ones.narrow(0, 0, len)?;
            if let Some(bias) = &bias {
                product(&logits, &ones.unsqueeze(1)?, bias, false)?;
            }
            for &(class, len) in &tiles {
                let weight = inputs.tile((class, len))?;
                product(&logits.narrow(1, class, len)?, &hidden, &weight.t()?, bias.is_some())?;
            }
            if !wanted.something() {
                losses.push(chunk.clone().forward(&logits, &target)?);
                continue;
            }
            losses.push(chunk.clone().loss_and_grad_inplace(&logits, &target)?);
            let gradient = logits;
            if let Some(sum) = &sums.hidden {
                let sum = sum.narrow(0, start, len)?;
                for &(class, len) in &tiles {
                    product(&sum, &gradient.narrow(1, class, len)?, &inputs.tile((class, len))?, class > 0)?;
                }
            }
            let upstream = match upstream {
                Some(upstream) => Some(selection.rows(upstream, start, len)?),
                None => None,
            };
            if let Some(sum) = &sums.weight {
                let hidden = match &upstream {
                    Some(upstream) => {
                        let upstream = upstream.unsqueeze(1)?.broadcast_as((len, features))?;
                        (hidden.to_dtype(inputs.arithmetic())? * upstream)?.to_dtype(working)?
                    }
                    None => hidden,
                };
                product(sum, &gradient.t()?, &hidden, !first)?;
            }
            if let Some(sum) = &sums.bias {
                let factors = match upstream {
                    Some(upstream) => upstream.to_dtype(working)?,
                    None => ones,
                };
                product(sum, &factors.unsqueeze(0)?, &gradient, !first)?;
            }
        }
        let losses = match self.problem.options.rows.reduction {
            Reduction::None => Tensor::cat(&losses, 0)?,
            Reduction::Mean | Reduction::Sum => Tensor::stack(&losses, 0)?,
        };
        Ok((Some(losses), sums))
    }

    /// The loss as it is returned, but flat.
    fn reduced(&self, inputs: &Inputs, counted: &Counted, losses: Option<Tensor>) -> Result<Tensor> {
        let all = inputs.target.elem_count();
        let dtype = inputs.arithmetic();
        match (self.problem.options.rows.reduction, losses) {
            (Reduction::None, None) => Tensor::zeros(all, dtype, inputs.device()),
            (Reduction::None, Some(losses)) => counted.selection.spread(losses, all),
            (Reduction::Mean | Reduction::Sum, losses) => {
                let sum = match losses {
                    Some(losses) => losses.to_dtype(DType::F64)?.sum_all()?,
                    None => scalar(0.0, inputs.device())?,
                };
                (sum / &counted.denominator)?.to_dtype(dtype)
            }
        }
    }

    /// The gradients from the sums.
    fn gradients(
        &self,
        inputs: &Inputs,
        counted: &Counted,
        sums: Sums,
        upstream: Upstream,
        hidden_shape: &Shape,
    ) -> Result<Gradients> {
        let dtype = inputs.hidden.dtype();
        let factor = match upstream {
            Upstream::Scalar(upstream) => {
                let factor = (upstream.to_dtype(DType::F64)? / &counted.denominator)?;
                // where no row counts the denominator is 0 and the gradients are 0
                counted.some.where_cond(&factor, &factor.zeros_like()?)?
            }
            Upstream::Rows(_, factor) => factor.clone(),
        };
        let hidden = match (sums.hidden, upstream) {
            (None, _) => None,
            (Some(sum), Upstream::Rows(..)) if counted.rows == 0 => Some(sum),
            (Some(sum), Upstream::Rows(upstream, _)) => {
                let upstream = counted.selection.rows(upstream, 0, counted.rows)?;
                Some((&sum * upstream.unsqueeze(1)?.broadcast_as(sum.shape())?)?)
            }
            (Some(sum), Upstream::Scalar(_)) => Some(sum),
        };
        let hidden = hidden.map(|sum| -> Result<Tensor> {
            let gradient = rounded(&sum, &factor, dtype)?;
            counted.selection.spread(gradient, inputs.target.elem_count())?.reshape(hidden_shape)
        });
        Ok(Gradients {
            hidden: hidden.transpose()?,
            weight: sums.weight.map(|sum| rounded(&sum, &factor, dtype)).transpose()?,
            bias: sums.bias.map(|sum| rounded(&sum.squeeze(0)?, &factor, dtype)).transpose()?,
        })
    }
}

/// Ties a loss that was computed already to the inputs it came from.
struct Attached {
    name: &'static str,
    linear: Linear,
    target: Tensor,
    counted: Counted,
    wanted: Wanted,
    has_bias: bool,
    loss: OnceLock<Tensor>,
    /// The sums from the forward, for the first backward. A second one computes them again: keeping them would cost as much
    /// memory as the weight's gradient itself.
    saved: Mutex<Option<Sums>>,
}

impl Attached {
    fn loss(&self) -> Result<&Tensor> {
        self.loss.get().ok_or_else(|| Error::msg("a loss without a value"))
    }
}

impl CustomOp3 for Attached {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let loss = self.loss()?;
        match &*loss.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok((storage.clone(), loss.shape().clone())),
            _ => Err(Error::msg("a loss on another device than its inputs")),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let loss = self.loss()?;
        let (storage, layout) = loss.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, loss.shape().clone())),
            _ => Err(Error::msg("a loss on another device than its inputs")),
        }
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let inputs = Inputs::new(hidden, weight, self.has_bias.then_some(bias), &self.target)?;
        let linear = &self.linear;
        let compute = |upstream| linear.run(&inputs, &self.counted, self.wanted, upstream).map(|(_, sums)| sums);
        let gradients = match linear.problem.options.rows.reduction {
            Reduction::Mean | Reduction::Sum => {
                let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).take();
                let sums = saved.map_or_else(|| compute(None), Ok)?;
                linear.gradients(&inputs, &self.counted, sums, Upstream::Scalar(upstream), hidden.shape())?
            }
            Reduction::None => {
                let upstream = upstream.flatten_all()?.contiguous()?;
                let (upstream, factor) = normalised(upstream, hidden.dtype())?;
                let sums = compute(Some(&upstream))?;
                linear.gradients(&inputs, &self.counted, sums, Upstream::Rows(&upstream, &factor), hidden.shape())?
            }
        };
        Ok((gradients.hidden, gradients.weight, gradients.bias))
    }
}
