//! The work on chunks of rows: their logits, losses and gradients, the latter as sums over all rows.

use super::inputs::{Counted, Inputs, Selection, ones};
use super::matmul::product;
use super::problem::Linear;
use crate::reduction::Reduction;
use crate::softmax::problem::{CrossEntropy, RowStatistics, SoftmaxOptions};
use candle_core::{Result, Tensor};

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
    pub sums: Sums,
}

/// The sums over the rows, in the arithmetic dtype.
pub(super) struct Sums {
    /// `(selected rows, D)`
    pub hidden: Option<Tensor>,
    /// `(V, D)`
    pub weight: Option<Tensor>,
    /// `(1, V)`
    pub bias: Option<Tensor>,
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

/// What all chunks share.
struct Chunks<'a> {
    inputs: &'a Inputs,
    selection: &'a Selection,
    /// The loss of a chunk: the rows' losses or their sum.
    problem: CrossEntropy,
    tiles: Vec<(usize, usize)>,
    /// `(1, V)`, in the working dtype.
    bias: Option<Tensor>,
    /// Room for the logits of a chunk, which their gradient replaces.
    logits: Tensor,
    ones: Tensor,
}

/// Some of the selected rows.
struct Chunk {
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

impl<'a> Chunks<'a> {
    fn new(linear: &Linear, inputs: &'a Inputs, selection: &'a Selection, step: usize) -> Result<Self> {
        let (working, options) = (inputs.policy.working, &linear.problem.options);
        let reduction = if options.rows.reduction == Reduction::None { Reduction::None } else { Reduction::Sum };
        let rows = options.rows.of_sum(reduction);
        Ok(Chunks {
            inputs,
            selection,
            problem: CrossEntropy { options: SoftmaxOptions { rows, ..options.clone() }, ..linear.problem.clone() },
            tiles: inputs.tiles(),
            bias: inputs.bias.as_ref().map(|bias| bias.to_dtype(working)).transpose()?,
            logits: Tensor::zeros((step, inputs.classes()), working, inputs.device())?,
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

    fn compute_logits(&self, chunk: &Chunk) -> Result<()> {
        if let Some(bias) = &self.bias {
            product(&chunk.logits, &chunk.ones.unsqueeze(1)?, bias, false)?;
        }
        for &(class, classes) in &self.tiles {
            let weight = self.inputs.tile((class, classes))?;
            product(&chunk.logits.narrow(1, class, classes)?, &chunk.hidden, &weight.t()?, self.bias.is_some())?;
        }
        Ok(())
    }

    /// Adds a chunk to the sums. The gradient of its logits is in their place; an upstream gradient of each row is
    /// folded into what is summed over rows.
    fn add_to(&self, sums: &Sums, chunk: &Chunk, upstream: Option<&Tensor>) -> Result<()> {
        let (gradient, first) = (&chunk.logits, chunk.start == 0);
        let working = self.inputs.policy.working;
        if let Some(sum) = &sums.hidden {
            let sum = sum.narrow(0, chunk.start, chunk.rows)?;
            for &(class, classes) in &self.tiles {
                let weight = self.inputs.tile((class, classes))?;
                product(&sum, &gradient.narrow(1, class, classes)?, &weight, class > 0)?;
            }
        }
        let upstream = upstream.map(|upstream| self.selection.rows(upstream, chunk.start, chunk.rows)).transpose()?;
        if let Some(sum) = &sums.weight {
            let hidden = match &upstream {
                None => chunk.hidden.clone(),
                Some(upstream) => {
                    let upstream = upstream.unsqueeze(1)?.broadcast_as((chunk.rows, self.inputs.features()))?;
                    (chunk.hidden.to_dtype(self.inputs.arithmetic())? * upstream)?.to_dtype(working)?
                }
            };
            product(sum, &gradient.t()?, &hidden, !first)?;
        }
        if let Some(sum) = &sums.bias {
            let factors = match upstream {
                None => chunk.ones.clone(),
                Some(upstream) => upstream.to_dtype(working)?,
            };
            product(sum, &factors.unsqueeze(0)?, gradient, !first)?;
        }
        Ok(())
    }
}

impl Linear {
    /// The rows of a chunk: what was asked for, or as many as keep the logits within the device's budget, evenly.
    fn step(&self, inputs: &Inputs, rows: usize) -> usize {
        if let Some(asked) = self.chunk_rows {
            return asked.min(rows);
        }
        let policy = &inputs.policy;
        let most = (policy.chunk_bytes / (inputs.classes() * policy.working.size_in_bytes())).max(LEAST_ROWS);
        rows.div_ceil(rows.div_ceil(most).max(1)).min(rows)
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
        let rows = counted.rows;
        let sums = Sums::new(inputs, rows, wanted)?;
        if rows == 0 {
            return Ok(ChunkResults { losses: None, statistics: vec![], sums });
        }
        let step = self.step(inputs, rows);
        let chunks = Chunks::new(self, inputs, &counted.selection, step)?;
        let (mut losses, mut statistics) = (Vec::with_capacity(rows.div_ceil(step)), vec![]);
        for start in (0..rows).step_by(step) {
            let chunk = chunks.chunk(start, step.min(rows - start))?;
            chunks.compute_logits(&chunk)?;
            let problem = || chunks.problem.clone();
            let mut loss = None;
            if wanted.statistics {
                let (of_chunk, rows) = problem().forward_with_statistics(&chunk.logits, &chunk.target)?;
                statistics.push(rows);
                loss = Some(of_chunk);
            }
            if wanted.gradients() {
                loss = Some(problem().loss_and_grad_inplace(&chunk.logits, &chunk.target)?);
                chunks.add_to(&sums, &chunk, upstream)?;
            }
            losses.push(loss.map_or_else(|| problem().forward(&chunk.logits, &chunk.target), Ok)?);
        }
        let losses = match self.problem.options.rows.reduction {
            Reduction::None => Tensor::cat(&losses, 0)?,
            Reduction::Mean | Reduction::Sum => Tensor::stack(&losses, 0)?,
        };
        Ok(ChunkResults { losses: Some(losses), statistics, sums })
    }
}
