//! All checks of shapes, dtypes, devices and options, and every error message about them.
//!
//! What passes becomes one of the plain structs that the ops take ([`CrossEntropy`], [`Logistic`]); nothing further down
//! fails for a reason that could have been seen here. Only the values of targets and probabilities are checked later, by
//! the kernels that read them anyway.

use crate::elementwise::op::{Logistic, Term};
use crate::linear::op::Linear;
use crate::reduction::Reduction;
use crate::softmax::op::CrossEntropy;
use candle_core::{DType, Result, Tensor, bail};

/// The dtype of the arithmetic, the sums and the returned loss for an input's dtype.
pub(crate) fn arithmetic_dtype(name: &str, what: &str, tensor: &Tensor) -> Result<DType> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 | DType::F32 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        other => bail!("{name}: {what} of dtype {other:?}, expected f16, bf16, f32 or f64"),
    }
}

fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::U32 | DType::I32 | DType::I64)
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

fn same_device(name: &str, what: &str, tensor: &Tensor, input: &Tensor) -> Result<()> {
    if tensor.device().same_device(input.device()) {
        return Ok(());
    }
    bail!(
        "{name}: {what} on {:?}, expected it on the input's device {:?}",
        tensor.device().location(),
        input.device().location()
    )
}

/// The class axis: 1, or 0 where there is no batch.
pub(crate) fn class_axis(name: &str, input: &Tensor) -> Result<usize> {
    match input.dims() {
        [] => bail!("{name}: a scalar input, expected shape (C), (N, C) or (N, C, d1, …, dk)"),
        [0] | [_, 0, ..] => bail!("{name}: no classes in an input of shape {:?}, expected at least one", input.dims()),
        [_] => Ok(0),
        _ => Ok(1),
    }
}

fn option_in_unit_interval(name: &str, option: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    bail!("{name}: {option} {value}, expected a number in [0, 1]")
}

/// A tensor of weights as the kernels read it: detached, in the arithmetic dtype.
fn weights(name: &str, what: &str, weight: &Tensor, input: &Tensor, arithmetic: DType) -> Result<Tensor> {
    if !is_float(weight.dtype()) {
        bail!("{name}: {what} of dtype {:?}, expected f16, bf16, f32 or f64", weight.dtype());
    }
    same_device(name, what, weight, input)?;
    weight.detach().to_dtype(arithmetic)
}

fn class_weights(
    name: &str,
    weight: &Option<Tensor>,
    classes: usize,
    input: &Tensor,
    arithmetic: DType,
) -> Result<Option<Tensor>> {
    let Some(weight) = weight else { return Ok(None) };
    if weight.dims() != [classes] {
        bail!("{name}: class weights of shape {:?}, expected ({classes}), one for each class", weight.dims());
    }
    weights(name, "class weights", weight, input, arithmetic)?.contiguous().map(Some)
}

/// A view of an operand with the input's shape.
fn broadcast(name: &str, what: &str, tensor: Tensor, input: &Tensor) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    match tensor.broadcast_as(input.shape()) {
        Ok(view) => Ok(view),
        Err(_) => bail!(
            "{name}: {what} of shape {dims:?}, expected a shape that broadcasts to the input's {:?}",
            input.dims()
        ),
    }
}

fn broadcast_weights(
    name: &str,
    what: &str,
    weight: &Option<Tensor>,
    input: &Tensor,
    arithmetic: DType,
) -> Result<Option<Tensor>> {
    let Some(weight) = weight else { return Ok(None) };
    broadcast(name, what, weights(name, what, weight, input, arithmetic)?, input).map(Some)
}

/// The options of cross-entropy and of NLL as the caller gave them.
#[derive(Clone, Debug)]
pub(crate) struct SoftmaxOptions {
    pub weight: Option<Tensor>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    pub normalizer: Option<f64>,
    pub z_loss: f64,
    pub softcap: Option<f64>,
    pub logit_scale: f64,
    pub target_check: bool,
}

impl Default for SoftmaxOptions {
    fn default() -> Self {
        SoftmaxOptions {
            weight: None,
            ignore_index: -100,
            label_smoothing: 0.0,
            reduction: Reduction::Mean,
            normalizer: None,
            z_loss: 0.0,
            softcap: None,
            logit_scale: 1.0,
            target_check: false,
        }
    }
}

