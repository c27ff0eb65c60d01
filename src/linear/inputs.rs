//! The inputs of linear cross-entropy as matrices, and the rows of them that count.

use super::problem::Linear;
use super::scale::masked;
use crate::check::arithmetic;
use crate::nll::problem::Nll;
use crate::reduction::{Denominator, LossForm};
use crate::rows::layout::contiguous_indices;
use crate::rows::options::RowOptions;
use crate::softmax::problem::CrossEntropy;
use candle_core::{DType, Device, Result, Shape, Tensor};

/// Bytes of a 16-bit weight that are widened at a time, on the CPU.
const TILE: usize = 2 << 20;
/// Classes below which a product is mostly traffic.
const LEAST_CLASSES: usize = 64;

/// Rows of a multiple of so many logits are aligned for cuBLAS, whatever their dtype.
const ALIGNED: usize = 8;
/// The most logits of a row that gets no gap behind it.
const SHORT_ROW: usize = 64;

/// What the work depends on the device for.
pub(super) struct Policy {
    /// The dtype of the logits and of their gradient. On the CPU it is that of the sums, because 16-bit products run in
    /// f32 there anyway; on CUDA the inputs', for the tensor cores.
    pub working: DType,
    /// Bytes of logits at a time where nothing else is asked for. On the CPU they stay near the last-level cache, and
    /// are rows enough for the products; on CUDA the products need more rows than that.
    pub chunk_bytes: usize,
    /// Of how many logits the rows are a multiple, gaps included. On CUDA all rows begin on a cache line: cuBLAS has
    /// its fast kernels for matrices whose rows begin on 16 bytes.
    pub row_unit: usize,
    /// Whether the gradient of the logits of a single chunk waits for the backward. On CUDA its products then write the
    /// gradients, from a weight that needs no tiles. On the CPU the chunk is in the cache in the forward.
    pub keeps_chunk: bool,
    /// Whether the host knows which rows count. On CUDA it would have to wait for the device.
    pub host_knows: bool,
}

impl Policy {
    pub fn on_cpu(dtype: DType) -> Self {
        let working = arithmetic(dtype);
        Policy { working, chunk_bytes: 32 << 20, row_unit: 1, keeps_chunk: false, host_knows: true }
    }

    pub fn on_gpu(dtype: DType) -> Self {
        Policy { working: dtype, chunk_bytes: 512 << 20, row_unit: 64, keeps_chunk: true, host_knows: false }
    }

    /// How far apart the rows of logits are.
    pub fn logits_stride(&self, classes: usize) -> usize {
        // short rows stay next to each other, so that the kernels take them in tiles
        match classes <= SHORT_ROW || classes.is_multiple_of(ALIGNED) {
            true => classes,
            false => classes.next_multiple_of(self.row_unit),
        }
    }
}

/// The inputs as matrices, without a graph.
pub(super) struct Inputs {
    /// `(N, D)`
    pub hidden: Tensor,
    /// `(V, D)`
    pub weight: Tensor,
    /// `(1, V)`
    pub bias: Option<Tensor>,
    /// `(N)`
    pub target: Tensor,
    pub policy: Policy,
}

impl Inputs {
    pub fn new(hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor) -> Result<Self> {
        let (classes, features) = weight.dims2()?;
        let target = contiguous_indices(&target.detach())?.flatten_all()?;
        let policy = if hidden.device().is_cpu() { Policy::on_cpu } else { Policy::on_gpu };
        let policy = policy(hidden.dtype());
        Ok(Inputs {
            hidden: hidden.detach().reshape((target.elem_count(), features))?,
            weight: as_operand(weight.detach())?,
            bias: bias.map(|bias| bias.detach().reshape((1, classes))).transpose()?,
            // the host picks rows from it
            target: if policy.host_knows { target.to_dtype(DType::I64)? } else { target },
            policy,
        })
    }

    pub fn device(&self) -> &Device {
        self.hidden.device()
    }

    pub fn rows(&self) -> usize {
        self.target.elem_count()
    }

    pub fn features(&self) -> usize {
        self.weight.dims()[1]
    }

    pub fn classes(&self) -> usize {
        self.weight.dims()[0]
    }

    /// The dtype of the sums.
    pub fn arithmetic(&self) -> DType {
        arithmetic(self.hidden.dtype())
    }

    /// The weight in pieces that are cheap to widen to the working dtype: the first class and the number of them.
    pub fn tiles(&self) -> Vec<(usize, usize)> {
        let (classes, working) = (self.classes(), self.policy.working);
        if self.weight.dtype() == working {
            return vec![(0, classes)];
        }
        let step = (TILE / (self.features() * working.size_in_bytes())).max(LEAST_CLASSES);
        (0..classes).step_by(step).map(|start| (start, step.min(classes - start))).collect()
    }

