//! The element-wise family in candle's tensor ops: its specification, the tests' oracle, the baseline of the benches,
//! and the path where there are no kernels.
//!
//! It can be differentiated twice. Whatever autograd makes of these ops, also once more, is a derivative of the loss;
//! what is detached is a constant, or corrects the rounding of a value. The one exception is said at [`bce`].

use super::problem::{Elements, Term};
use crate::cast::computable;
use crate::check::arithmetic;
use crate::composed::mean;
use crate::reduction::{Denominator, LossForm};
use candle_core::{D, DType, Device, Result, Tensor};

/// The loss.
pub(crate) fn loss(problem: &Elements, input: &Tensor, target: &Tensor) -> Result<Tensor> {
    let (loss, count) = match input.elem_count() {
        0 => no_losses(input, target)?,
        _ => losses(problem, input, target)?,
    };
    let LossForm::Scalar(denominator) = &problem.form else {
        return match problem.average_rows {
            // no elements, but classes: no rows, of which candle's CUDA part takes no mean
            true if loss.elem_count() == 0 => loss.reshape(problem.loss_shape(input.layout())),
            true => loss.mean(D::Minus1),
            false => Ok(loss),
        };
    };
    let group = problem.group(input.layout()) as f64;
    match denominator {
        Denominator::Counted => mean(&sum(&loss)?, &count),
        Denominator::Value(value) => sum(&loss)? / (value * group),
        Denominator::Tensor(tensor) => mean(&sum(&loss)?, &(tensor * group)?.to_dtype(loss.dtype())?),
    }
}

/// As [`losses`] of no elements, which candle's binary ops would let drop out of the graph.
fn no_losses(input: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
    let dtype = arithmetic(input.dtype());
    let axis = input.dims().iter().position(|&size| size == 0).unwrap_or(0);
    // on the host, as a kernel of no threads is an error
    let converted = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(dtype);
    let both = Tensor::cat(&[converted(input)?, converted(target)?], axis)?.to_device(input.device())?;
    Ok((both, Tensor::zeros((), dtype, input.device())?))
}

/// The weighted losses, and how many of them count.
fn losses(problem: &Elements, input: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
    let (o, dtype) = (&problem.options, arithmetic(input.dtype()));
    let counted = o.mask.as_ref().map(|mask| computable(mask)?.contiguous()?.ne(0f64)).transpose()?;
    // in an element that doesn't count or weighs nothing, every operand is replaced by a number that does no harm in
    // any derivative
    let replaced = |which: &Tensor, by_half: &Tensor| which.where_cond(&(by_half.zeros_like()? + 0.5)?, by_half);
    let counting = |operand: &Tensor| -> Result<Tensor> {
        let operand = computable(operand)?.to_dtype(dtype)?.contiguous()?;
        counted.as_ref().map_or(Ok(operand.clone()), |counted| replaced(&counted.eq(0u8)?, &operand))
    };
    let weight = o.weight.as_ref().map(counting).transpose()?;
    let operand = |operand: &Tensor| -> Result<Tensor> {
        let operand = counting(operand)?;
        match &weight {
            Some(weight) => replaced(&weight.eq(0f64)?, &operand),
            None => Ok(operand),
        }
    };
    let (x, t) = (operand(input)?, operand(target)?);
    check_range(problem, input, target, (&x, &t))?;
    let t = match o.label_smoothing {
        0.0 => Ok(t),
        // by a tensor, as candle has no gradient of a product with the number 0
        e => (&t * (t.zeros_like()? + (1.0 - e))?)? + e / 2.0,
    }?;
    let mut loss = match problem.term {
        Term::Bce => bce(&x, &t)?,
        Term::BceWithLogits => {
            let pos_weight = o.pos_weight.as_ref().map(operand).transpose()?;
            ComposedLogit::new(&x)?.cross_entropy(&t, pos_weight.as_ref())?
        }
        Term::Focal { alpha, gamma } => focal(&x, &t, alpha, gamma)?,
        Term::L1 => {
            let difference = (&x - &t)?;
            // not candle's absolute value, whose slope at 0 is 1
            let sign = difference.eq(&difference)?.where_cond(&difference.sign()?, &difference)?;
            (&difference * sign.detach())?
        }
    };
    if let Some(weight) = &weight {
        loss = product(weight, &loss)?;
    }
    let count = match &counted {
        Some(counted) => {
            loss = counted.where_cond(&loss, &loss.zeros_like()?)?;
            sum(&counted.to_dtype(dtype)?)?
        }
        None => Tensor::new(loss.elem_count() as f64, input.device())?.to_dtype(dtype)?,
    };
    Ok((loss, count))
}

