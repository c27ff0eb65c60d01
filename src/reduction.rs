//! How the losses of rows or elements become the value that is returned.

use crate::cast::computable;
use crate::check;
use candle_core::{DType, Result, Shape, Tensor, bail};

/// What a loss does with the losses of its rows (the softmax family) or elements (the element-wise family).
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{CrossEntropyLoss, Reduction};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let rows = CrossEntropyLoss::new().with_reduction(Reduction::None).forward(&logits, &target)?;
/// let sum = CrossEntropyLoss::new().with_reduction(Reduction::Sum).forward(&logits, &target)?;
/// assert_eq!(rows.dims(), [2]);
/// assert!((rows.to_vec1::<f32>()?[1] - 1.407606).abs() < 1e-6);
/// assert!((sum.to_scalar::<f32>()? - 1.815212).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Return the loss of every row or element.
    None,
    /// Divide the sum by the loss's denominator, which each loss documents; the default.
    #[default]
    Mean,
    /// Return the sum.
    Sum,
    /// Divide the sum by the size of the first axis of what [`Reduction::None`] returns, whatever counts: torch's
    /// `batchmean`. A loss of one row or element is its own.
    BatchMean,
}

/// What [`Reduction::Mean`] divides the sum by in place of its usual denominator: see
/// [`CrossEntropyLoss::with_normalizer`](crate::CrossEntropyLoss::with_normalizer). Made from a number, or from a
/// scalar tensor on the input's device, which nobody waits for.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{CrossEntropyLoss, Normalizer};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let tokens = Tensor::new(4u32, &Device::Cpu)?; // of all devices, say
/// for normalizer in [Normalizer::from(4.0), Normalizer::from(&tokens)] {
///     let loss = CrossEntropyLoss::new().with_normalizer(normalizer).forward(&logits, &target)?;
///     assert!((loss.to_scalar::<f32>()? - 0.453803).abs() < 1e-6);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub enum Normalizer {
    /// A finite number above 0.
    Value(f64),
    /// A scalar of any dtype that losses read, on the input's device. Its value is not looked at by the host: divided
    /// by 0, a loss is infinite or NaN, and its gradient 0.
    Tensor(Tensor),
}

impl From<f64> for Normalizer {
    fn from(value: f64) -> Self {
        Normalizer::Value(value)
    }
}

impl From<Tensor> for Normalizer {
    fn from(tensor: Tensor) -> Self {
        Normalizer::Tensor(tensor)
    }
}

impl From<&Tensor> for Normalizer {
    fn from(tensor: &Tensor) -> Self {
        Normalizer::Tensor(tensor.clone())
    }
}

impl Normalizer {
    /// As a denominator of a loss of that input.
    fn denominator(&self, name: &str, input: &Tensor) -> Result<Denominator> {
        match self {
            Normalizer::Value(d) if d.is_finite() && *d > 0.0 => Ok(Denominator::Value(*d)),
            Normalizer::Value(d) => bail!("{name}: normalizer {d}, expected a finite number above 0"),
            Normalizer::Tensor(tensor) => {
                check::number(name, "normalizer", tensor.dtype())?;
                check::same_device(name, "normalizer", tensor, input)?;
                if tensor.elem_count() != 1 {
                    bail!("{name}: a normalizer of shape {:?}, expected a scalar", tensor.dims());
                }
                Ok(Denominator::Tensor(computable(&tensor.detach())?.to_dtype(DType::F64)?.reshape(())?))
            }
        }
    }
}

/// What becomes of the losses, as kernels are asked for it.
#[derive(Clone, Debug)]
pub(crate) enum LossForm {
    /// One for each row or element.
    Each,
    /// Their sum over a denominator.
    Scalar(Denominator),
}

/// What the sum of the losses is divided by.
#[derive(Clone, Debug)]
pub(crate) enum Denominator {
    /// The rows or elements that count, or their weights.
    Counted,
    Value(f64),
    /// A scalar on the input's device, f64.
    Tensor(Tensor),
}

impl LossForm {
    pub const SUM: Self = LossForm::Scalar(Denominator::Value(1.0));
    /// The mean over what counts.
    pub const MEAN: Self = LossForm::Scalar(Denominator::Counted);

    /// What the options ask for of losses of the shape `each`.
    pub fn new(
        name: &str,
        (reduction, normalizer): (Reduction, Option<&Normalizer>),
        input: &Tensor,
        each: &Shape,
    ) -> Result<Self> {
        match (reduction, normalizer) {
            (Reduction::None, None) => Ok(LossForm::Each),
            (Reduction::Sum, None) => Ok(LossForm::SUM),
            (Reduction::BatchMean, None) => {
                let size = each.dims().first().copied().unwrap_or(1);
                Ok(LossForm::Scalar(Denominator::Value(size as f64)))
            }
            (Reduction::Mean, None) => Ok(LossForm::MEAN),
            (Reduction::Mean, Some(normalizer)) => Ok(LossForm::Scalar(normalizer.denominator(name, input)?)),
            (other, Some(_)) => {
                bail!("{name}: a normalizer with Reduction::{other:?}, expected Mean, which divides by it")
            }
        }
    }

    /// The shape of the loss where the losses of the rows or elements have the shape `each`.
    pub fn shape(&self, each: Shape) -> Shape {
        if self.is_each() { each } else { Shape::from(()) }
    }

    pub fn is_each(&self) -> bool {
        matches!(self, LossForm::Each)
    }

    pub fn is_counted(&self) -> bool {
        matches!(self, LossForm::Scalar(Denominator::Counted))
    }

    /// What the sum is divided by, 1 where there is none, known on the host: that a tensor holds it is waited for.
    pub fn denominator(&self, counted: impl FnOnce() -> f64) -> Result<f64> {
        match self {
            LossForm::Each => Ok(1.0),
            LossForm::Scalar(Denominator::Counted) => Ok(counted()),
            LossForm::Scalar(Denominator::Value(value)) => Ok(*value),
            LossForm::Scalar(Denominator::Tensor(tensor)) => tensor.to_scalar(),
        }
    }

    /// The denominator that is in a tensor.
    pub fn tensor(&self) -> Option<&Tensor> {
        match self {
            LossForm::Scalar(Denominator::Tensor(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// What a loss of nothing is, where it is a scalar, and what it was divided by. The value in a tensor is not waited
    /// for: 1 stands for it.
    pub fn of_nothing(&self) -> (f64, f64) {
        match self {
            LossForm::Scalar(Denominator::Counted) => (f64::NAN, 0.0),
            LossForm::Scalar(Denominator::Value(value)) => (0.0 / value, *value),
            LossForm::Each | LossForm::Scalar(Denominator::Tensor(_)) => (0.0, 1.0),
        }
    }
}
