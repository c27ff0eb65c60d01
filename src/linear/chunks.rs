//! The work on chunks of rows: their logits, losses and gradients, the latter as sums over all rows.
//!
//! On CUDA a single chunk needs no sums. The gradient of its logits is kept, and the products with it are made when
//! their factor is known: written once, in the inputs' dtype.

use super::inputs::{Counted, Inputs, Policy, Selection, ones};
use super::matmul::{Update, product};
use super::problem::Linear;
use super::scale::{Factors, scaled, times_rows};
use crate::check::arithmetic;
#[cfg(feature = "cuda")]
use crate::cuda::launch::alloc;
#[cfg(feature = "cuda")]
use crate::custom_op::DeviceStorage;
use crate::reduction::LossForm;
use crate::rows::options::RowOptions;
use crate::softmax::problem::{CrossEntropy, RowStatistics, SoftmaxOptions};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Storage};
use candle_core::{DType, Result, Tensor};

/// Rows below which a product is mostly traffic.
const LEAST_ROWS: usize = 16;

/// Which gradients are asked for, and whether the statistics of the rows are.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub hidden: bool,
    pub weight: bool,
    pub bias: bool,
    pub statistics: bool,
}

impl Wanted {
    pub const NOTHING: Self = Wanted { hidden: false, weight: false, bias: false, statistics: false };

    pub fn gradients(&self) -> bool {
        self.hidden || self.weight || self.bias
    }
}

/// What the chunks leave.
pub(super) struct ChunkResults {
    /// Of the selected rows or of the chunks, if there are any.
    pub losses: Option<Tensor>,
    /// Of the selected rows of each chunk.
    pub statistics: Vec<RowStatistics>,
    pub gradients: Unfinished,
}

/// The gradients before they are multiplied by the upstream gradient over the denominator.
pub(super) enum Unfinished {
    /// Over all rows, in the arithmetic dtype. The upstream gradients of rows are in those of weight and bias.
    Sums(Gradients),
    /// The only chunk, whose logits their gradient has replaced.
    Chunk(Chunk),
}

/// What was asked for of the gradients, or of the sums that become them.
pub(super) struct Gradients {
    /// `(selected rows, D)`
    pub hidden: Option<Tensor>,
    /// `(V, D)`
    pub weight: Option<Tensor>,
    /// `(1, V)`
    pub bias: Option<Tensor>,
}

impl Gradients {
    /// Those that are wanted, each made from its shape.
    fn new(
        inputs: &Inputs,
        rows: usize,
        wanted: Wanted,
        of: impl Fn((usize, usize)) -> Result<Tensor>,
    ) -> Result<Self> {
        let (classes, features) = (inputs.classes(), inputs.features());
        Ok(Gradients {
            hidden: wanted.hidden.then(|| of((rows, features))).transpose()?,
            weight: wanted.weight.then(|| of((classes, features))).transpose()?,
            bias: wanted.bias.then(|| of((1, classes))).transpose()?,
        })
    }

    /// The sums times the factor, and the hidden states' times the upstream gradients of their rows, in `dtype`.
    pub fn scaled(self, factor: &Tensor, upstream: Option<&Tensor>, dtype: DType) -> Result<Self> {
        let of =
            |sum: Option<Tensor>, rows| sum.map(|sum| scaled(sum, Factors { all: factor, rows }, dtype)).transpose();
        Ok(Gradients { hidden: of(self.hidden, upstream)?, weight: of(self.weight, None)?, bias: of(self.bias, None)? })
    }
}

/// Memory for a matrix.
///
/// # Safety
/// It is not initialised: every element that is read was written before.
unsafe fn room(shape: (usize, usize), dtype: DType, like: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Storage::Cuda(CudaStorage { device, .. }) = &*like.storage_and_layout().0 {
        // SAFETY: by this function's contract
        let slice = unsafe { alloc(device, dtype, (shape.0 * shape.1).max(1))? };
        return Ok(CudaStorage { slice, device: device.clone() }.into_tensor(shape));
    }
    Tensor::zeros(shape, dtype, like.device())
}

