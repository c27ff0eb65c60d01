//! Sigmoid focal loss.

use crate::elementwise::problem::{ElementOptions, Term};
use crate::reduction::{Normalizer, Reduction};
use candle_core::{Result, Tensor};

const NAME: &str = "sigmoid_focal";

/// Focal loss of logits and binary targets: binary cross-entropy in which elements that are already right count less.
///
/// For a logit x with target t, in nats:
///
/// ```text
/// ce    = t softplus(-x) + (1 - t) softplus(x)
/// p_t   = t sigmoid(x) + (1 - t) sigmoid(-x)
/// a_t   = alpha t + (1 - alpha) (1 - t), or 1 where alpha is negative
/// loss  = w a_t (1 - p_t)^gamma ce
/// ```
///
/// `Mean` divides the sum by the number of elements whose mask is not 0, with weights too. A detector's usual
/// denominator, the number of positive targets, is a normalizer:
/// `with_normalizer(target.to_dtype(DType::F64)?.sum_all()?)`.
///
/// Definition: Lin et al. 2017, as in
/// [`torchvision.ops.sigmoid_focal_loss`](https://docs.pytorch.org/vision/stable/generated/torchvision.ops.sigmoid_focal_loss.html)
/// (whose default reduction is none); weights and mask are this crate's.
///
/// # Shapes
/// Logits of any shape and layout, and a target of the same shape. Weight and mask broadcast to it. The loss is a
/// scalar, or with [`Reduction::None`] has that shape.
///
/// # Dtypes
/// Logits f16, bf16, f32 or f64; targets of these or, holding 0 and 1, u8, u32, i16, i32 or i64. Arithmetic and loss
/// are f32 (f64 for f64); the gradient has the logits' dtype.
///
/// # Numerics
/// Value and gradient are finite for every finite logit and any gamma >= 0, also below 1.
///
/// # Errors
/// Shapes, dtypes or devices that don't fit; gamma negative or not finite; alpha above 1 or NaN; integer targets other
/// than 0 and 1 where the mask does not leave them out, as for [`BceWithLogitsLoss`](crate::BceWithLogitsLoss). Setters
/// check nothing: all errors come from the call that takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::SigmoidFocalLoss;
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[0f32, 4.], &Device::Cpu)?;
/// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
/// let loss = SigmoidFocalLoss::new().with_gamma(1.5).forward(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 1.496970).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SigmoidFocalLoss {
    pub(crate) options: ElementOptions,
    pub(crate) alpha: f64,
    pub(crate) gamma: f64,
}

impl Default for SigmoidFocalLoss {
    fn default() -> Self {
        SigmoidFocalLoss { options: ElementOptions::default(), alpha: 0.25, gamma: 2.0 }
    }
}

impl SigmoidFocalLoss {
    /// The defaults: alpha 0.25, gamma 2, no weights, no mask, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::SigmoidFocalLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = SigmoidFocalLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.640440).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the weight of positive targets, in [0, 1] and 0.25 by default; negative targets weigh `1 - alpha`. A
    /// negative number turns both weights off.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::SigmoidFocalLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = SigmoidFocalLoss::new().with_alpha(-1.0).forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.911682).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets the exponent, 0 or more and 2 by default; 0 makes this a binary cross-entropy, weighted by alpha.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::SigmoidFocalLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = SigmoidFocalLoss::new().with_gamma(0.5).forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.809818).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_gamma(mut self, gamma: f64) -> Self {
        self.gamma = gamma;
        self
    }

    element_weight_setter! {
        loss: "SigmoidFocalLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        weighted: "1.248389",
    }

    element_mask_setter! {
        loss: "SigmoidFocalLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        left: "its loss is 0, and the mean does not count it",
        mask: "let mask = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        masked: "0.0433217",
        counted: "the number of elements, or of those that the mask leaves",
        count: count(NAME),
    }

    element_check_setter! {
        loss: "SigmoidFocalLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        values: "an integer target other than 0 and 1",
        refused: "let target = Tensor::new(&[1u8, 255], &Device::Cpu)?;",
    }

    loss_setters! {
        loss: "SigmoidFocalLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        of: "elements",
        mean: "0.640440",
        sum: "1.280880",
        normalized: "0.32022",
    }

    /// The loss, differentiable in the logits and in float targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[1e4f32, -1e4], &Device::Cpu)?;
    /// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
    /// let loss = candle_fused_loss::SigmoidFocalLoss::new().forward(&logits, &target)?;
    /// assert_eq!(loss.to_scalar::<f32>()?, 0.);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.problem(NAME, self.term(), logits, target)?.forward(logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones, in one pass and without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[0f32], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::SigmoidFocalLoss::new().loss_and_grad(&logits, &target)?;
    /// assert!((grad.to_vec1::<f32>()?[0] + 0.0745717).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.problem(NAME, self.term(), logits, target)?.loss_and_grad(logits, target)
    }

    pub(crate) fn term(&self) -> Term {
        // a NaN is kept, to be refused
        let alpha = if self.alpha < 0.0 { None } else { Some(self.alpha) };
        Term::Focal { alpha, gamma: self.gamma }
    }
}

/// The mean focal loss of logits and binary targets of one shape, in nats: [`SigmoidFocalLoss`] with its defaults.
///
/// The formula, shapes, dtypes, numerics, errors and the definition's source are those of [`SigmoidFocalLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[0f32], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32], &Device::Cpu)?;
/// let loss = candle_fused_loss::sigmoid_focal(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.25 * 0.25 * std::f32::consts::LN_2).abs() < 1e-7);
/// # Ok(())
/// # }
/// ```
pub fn sigmoid_focal(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    SigmoidFocalLoss::new().forward(logits, target)
}