/// An `Err` about the first element that is not in [0, 1] though it has to be. `x` and `t` are the operands in the
/// arithmetic dtype, without those that don't count.
fn check_range(problem: &Elements, input: &Tensor, target: &Tensor, (x, t): (&Tensor, &Tensor)) -> Result<()> {
    let unit = problem.unit_operands(target.dtype());
    if !unit.target {
        return Ok(());
    }
    let good = |v: &Tensor| v.ge(0f64)?.mul(&v.le(1f64)?);
    let good = if unit.input { good(x)?.mul(&good(t)?)? } else { good(t)? }.flatten_all()?;
    // one number is waited for; all of them only where there is something to say
    if good.min(0)?.to_scalar::<u8>()? == 1 {
        return Ok(());
    }
    let Some(element) = good.to_vec1::<u8>()?.iter().position(|&good| good == 0) else { return Ok(()) };
    let value = |tensor: &Tensor| -> Result<_> {
        let value = tensor.flatten_all()?.get(element)?.to_device(&Device::Cpu)?;
        Ok((value.to_dtype(DType::F64)?.to_scalar()?, tensor.dtype()))
    };
    Err(problem.out_of_range(element, value(input)?, value(target)?))
}

/// The sum of all elements, of which there may be none.
fn sum(t: &Tensor) -> Result<Tensor> {
    match (t.elem_count(), t.rank()) {
        (0, _) => Tensor::cat(&[&t.flatten_all()?, &Tensor::zeros(1, t.dtype(), t.device())?], 0)?.sum_all(),
        (_, 0) => Ok(t.clone()),
        // by rows: sums of sums lose less than one long sum
        _ => t.sum(D::Minus1)?.sum_all(),
    }
}

/// `a b`, where 0 times infinity is 0. NaN comes from NaN alone.
///
/// There the derivatives are 0, but for the one in an `a` of 0, which is infinite as `b` is. It is asked for where `a`
/// is a target's, and `b` is positive.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let naive = (a.detach() * b.detach())?;
    let made_nan = naive.ne(&naive)?.mul(&a.eq(a)?)?.mul(&b.eq(b)?)?;
    let zeros = naive.zeros_like()?;
    // not a choice between products: the derivative of the one that wasn't chosen would be NaN
    let product = (made_nan.where_cond(&zeros, a)? * made_nan.where_cond(&zeros, b)?)?;
    if !a.track_op() {
        return Ok(product);
    }
    // 0 in steps of which each is finite
    let large = if a.dtype() == DType::F64 { f64::MAX } else { f32::MAX as f64 };
    let steep = made_nan.mul(&a.eq(0f64)?)?;
    steep.where_cond(&a.affine(large, 0.0)?.affine(large, 0.0)?, &product)
}

/// `log(1 + z)` for `z` above -1, with a relative error of a few ulp.
fn log_1p(z: &Tensor) -> Result<Tensor> {
    let w = (z + 1.0)?;
    // what the rounding of 1 + z lost, to first order; not at w = 0, where log(w) is exact
    let lost = ((z - (&w - 1.0)?)? / &w)?.detach();
    let lost = w.ne(0f64)?.where_cond(&lost, &lost.zeros_like()?)?;
    w.log()? + lost
}

/// `-(t max(log x, -100) + (1 - t) max(log(1 - x), -100))`, whose derivative in x is by definition
/// `(x - t) / max(x (1 - x), 1e-12)`.
///
/// That is the derivative of the value where `x (1 - x)` is at least 1e-12, with logarithms that are far from their
/// floor. Elsewhere the logarithms are constants and the derivative comes from `(x - t)^2 / 2e-12`, of which nothing
/// else is left; second derivatives that mix x and t lack it.
fn bce(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    const FLOOR: f64 = 1e-12;
    let inside = (x * x.affine(-1.0, 1.0)?)?.ge(FLOOR)?;
    let half = (x.zeros_like()? + 0.5)?;
    let within = inside.where_cond(x, &half)?;
    let at_end = x.detach();
    let clamped = |log: Tensor| log.maximum(-100f64);
    let log_x = inside.where_cond(&within.log()?, &clamped(at_end.log()?)?)?;
    let log_not_x = inside.where_cond(&log_1p(&within.neg()?)?, &clamped(log_1p(&at_end.neg()?)?)?)?;
    let loss = ((t * log_x)? + (t.affine(-1.0, 1.0)? * log_not_x)?)?.neg()?;
    let steep = ((x - t.detach())?.sqr()? * (0.5 / FLOOR))?;
    let steep = (&steep - steep.detach())?;
    loss + inside.where_cond(&steep.zeros_like()?, &steep)?
}