impl SoftmaxOptions {
    /// What can be said without looking at the tensors.
    pub fn check(&self, name: &str) -> Result<()> {
        option_in_unit_interval(name, "label smoothing", self.label_smoothing)?;
        if !self.z_loss.is_finite() || self.z_loss < 0.0 {
            bail!("{name}: z-loss factor {}, expected a finite number of 0 or more", self.z_loss);
        }
        if !self.logit_scale.is_finite() {
            bail!("{name}: logit scale {}, expected a finite number", self.logit_scale);
        }
        match self.softcap {
            Some(cap) if !(cap.is_finite() && cap > 0.0) => {
                bail!("{name}: soft cap {cap}, expected a finite number above 0")
            }
            _ => {}
        }
        match self.normalizer {
            Some(d) if !(d.is_finite() && d > 0.0) => bail!("{name}: normalizer {d}, expected a finite number above 0"),
            _ => Ok(()),
        }
    }

    /// Checks both tensors against the options.
    pub fn problem(
        &self,
        name: &'static str,
        log_probs: bool,
        input: &Tensor,
        target: &Tensor,
    ) -> Result<CrossEntropy> {
        self.check(name)?;
        let what = if log_probs { "log-probabilities" } else { "logits" };
        let arithmetic = arithmetic_dtype(name, what, input)?;
        let axis = class_axis(name, input)?;
        same_device(name, "target", target, input)?;
        let mut rows = input.dims().to_vec();
        let classes = rows.remove(axis);
        if target.dims() == rows {
            if !is_index(target.dtype()) {
                bail!("{name}: class indices of dtype {:?}, expected u8, u32, i32 or i64", target.dtype());
            }
        } else if log_probs {
            bail!("{name}: target of shape {:?}, expected class indices of shape {rows:?}", target.dims());
        } else if target.dims() != input.dims() {
            bail!(
                "{name}: target of shape {:?} for logits of shape {:?}, expected class indices of shape {rows:?} or probabilities of the logits' shape",
                target.dims(),
                input.dims()
            );
        } else if !is_float(target.dtype()) {
            bail!(
                "{name}: a target of the logits' shape {:?} holds probabilities, which can't have dtype {:?}, expected f16, bf16, f32 or f64",
                input.dims(),
                target.dtype()
            );
        } else if self.ignore_index >= 0 {
            bail!(
                "{name}: ignore_index {} with probability targets, expected none: it is for class indices",
                self.ignore_index
            );
        }
        Ok(CrossEntropy {
            name,
            axis,
            log_probs,
            weight: class_weights(name, &self.weight, classes, input, arithmetic)?,
            ignore_index: self.ignore_index,
            label_smoothing: self.label_smoothing,
            reduction: self.reduction,
            normalizer: self.normalizer,
            z_loss: self.z_loss,
            softcap: self.softcap,
            logit_scale: self.logit_scale,
            target_check: self.target_check,
        })
    }
}

/// The options of linear cross-entropy as the caller gave them.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinearOptions {
    pub softmax: SoftmaxOptions,
    pub chunk_rows: Option<usize>,
}

impl LinearOptions {
    /// Checks all tensors against the options.
    pub fn problem(
        &self,
        name: &'static str,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<Linear> {
        let options = &self.softmax;
        options.check(name)?;
        if self.chunk_rows == Some(0) {
            bail!("{name}: chunk rows 0, expected at least one row in a chunk");
        }
        let arithmetic = arithmetic_dtype(name, "hidden states", hidden)?;
        let (rows, features) = match hidden.dims() {
            [] => bail!("{name}: scalar hidden states, expected shape (…, D)"),
            [.., 0] => bail!("{name}: no features in hidden states of shape {:?}, expected some", hidden.dims()),
            [rows @ .., features] => (rows, *features),
        };
        let classes = match weight.dims() {
            [0, _] => bail!("{name}: no classes in a weight of shape {:?}, expected at least one", weight.dims()),
            [classes, of] if *of == features => *classes,
            _ => bail!(
                "{name}: weight of shape {:?}, expected (V, {features}) for hidden states of shape {:?}",
                weight.dims(),
                hidden.dims()
            ),
        };
        if let Some(bias) = bias
            && bias.dims() != [classes]
        {
            bail!("{name}: bias of shape {:?}, expected ({classes}), one for each class", bias.dims());
        }
        for (what, tensor) in [("weight", Some(weight)), ("bias", bias)] {
            let Some(tensor) = tensor else { continue };
            same_device(name, what, tensor, hidden)?;
            if tensor.dtype() != hidden.dtype() {
                bail!("{name}: {what} of dtype {:?}, expected the hidden states' {:?}", tensor.dtype(), hidden.dtype());
            }
        }
        same_device(name, "target", target, hidden)?;
        if target.dims() != rows {
            bail!("{name}: target of shape {:?}, expected class indices of shape {rows:?}", target.dims());
        }
        if !is_index(target.dtype()) {
            bail!("{name}: class indices of dtype {:?}, expected u8, u32, i32 or i64", target.dtype());
        }
        Ok(Linear {
            problem: CrossEntropy {
                name,
                axis: 1,
                log_probs: false,
                weight: class_weights(name, &options.weight, classes, hidden, arithmetic)?,
                ignore_index: options.ignore_index,
                label_smoothing: options.label_smoothing,
                reduction: options.reduction,
                normalizer: options.normalizer,
                z_loss: options.z_loss,
                softcap: options.softcap,
                logit_scale: options.logit_scale,
                target_check: options.target_check,
            },
            chunk_rows: self.chunk_rows,
        })
    }
}

