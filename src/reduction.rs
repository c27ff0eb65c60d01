//! How the losses of rows or elements become the value that is returned.

use candle_core::Shape;

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
}

impl Reduction {
    /// The shape of the loss where the losses of the rows or elements have the shape `each`.
    pub(crate) fn shape(self, each: Shape) -> Shape {
        match self {
            Reduction::None => each,
            Reduction::Mean | Reduction::Sum => Shape::from(()),
        }
    }
}
