//! The L1 loss.

use crate::elementwise::problem::{ElementOptions, Term};
use crate::reduction::{Normalizer, Reduction};
use candle_core::{Result, Tensor};

const NAME: &str = "l1";

/// The absolute error: how far an input is from its target.
///
/// For an input x with target t, in the input's unit:
///
/// ```text
/// loss = w |x - t|
/// ```
///
/// `Mean` divides the sum by the number of elements whose mask is not 0, also with weights. The gradient is
/// `w sign(x - t)`.
///
/// Definition: [`torch.nn.L1Loss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.L1Loss.html); weights and
/// mask are this crate's.
///
/// # Shapes
/// Input of any shape and layout, and a target of the same shape. Weight and mask broadcast to it. The loss is a
/// scalar, or with [`Reduction::None`] has that shape.
///
/// # Dtypes
/// Input f16, bf16, f32 or f64; targets of these or u8, u32, i16, i32 or i64, of any values. Arithmetic and loss are
/// f32 (f64 for f64); the gradient has the input's dtype.
///
/// # Numerics
/// A target is rounded to the arithmetic dtype, and the difference once more. The gradient is 0 where the two are
/// equal. A NaN, and an infinity with itself as its target, makes both loss and gradient NaN, where PyTorch's gradient
/// is 0.
///
/// # Errors
/// Shapes, dtypes or devices that don't fit.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::L1Loss;
/// # fn main() -> candle_core::Result<()> {
/// let input = Tensor::new(&[1.5f32, -2., 7.], &Device::Cpu)?;
/// let target = Tensor::new(&[1i64, 0, 100], &Device::Cpu)?;
/// let mask = Tensor::new(&[1u8, 1, 0], &Device::Cpu)?;
/// let loss = L1Loss::new().with_mask(mask).forward(&input, &target)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 1.25);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct L1Loss {
    pub(crate) options: ElementOptions,
}

impl L1Loss {
    /// The defaults: no weights, no mask, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::L1Loss;
    /// let input = Tensor::new(&[1f32, -2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[4i64, 0], &Device::Cpu)?;
    /// let loss = L1Loss::new().forward(&input, &target)?;
    /// assert_eq!(loss.to_scalar::<f32>()?, 2.5);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    element_weight_setter! {
        loss: "L1Loss",
        inputs: "let input = Tensor::new(&[1f32, -2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[4i64, 0], &Device::Cpu)?;",
        args: "(&input, &target)",
        options: self.options,
        weighted: "2.75",
    }

    element_mask_setter! {
        loss: "L1Loss",
        inputs: "let input = Tensor::new(&[1f32, -2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[4i64, 0], &Device::Cpu)?;",
        args: "(&input, &target)",
        options: self.options,
        left: "its loss is 0, and the mean does not count it",
        mask: "let mask = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        masked: "3.0",
        counted: "the number of elements, or of those that the mask leaves",
        count: count(NAME),
    }

    loss_setters! {
        loss: "L1Loss",
        inputs: "let input = Tensor::new(&[1f32, -2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[4i64, 0], &Device::Cpu)?;",
        args: "(&input, &target)",
        options: self.options,
        of: "elements",
        mean: "2.5",
        sum: "5.0",
        normalized: "1.25",
    }

    /// The loss, differentiable in the input and in float targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let input = Tensor::new(&[0.25f32, 3.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1f32, 3.], &Device::Cpu)?;
    /// let loss = candle_fused_loss::L1Loss::new().forward(&input, &target)?;
    /// assert_eq!(loss.to_scalar::<f32>()?, 0.375);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, input: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.problem(NAME, Term::L1, input, target)?.forward(input, target)
    }

    /// The loss, and its gradient in the input for an upstream gradient of ones, in one pass and without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let input = Tensor::new(&[0.25f32, 3.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1f32, 3.], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::L1Loss::new().loss_and_grad(&input, &target)?;
    /// assert_eq!(grad.to_vec1::<f32>()?, [-0.5, 0.]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, input: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.problem(NAME, Term::L1, input, target)?.loss_and_grad(input, target)
    }
}

/// The mean absolute error of an input and a target of one shape: [`L1Loss`] with its defaults.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let input = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[4i64, 1], &Device::Cpu)?;
/// assert_eq!(candle_fused_loss::l1(&input, &target)?.to_scalar::<f32>()?, 2.);
/// # Ok(())
/// # }
/// ```
pub fn l1(input: &Tensor, target: &Tensor) -> Result<Tensor> {
    L1Loss::new().forward(input, target)
}