/// What all chunks share.
struct Chunks<'a> {
    inputs: &'a Inputs,
    selection: &'a Selection,
    /// The loss of a chunk: the rows' losses or their sum.
    problem: CrossEntropy,
    /// `(1, V)`, in the working dtype.
    bias: Option<Tensor>,
    /// Room for the logits of a chunk, which their gradient replaces.
    logits: Tensor,
    ones: Tensor,
}

/// Some of the selected rows.
pub(super) struct Chunk {
    start: usize,
    rows: usize,
    /// `(rows, D)`, in the working dtype.
    hidden: Tensor,
    target: Tensor,
    /// `(rows, V)`
    logits: Tensor,
    /// `(rows)`
    ones: Tensor,
}

impl Chunk {
    /// Brings the gradient of the logits, which is in their place, to the inputs; an upstream gradient of each row is
    /// folded into what is summed over rows.
    fn bring_to(
        &self,
        inputs: &Inputs,
        to: &Gradients,
        upstream: Option<&Tensor>,
        (of_rows, summed): (Update, Update),
    ) -> Result<()> {
        let gradient = &self.logits;
        if let Some(to) = &to.hidden {
            for (class, classes) in inputs.tiles() {
                let update = if class > 0 { Update::Add } else { of_rows };
                product(to, &gradient.narrow(1, class, classes)?, &inputs.tile((class, classes))?, update)?;
            }
        }
        if let Some(to) = &to.weight {
            let hidden = match upstream {
                None => self.hidden.clone(),
                Some(upstream) => times_rows(&self.hidden, upstream)?,
            };
            product(to, &gradient.t()?, &hidden, summed)?;
        }
        if let Some(to) = &to.bias {
            let factors = match upstream {
                None => self.ones.clone(),
                Some(upstream) => upstream.to_dtype(inputs.policy.working)?,
            };
            product(to, &factors.unsqueeze(0)?, gradient, summed)?;
        }
        Ok(())
    }

    /// The gradients of the inputs from the only chunk.
    pub fn gradients(
        self,
        inputs: &Inputs,
        wanted: Wanted,
        factor: &Tensor,
        upstream: Option<&Tensor>,
    ) -> Result<Gradients> {
        let dtype = inputs.hidden.dtype();
        // upstream gradients of rows come to the rows of a sum
        let written = Wanted { hidden: wanted.hidden && upstream.is_none(), ..wanted };
        // SAFETY: the products below replace all of it, and don't read what they replace
        let of = |shape, dtype| unsafe { room(shape, dtype, &inputs.hidden) };
        let mut to = Gradients::new(inputs, self.rows, written, |shape| of(shape, dtype))?;
        let times = Update::ReplaceTimes(factor);
        if upstream.is_none() {
            self.bring_to(inputs, &to, upstream, (times, times))?;
            return Ok(to);
        }
        to.hidden = wanted.hidden.then(|| of((self.rows, inputs.features()), inputs.arithmetic())).transpose()?;
        self.bring_to(inputs, &to, upstream, (Update::Replace, times))?;
        let hidden = to.hidden.map(|sum| scaled(sum, Factors { all: factor, rows: upstream }, dtype)).transpose()?;
        Ok(Gradients { hidden, ..to })
    }
}

impl<'a> Chunks<'a> {
    fn new(linear: &Linear, inputs: &'a Inputs, selection: &'a Selection, step: usize) -> Result<Self> {
        let (working, options) = (inputs.policy.working, &linear.problem.options);
        let form = if linear.problem.form.is_each() { LossForm::Each } else { LossForm::SUM };
        let row_weight = options.rows.row_weight.as_ref().map(Tensor::flatten_all).transpose()?;
        let rows = RowOptions { row_weight, ..options.rows.of_sum() };
        // SAFETY: the first product replaces the logits of a chunk; nothing reads the gaps between the rows
        let logits = unsafe { room((step, inputs.policy.logits_stride(inputs.classes())), working, &inputs.hidden)? };
        Ok(Chunks {
            inputs,
            selection,
            problem: CrossEntropy {
                form,
                options: SoftmaxOptions { rows, ..options.clone() },
                ..linear.problem.clone()
            },
            bias: inputs.bias.as_ref().map(|bias| bias.to_dtype(working)).transpose()?,
            logits: logits.narrow(1, 0, inputs.classes())?,
            ones: ones(step, inputs)?,
        })
    }