/// The options of the losses on elements as the caller gave them.
#[derive(Clone, Debug, Default)]
pub(crate) struct BinaryOptions {
    pub weight: Option<Tensor>,
    pub pos_weight: Option<Tensor>,
    pub ignore_mask: Option<Tensor>,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    pub target_check: bool,
}

impl BinaryOptions {
    /// Checks both tensors against the options.
    pub fn problem(&self, name: &'static str, term: Term, input: &Tensor, target: &Tensor) -> Result<Logistic> {
        let what = if term == Term::Bce { "probabilities" } else { "logits" };
        let arithmetic = arithmetic_dtype(name, what, input)?;
        option_in_unit_interval(name, "label smoothing", self.label_smoothing)?;
        if let Term::Focal { alpha, gamma } = term {
            if let Some(alpha) = alpha {
                // a negative alpha never gets here: it means off
                option_in_unit_interval(name, "alpha", alpha)?;
            }
            if !gamma.is_finite() || gamma < 0.0 {
                bail!("{name}: gamma {gamma}, expected a finite number of 0 or more");
            }
        }
        same_device(name, "target", target, input)?;
        if target.dims() != input.dims() {
            bail!("{name}: target of shape {:?}, expected the input's shape {:?}", target.dims(), input.dims());
        }
        if !is_float(target.dtype()) && !is_index(target.dtype()) {
            bail!("{name}: target of dtype {:?}, expected f16, bf16, f32, f64, u8, u32, i32 or i64", target.dtype());
        }
        let mask = match &self.ignore_mask {
            None => None,
            Some(mask) if !is_float(mask.dtype()) && !is_index(mask.dtype()) => {
                bail!("{name}: ignore mask of dtype {:?}, expected u8 or any other number", mask.dtype())
            }
            Some(mask) => {
                same_device(name, "ignore mask", mask, input)?;
                Some(broadcast(name, "ignore mask", mask.detach(), input)?)
            }
        };
        Ok(Logistic {
            name,
            term,
            weight: broadcast_weights(name, "weight", &self.weight, input, arithmetic)?,
            pos_weight: broadcast_weights(name, "pos_weight", &self.pos_weight, input, arithmetic)?,
            mask,
            label_smoothing: self.label_smoothing,
            reduction: self.reduction,
            average_rows: false,
            target_check: self.target_check,
        })
    }

    /// As [`Self::problem`] for losses that average the last axis, with weights for its classes.
    pub fn multi_label_problem(&self, name: &'static str, input: &Tensor, target: &Tensor) -> Result<Logistic> {
        let classes = match input.dims() {
            [] => bail!("{name}: a scalar input, expected shape (C) or (…, C)"),
            [.., 0] => bail!("{name}: no classes in an input of shape {:?}, expected at least one", input.dims()),
            [.., classes] => *classes,
        };
        match &self.weight {
            Some(weight) if weight.dims() != [classes] => {
                bail!("{name}: class weights of shape {:?}, expected ({classes}), one for each class", weight.dims())
            }
            _ => {}
        }
        Ok(Logistic { average_rows: true, ..self.problem(name, Term::BceWithLogits, input, target)? })
    }
}