    pub fn tile(&self, (start, len): (usize, usize)) -> Result<Tensor> {
        self.weight.narrow(0, start, len)?.to_dtype(self.policy.working)
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
pub(super) enum Selection {
    All,
    /// The rows that count, where the host knows them: ignored rows cost nothing.
    Rows(Tensor),
    /// `(N, 1)`: 1 where the row counts, where the host doesn't know. Ignored rows are worked on as zeros.
    Mask(Tensor),
}

impl Selection {
    /// Some of the selected rows of a matrix or a vector.
    pub fn rows(&self, of: &Tensor, start: usize, len: usize) -> Result<Tensor> {
        match self {
            Selection::Rows(rows) => of.index_select(&rows.narrow(0, start, len)?, 0),
            Selection::All => of.narrow(0, start, len),
            Selection::Mask(mask) if of.rank() == 2 => masked(&of.narrow(0, start, len)?, &mask.narrow(0, start, len)?),
            Selection::Mask(_) => of.narrow(0, start, len),
        }
    }

    /// As [`Self::spread`] where ignored rows that were worked on are to be zeros too.
    pub fn spread_counted(&self, selected: Tensor, count: usize) -> Result<Tensor> {
        let Selection::Mask(mask) = self else { return self.spread(selected, count) };
        mask.squeeze(1)?.where_cond(&selected, &selected.zeros_like()?)
    }

    /// All rows again, zeros where they don't count.
    pub fn spread(&self, selected: Tensor, count: usize) -> Result<Tensor> {
        let Selection::Rows(rows) = self else { return Ok(selected) };
        let mut dims = selected.dims().to_vec();
        dims[0] = count;
        let zeros = Tensor::zeros(dims, selected.dtype(), selected.device())?;
        if rows.elem_count() == 0 { Ok(zeros) } else { zeros.index_add(rows, &selected, 0) }
    }
}

/// What the targets alone decide.
pub(super) struct Counted {
    pub selection: Selection,
    /// Selected rows.
    pub rows: usize,
    /// What the sum is divided by: a scalar, f64.
    pub denominator: Tensor,
}

impl Counted {
    pub fn new(linear: &Linear, inputs: &Inputs) -> Result<Self> {
        let (device, all) = (inputs.device(), inputs.rows());
        let CrossEntropy { options, form, .. } = &linear.problem;
        if all == 0 {
            return Ok(Counted {
                selection: Selection::All,
                rows: 0,
                denominator: scalar(form.of_nothing().1, device)?,
            });
        }
        let ones = row_weights(linear, inputs, None)?;
        let denominator = match (form, &options.rows.weight) {
            (LossForm::Each, _) => scalar(1.0, device)?,
            (LossForm::Scalar(Denominator::Value(value)), _) => scalar(*value, device)?,
            (LossForm::Scalar(Denominator::Tensor(tensor)), _) => tensor.clone(),
            (LossForm::Scalar(Denominator::Counted), None) => ones.to_dtype(DType::F64)?.sum_all()?,
            (LossForm::Scalar(Denominator::Counted), Some(weight)) => {
                row_weights(linear, inputs, Some(weight.clone()))?.to_dtype(DType::F64)?.sum_all()?
            }
        };
        if !inputs.policy.host_knows {
            let selection = Selection::Mask(ones.ne(0f64)?.unsqueeze(1)?);
            return Ok(Counted { selection, rows: all, denominator });
        }
        let rows: Vec<u32> = (0u32..)
            .zip(ones.to_dtype(DType::F64)?.to_vec1::<f64>()?)
            .filter_map(|(row, w)| (w != 0.0).then_some(row))
            .collect();
        let (selection, rows) = match rows.len() {
            len if len == all => (Selection::All, all),
            len => (Selection::Rows(Tensor::from_vec(rows, len, device)?), len),
        };
        Ok(Counted { selection, rows, denominator })
    }
}

/// The weight of each row with these class weights, else of 1; 0 where it is ignored. On the CPU this is where a class
/// out of range is found; on CUDA it is NaN, or found if that was asked for.
///
/// It is the NLL of log-probabilities that are all -1, and these take no memory.
fn row_weights(linear: &Linear, inputs: &Inputs, weight: Option<Tensor>) -> Result<Tensor> {
    let minus_one = scalar(-1.0, inputs.device())?.to_dtype(inputs.arithmetic())?;
    let minus_ones = minus_one.broadcast_as((inputs.rows(), inputs.classes()))?;
    let rows = &linear.problem.options.rows;
    let row_weight = rows.row_weight.as_ref().map(Tensor::flatten_all).transpose()?;
    let options = RowOptions { weight, row_weight, ..rows.clone() };
    let nll = Nll { name: linear.problem.name, axis: 1, form: LossForm::Each, options };
    let weights = nll.forward(&minus_ones, &inputs.target)?;
    if inputs.policy.host_knows {
        return Ok(weights);
    }
    // a bad row is NaN in itself, not in what it shares with others
    weights.eq(&weights)?.where_cond(&weights, &weights.zeros_like()?)
}

/// A number on the device, not copied from the host.
pub(super) fn scalar(value: f64, device: &Device) -> Result<Tensor> {
    Tensor::full(value, (), device)
}

/// Ones in the working dtype.
pub(super) fn ones(shape: impl Into<Shape>, inputs: &Inputs) -> Result<Tensor> {
    Tensor::ones(shape, inputs.policy.working, inputs.device())
}
