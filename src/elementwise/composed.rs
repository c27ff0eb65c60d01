//! The element-wise family in candle's tensor ops: its specification, the tests' oracle, the baseline of the benches,
//! and the path where there are no kernels.

use super::problem::{Elements, Term};
use crate::check::arithmetic;
use crate::composed::scaled;
use crate::reduction::Reduction;
use candle_core::{D, Result, Tensor};

/// `max(x, 0) + log(1 + exp(-|x|))`
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// The loss.
pub(crate) fn loss(problem: &Elements, input: &Tensor, target: &Tensor) -> Result<Tensor> {
    let (o, dtype) = (&problem.options, arithmetic(input.dtype()));
    let x = input.to_dtype(dtype)?.contiguous()?;
    let e = o.label_smoothing;
    let t = target.to_dtype(dtype)?.contiguous()?.affine(1.0 - e, e / 2.0)?;
    let not_t = t.affine(-1.0, 1.0)?;
    let positive = match &o.pos_weight {
        Some(p) => (&t * p.contiguous()?)?,
        None => t.clone(),
    };
    let cross_entropy = || scaled(&positive, &softplus(&x.neg()?)?)? + scaled(&not_t, &softplus(&x)?)?;
    let mut loss = match problem.term {
        Term::Bce => {
            let clamped_log = |x: &Tensor| x.log()?.maximum(-100f64);
            (((&t * clamped_log(&x)?)? + (&not_t * clamped_log(&x.affine(-1.0, 1.0)?)?)?)?).neg()?
        }
        Term::BceWithLogits => cross_entropy()?,
        Term::Focal { alpha, gamma } => {
            let p = candle_nn::ops::sigmoid(&x)?;
            let wrong = ((&t * p.affine(-1.0, 1.0)?)? + (&not_t * &p)?)?;
            let loss = if gamma == 0.0 { cross_entropy()? } else { (wrong.powf(gamma)? * cross_entropy()?)? };
            match alpha {
                Some(alpha) => (loss * ((&t * alpha)? + (&not_t * (1.0 - alpha))?)?)?,
                None => loss,
            }
        }
        Term::L1 => {
            let difference = (&x - &t)?;
            // not candle's absolute value, whose slope at 0 is 1
            let sign = difference.eq(&difference)?.where_cond(&difference.sign()?, &difference)?;
            (&difference * sign.detach())?
        }
    };
    if let Some(weight) = &o.weight {
        loss = (loss * weight.contiguous()?)?;
    }
    let counted = match &o.mask {
        Some(mask) => {
            let counted = mask.contiguous()?.ne(0f64)?;
            loss = counted.where_cond(&loss, &loss.zeros_like()?)?;
            counted.to_dtype(dtype)?.sum_all()?
        }
        None => Tensor::new(loss.elem_count() as f64, input.device())?.to_dtype(dtype)?,
    };
    match (o.reduction, problem.average_rows) {
        (Reduction::None, true) => loss.mean(D::Minus1),
        (Reduction::None, false) => Ok(loss),
        (Reduction::Sum, true) => loss.sum_all()? / loss.dim(D::Minus1)? as f64,
        (Reduction::Sum, false) => loss.sum_all(),
        (Reduction::Mean, _) => loss.sum_all()? / counted,
    }
}