/// What the losses of a logit are made of, from `z = exp(-|x|)`: nothing overflows, and no derivative cancels.
struct ComposedLogit {
    /// Where x is at least 0. There, candle's absolute value has the slope 1.
    positive: Tensor,
    /// x, which is a constant where it is infinite: there, z and all that is made of it is flat, but autograd would
    /// multiply its slope of 0 by a loss that may be infinite.
    bounded: Tensor,
    z: Tensor,
    /// `log(1 + z)`
    part: Tensor,
    /// `log(1 + exp(x))` and `log(1 + exp(-x))`
    softplus: Tensor,
    softplus_neg: Tensor,
}

impl ComposedLogit {
    fn new(x: &Tensor) -> Result<Self> {
        let positive = x.ge(0f64)?;
        let bounded = x.abs()?.eq(f64::INFINITY)?.where_cond(&x.detach(), x)?;
        let z = bounded.abs()?.neg()?.exp()?;
        let part = log_1p(&z)?;
        let (softplus, softplus_neg) = softplus(&positive, x, &part)?;
        Ok(ComposedLogit { positive, bounded, z, part, softplus, softplus_neg })
    }

    /// `t p softplus(-x) + (1 - t) softplus(x)`
    fn cross_entropy(&self, t: &Tensor, pos_weight: Option<&Tensor>) -> Result<Tensor> {
        let weighted = pos_weight.map(|p| product(t, p)).transpose()?;
        product(weighted.as_ref().unwrap_or(t), &self.softplus_neg)? + product(&t.affine(-1.0, 1.0)?, &self.softplus)?
    }

    /// `sigmoid(x)` and `sigmoid(-x)`
    fn sigmoids(&self) -> Result<(Tensor, Tensor)> {
        let large = (&self.z + 1.0)?.recip()?;
        let small = (&self.z * &large)?;
        Ok((self.positive.where_cond(&large, &small)?, self.positive.where_cond(&small, &large)?))
    }
}

/// `max(x, 0) + part` and `max(-x, 0) + part`
fn softplus(positive: &Tensor, x: &Tensor, part: &Tensor) -> Result<(Tensor, Tensor)> {
    let zeros = x.zeros_like()?;
    Ok(((positive.where_cond(x, &zeros)? + part)?, (positive.where_cond(&zeros, &x.neg()?)? + part)?))
}

/// `a u^gamma cross_entropy`, `u = t sigmoid(-x) + (1 - t) sigmoid(x)`, `a = alpha t + (1 - alpha) (1 - t)` or 1
fn focal(x: &Tensor, t: &Tensor, alpha: Option<f64>, gamma: f64) -> Result<Tensor> {
    let logit = ComposedLogit::new(x)?;
    let not_t = t.affine(-1.0, 1.0)?;
    let mut loss = logit.cross_entropy(t, None)?;
    if gamma != 0.0 {
        let (sigmoid, sigmoid_neg) = logit.sigmoids()?;
        let u = ((t * sigmoid_neg)? + (&not_t * sigmoid)?)?;
        loss = match gamma {
            2.0 => u.sqr()? * loss,
            _ => (log_wrong(&logit, &u, t, &not_t)? * gamma)?.exp()? * loss,
        }?;
    }
    match alpha {
        Some(alpha) => product(&((t * alpha)? + (not_t * (1.0 - alpha))?)?, &loss),
        None => Ok(loss),
    }
}

/// `log u`. For a label of exactly 0 or 1 it is the logarithm of a sigmoid, which goes on where the sigmoid has become
/// 0; the derivatives in t are there too, as `u = sigmoid(x) (1 + t (exp(-x) - 1))`, and the same for 1 - t and -x.
fn log_wrong(logit: &ComposedLogit, u: &Tensor, t: &Tensor, not_t: &Tensor) -> Result<Tensor> {
    let (softplus, softplus_neg) = softplus(&logit.positive, &logit.bounded, &logit.part)?;
    let zeros = u.zeros_like()?;
    let hard = |t: &Tensor, log_sigmoid: &Tensor, minus_x: &Tensor| -> Result<(Tensor, Tensor)> {
        let is_hard = t.eq(0f64)?;
        // in the others t is 0 too: the derivative of what isn't chosen must not be NaN
        let t = is_hard.where_cond(t, &zeros)?;
        // an exponential beyond that has nothing left to multiply
        let ratio = (minus_x.minimum(80f64)?.exp()? - 1.0)?;
        Ok((is_hard, (log_sigmoid + ((t * ratio)? + 1.0)?.log()?)?))
    };
    let (is_zero, at_zero) = hard(t, &softplus_neg.neg()?, &logit.bounded.neg()?)?;
    let (is_one, at_one) = hard(not_t, &softplus.neg()?, &logit.bounded)?;
    let ones = (&zeros + 1.0)?;
    let soft = is_zero.where_cond(&ones, &is_one.where_cond(&ones, u)?)?.log()?;
    is_zero.where_cond(&at_zero, &is_one.where_cond(&at_one, &soft)?)
}