    fn chunk(&self, start: usize, rows: usize) -> Result<Chunk> {
        Ok(Chunk {
            start,
            rows,
            hidden: self.selection.rows(&self.inputs.hidden, start, rows)?.to_dtype(self.inputs.policy.working)?,
            target: self.selection.rows(&self.inputs.target, start, rows)?,
            logits: self.logits.narrow(0, 0, rows)?,
            ones: self.ones.narrow(0, 0, rows)?,
        })
    }

    /// The loss of a chunk, with the weights of its rows.
    fn problem_of(&self, chunk: &Chunk) -> Result<CrossEntropy> {
        let mut problem = self.problem.clone();
        if let Some(weights) = &mut problem.options.rows.row_weight {
            *weights = self.selection.rows(weights, chunk.start, chunk.rows)?;
        }
        Ok(problem)
    }

    fn compute_logits(&self, chunk: &Chunk) -> Result<()> {
        let mut update = Update::Replace;
        if let Some(bias) = &self.bias {
            product(&chunk.logits, &chunk.ones.unsqueeze(1)?, bias, update)?;
            update = Update::Add;
        }
        for (class, classes) in self.inputs.tiles() {
            let weight = self.inputs.tile((class, classes))?;
            product(&chunk.logits.narrow(1, class, classes)?, &chunk.hidden, &weight.t()?, update)?;
        }
        Ok(())
    }

    /// Adds the gradients of a chunk to the sums.
    fn add_to(&self, sums: &Gradients, chunk: &Chunk, upstream: Option<&Tensor>) -> Result<()> {
        let hidden = sums.hidden.as_ref().map(|sum| sum.narrow(0, chunk.start, chunk.rows)).transpose()?;
        let to = Gradients { hidden, weight: sums.weight.clone(), bias: sums.bias.clone() };
        let upstream = upstream.map(|upstream| self.selection.rows(upstream, chunk.start, chunk.rows)).transpose()?;
        let summed = if chunk.start == 0 { Update::Replace } else { Update::Add };
        chunk.bring_to(self.inputs, &to, upstream.as_ref(), (Update::Replace, summed))
    }
}

/// As many rows as keep the logits within the device's budget, evenly.
///
/// 16-bit gradients of several chunks take sums in f32 beside them. So the logits of a single chunk, which needs no
/// sums, may take their bytes too; and those of one of several, for each of which the sums are read and written, as
/// many bytes as the weight's sum.
fn chunk_rows(policy: &Policy, (rows, features, classes): (usize, usize, usize), wanted: Wanted) -> usize {
    let of_row = policy.logits_stride(classes) * policy.working.size_in_bytes();
    let sums = arithmetic(policy.working);
    let sum = |rows: usize, wanted: bool| {
        if wanted && sums != policy.working { rows * features * sums.size_in_bytes() } else { 0 }
    };
    let (hidden, weight) = (sum(rows, wanted.hidden), sum(classes, wanted.weight));
    if rows * of_row <= policy.chunk_bytes + hidden + weight {
        return rows;
    }
    let most = (policy.chunk_bytes.max(weight) / of_row).max(LEAST_ROWS);
    rows.div_ceil(rows.div_ceil(most)).min(rows)
}

impl Linear {
    /// The rows of a chunk: what was asked for, or as many as the device's policy has.
    fn step(&self, inputs: &Inputs, rows: usize, wanted: Wanted) -> usize {
        match self.chunk_rows {
            Some(asked) => asked.min(rows),
            None => chunk_rows(&inputs.policy, (rows, inputs.features(), inputs.classes()), wanted),
        }
    }

    /// Whether the products with the gradient of the logits wait for their factor.
    pub(super) fn keeps_chunk(&self, inputs: &Inputs, rows: usize, wanted: Wanted) -> bool {
        inputs.policy.keeps_chunk && wanted.gradients() && rows > 0 && self.step(inputs, rows, wanted) == rows
    }

    /// The losses of the selected rows or of the chunks, and what is wanted beside them; `upstream` is a gradient `(N)`
    /// of each row.
    pub(super) fn run(
        &self,
        inputs: &Inputs,
        counted: &Counted,
        wanted: Wanted,
        upstream: Option<&Tensor>,
    ) -> Result<ChunkResults> {
        let (rows, arithmetic) = (counted.rows, inputs.arithmetic());
        if rows == 0 {
            let zeros = |shape| Tensor::zeros(shape, arithmetic, inputs.device());
            let gradients = Unfinished::Sums(Gradients::new(inputs, rows, wanted, zeros)?);
            return Ok(ChunkResults { losses: None, statistics: vec![], gradients });
        }
        let (step, keeps_chunk) = (self.step(inputs, rows, wanted), self.keeps_chunk(inputs, rows, wanted));
        let summed = if keeps_chunk { Wanted::NOTHING } else { wanted };
        // SAFETY: the products of the first chunk replace the sums of weight and bias, and those of each chunk its
        // hidden states' rows
        let sums = Gradients::new(inputs, rows, summed, |shape| unsafe { room(shape, arithmetic, &inputs.hidden) })?;
        let mut gradients = Unfinished::Sums(sums);
        let chunks = Chunks::new(self, inputs, &counted.selection, step)?;
        let (mut losses, mut statistics) = (Vec::with_capacity(rows.div_ceil(step)), vec![]);
        for start in (0..rows).step_by(step) {
            let chunk = chunks.chunk(start, step.min(rows - start))?;
            chunks.compute_logits(&chunk)?;
            let problem = chunks.problem_of(&chunk)?;
            let problem = || problem.clone();
            let mut loss = None;
            if wanted.statistics {
                let (of_chunk, rows) = problem().forward_with_statistics(&chunk.logits, &chunk.target)?;
                statistics.push(rows);
                loss = Some(of_chunk);
            }
            if wanted.gradients() {
                loss = Some(problem().loss_and_grad_inplace(&chunk.logits, &chunk.target)?);
            }
            losses.push(loss.map_or_else(|| problem().forward(&chunk.logits, &chunk.target), Ok)?);
            match &gradients {
                _ if keeps_chunk => gradients = Unfinished::Chunk(chunk),
                Unfinished::Sums(sums) => chunks.add_to(sums, &chunk, upstream)?,
                Unfinished::Chunk(_) => {}
            }
        }
        let losses = match self.problem.form {
            LossForm::Each => Tensor::cat(&losses, 0)?,
            LossForm::Scalar(_) => Tensor::stack(&losses, 0)?,
        };
        Ok(ChunkResults { losses: Some(losses), statistics, gradients })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Wanted = Wanted { hidden: true, weight: true, bias: false, statistics: false };

    #[test]
    fn a_chunk_is_as_large_as_the_sums_that_it_saves() {
        let frozen = Wanted { weight: false, ..ALL };
        for (dtype, rows, wanted, expected) in [
            // logits of 2.1 GB, and the sums too
            (DType::BF16, 8192, ALL, 8192),
            (DType::F16, 8192, ALL, 8192),
            (DType::BF16, 10_000, ALL, 10_000),
            // the logits of 2 D rows are as large as the weight's sum
            (DType::BF16, 16_384, ALL, 8192),
            (DType::BF16, 20_000, ALL, 6667),
            (DType::BF16, 8192, frozen, 2048),
            (DType::BF16, 8192, Wanted::NOTHING, 2048),
            // f32 sums become the gradients
            (DType::F32, 8192, ALL, 1024),
            (DType::F32, 1000, ALL, 1000),
            (DType::BF16, 0, ALL, 0),
        ] {
            let policy = Policy::on_gpu(dtype);
            assert_eq!(chunk_rows(&policy, (rows, 4096, 128_256), wanted), expected, "{dtype:?}, {rows}, on a GPU");
        }
        for dtype in [DType::BF16, DType::F32] {
            assert_eq!(chunk_rows(&Policy::on_cpu(dtype), (2048, 256, 32_000), ALL), 256, "{dtype:?}");
            assert_eq!(chunk_rows(&Policy::on_cpu(dtype), (100, 256, 10_000_000), ALL), 15, "{dtype:?}");
        }
    }

    #[test]
    fn rows_are_padded_where_products_gain() {
        let stride = |classes| Policy::on_gpu(DType::BF16).logits_stride(classes);
        assert_eq!([1, 33, 64, 65, 72, 1000, 1001, 50_257].map(stride), [1, 33, 64, 128, 72, 1000, 1024, 50_304]);
        assert_eq!(Policy::on_cpu(DType::BF16).logits_stride(50_257), 50_257);
    }
}
