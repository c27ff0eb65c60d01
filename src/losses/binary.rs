//! Binary cross-entropy, of probabilities and of logits.

use crate::elementwise::problem::{ElementOptions, Term};
use crate::reduction::{Normalizer, Reduction};
use candle_core::{Result, Tensor};

const BCE: &str = "binary_cross_entropy";
const BCE_WITH_LOGITS: &str = "binary_cross_entropy_with_logits";

/// Binary cross-entropy of probabilities and targets in [0, 1].
///
/// For a probability x with target t, in nats:
///
/// ```text
/// loss = -w (t max(ln x, -100) + (1 - t) max(ln(1 - x), -100))
/// ```
///
/// `Mean` divides the sum by the number of elements whose mask is not 0, with weights too. The gradient is
/// `w (x - t) / max(x (1 - x), 1e-12)`. For probabilities that a sigmoid made, [`BceWithLogitsLoss`] of its input is
/// more accurate and faster.
///
/// Definition: [`torch.nn.BCELoss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.BCELoss.html); the mask is
/// this crate's own. The gradient in a float target is the difference of the clamped logarithms, whereas PyTorch's is
/// infinite where a probability is 0 or 1.
///
/// # Shapes
/// Probabilities of any shape and layout, and a target of the same shape. Weight and mask broadcast to it. The loss is
/// a scalar, or with [`Reduction::None`] has that shape.
///
/// # Dtypes
/// Probabilities f16, bf16, f32 or f64; targets of these or, holding 0 and 1, u8, u32, i16, i32 or i64. Arithmetic and
/// loss are f32 (f64 for f64); the gradient has the probabilities' dtype.
///
/// # Numerics
/// Finite everywhere in [0, 1], the ends included.
///
/// # Errors
/// Shapes, dtypes or devices that don't fit; on the CPU a probability or target outside of [0, 1], or NaN, where the
/// mask does not leave it out; on CUDA such an element is NaN instead, unless
/// [`with_target_check`](Self::with_target_check) is on. Setters check nothing: all errors come from the call that
/// takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{BceLoss, Reduction};
/// # fn main() -> candle_core::Result<()> {
/// let probs = Tensor::new(&[0.5f32, 0., 1.], &Device::Cpu)?;
/// let target = Tensor::new(&[1u8, 0, 0], &Device::Cpu)?;
/// let loss = BceLoss::new().with_reduction(Reduction::None).forward(&probs, &target)?;
/// assert_eq!(loss.to_vec1::<f32>()?, [std::f32::consts::LN_2, 0., 100.]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct BceLoss {
    pub(crate) options: ElementOptions,
}

impl BceLoss {
    /// The defaults: no weights, no mask, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::BceLoss;
    /// let probs = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = BceLoss::new().forward(&probs, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.490415).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        BceLoss { options: ElementOptions::default() }
    }

    element_weight_setter! {
        loss: "BceLoss",
        inputs: "let probs = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&probs, &target)",
        options: self.options,
        weighted: "0.460969",
    }

    element_mask_setter! {
        loss: "BceLoss",
        inputs: "let probs = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&probs, &target)",
        options: self.options,
        left: "its loss is 0, and the mean does not count it",
        mask: "let mask = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        masked: "std::f32::consts::LN_2",
        counted: "the number of elements, or of those that the mask leaves",
        count: count(BCE),
    }

    element_check_setter! {
        loss: "BceLoss",
        inputs: "let probs = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;",
        args: "(&probs, &target)",
        options: self.options,
        values: "a probability or target outside of [0, 1]",
        refused: "let target = Tensor::new(&[1u8, 255], &Device::Cpu)?;",
    }

    loss_setters! {
        loss: "BceLoss",
        inputs: "let probs = Tensor::new(&[0.5f32, 0.25], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&probs, &target)",
        options: self.options,
        of: "elements",
        mean: "0.490415",
        sum: "0.980829",
        normalized: "0.24520725",
    }

    /// The loss, differentiable in the probabilities and in float targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let probs = Tensor::new(&[0.25f32], &Device::Cpu)?;
    /// let target = Tensor::new(&[0f32], &Device::Cpu)?;
    /// let loss = candle_fused_loss::BceLoss::new().forward(&probs, &target)?;
    /// assert!((loss.to_scalar::<f32>()? + 0.75f32.ln()).abs() < 1e-7);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, probs: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.problem(BCE, Term::Bce, probs, target)?.forward(probs, target)
    }

    /// The loss, and its gradient in the probabilities for an upstream gradient of ones, in one pass and without a
    /// graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let probs = Tensor::new(&[0.5f32], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::BceLoss::new().loss_and_grad(&probs, &target)?;
    /// assert_eq!(grad.to_vec1::<f32>()?, [-2.]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, probs: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.problem(BCE, Term::Bce, probs, target)?.loss_and_grad(probs, target)
    }
}

/// Binary cross-entropy of logits and targets, finite for every finite logit.
///
/// For a logit x with target t and positive weight p, in nats:
///
/// ```text
/// loss = w (p t softplus(-x) + (1 - t) softplus(x)),    softplus(x) = log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))
/// ```
///
/// Label smoothing e replaces t by `(1 - e) t + e / 2`. `Mean` divides the sum by the number of elements whose mask is
/// not 0, with weights too. The gradient is `w ((1 - t) sigmoid(x) - p t sigmoid(-x))`.
///
/// Definition:
/// [`torch.nn.BCEWithLogitsLoss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.BCEWithLogitsLoss.html);
/// smoothing as in Keras; the mask is this crate's own.
///
/// # Shapes
/// Logits of any shape and layout, and a target of the same shape. Weight, positive weight and mask broadcast to it.
/// The loss is a scalar, or with [`Reduction::None`] has that shape.
///
/// # Dtypes
/// Logits f16, bf16, f32 or f64; targets of these or, holding 0 and 1, u8, u32, i16, i32 or i64. Arithmetic and loss
/// are f32 (f64 for f64); the gradient has the logits' dtype.
///
/// # Numerics
/// Loss and gradient keep their relative accuracy at either end: a logit of -20 with target 0 has loss 2.06e-9. The
/// loss of a logit of ±inf is 0 where it agrees with a target of exactly 0 or 1, and +inf where it doesn't.
///
/// # Errors
/// Shapes, dtypes or devices that don't fit; label smoothing outside of [0, 1]. On the CPU an integer target other than
/// 0 and 1, where the mask does not leave it out; on CUDA such an element is NaN instead, unless
/// [`with_target_check`](Self::with_target_check) is on. Float targets may be any numbers. Setters check nothing: all
/// errors come from the call that takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_fused_loss::BceWithLogitsLoss;
/// # fn main() -> candle_core::Result<()> {
/// let logits = Var::new(&[[0.5f32, -1.], [2., 1e4]], &Device::Cpu)?;
/// let target = Tensor::new(&[[1u8, 0], [1, 1]], &Device::Cpu)?;
/// let pos_weight = Tensor::new(&[3f32, 1.], &Device::Cpu)?;
/// let loss = BceWithLogitsLoss::new().with_pos_weight(pos_weight).forward(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.529069).abs() < 1e-6);
/// assert!(loss.backward()?.get(&logits).unwrap().sum_all()?.to_scalar::<f32>()?.is_finite());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct BceWithLogitsLoss {
    pub(crate) options: ElementOptions,
}

impl BceWithLogitsLoss {
    /// The defaults: no weights, no mask, no smoothing, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::BceWithLogitsLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = BceWithLogitsLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 1.410038).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        BceWithLogitsLoss { options: ElementOptions::default() }
    }

    element_weight_setter! {
        loss: "BceWithLogitsLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        weighted: "2.300215",
    }

    /// Sets a factor of the positive part of the loss, which broadcasts as the weight does: `(C)` for logits `(N, C)`,
    /// `(C, 1, 1)` for images.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::BceWithLogitsLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let pos_weight = Tensor::new(&[3f32], &Device::Cpu)?;
    /// let loss = BceWithLogitsLoss::new().with_pos_weight(pos_weight).forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 2.103185).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_pos_weight(mut self, pos_weight: Tensor) -> Self {
        self.options.pos_weight = Some(pos_weight);
        self
    }

    /// Sets the label smoothing, a number in [0, 1]; 0 by default.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::BceWithLogitsLoss;
    /// let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let loss = BceWithLogitsLoss::new().with_label_smoothing(0.1).forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 1.360038).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.options.label_smoothing = label_smoothing;
        self
    }

    element_mask_setter! {
        loss: "BceWithLogitsLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        left: "its loss is 0, and the mean does not count it",
        mask: "let mask = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        masked: "std::f32::consts::LN_2",
        counted: "the number of elements, or of those that the mask leaves",
        count: count(BCE_WITH_LOGITS),
    }

    element_check_setter! {
        loss: "BceWithLogitsLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        values: "an integer target other than 0 and 1",
        refused: "let target = Tensor::new(&[1u8, 255], &Device::Cpu)?;",
    }

    loss_setters! {
        loss: "BceWithLogitsLoss",
        inputs: "let logits = Tensor::new(&[0f32, 2.], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[1u8, 0], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        of: "elements",
        mean: "1.410038",
        sum: "2.820075",
        normalized: "0.70501875",
    }

    /// The loss, differentiable in the logits and in float targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[-20f32], &Device::Cpu)?;
    /// let target = Tensor::new(&[0f32], &Device::Cpu)?;
    /// let loss = candle_fused_loss::BceWithLogitsLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 2.06115362e-9).abs() < 1e-15);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.problem(BCE_WITH_LOGITS, Term::BceWithLogits, logits, target)?.forward(logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones, in one pass and without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[0f32], &Device::Cpu)?;
    /// let target = Tensor::new(&[1u8], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::BceWithLogitsLoss::new().loss_and_grad(&logits, &target)?;
    /// assert_eq!(grad.to_vec1::<f32>()?, [-0.5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.problem(BCE_WITH_LOGITS, Term::BceWithLogits, logits, target)?.loss_and_grad(logits, target)
    }
}

/// The mean binary cross-entropy of probabilities and targets of one shape, in nats: [`BceLoss`] with its defaults.
///
/// The formula, shapes, dtypes, numerics, errors and the definition's source are those of [`BceLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let probs = candle_nn::ops::sigmoid(&Tensor::new(&[0.7f32, 0.2, 0.9], &Device::Cpu)?)?;
/// let target = Tensor::new(&[1f32, 0., 1.], &Device::Cpu)?;
/// let loss = candle_fused_loss::binary_cross_entropy(&probs, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.514160).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn binary_cross_entropy(probs: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceLoss::new().forward(probs, target)
}

/// The mean binary cross-entropy of logits and targets of one shape, in nats: [`BceWithLogitsLoss`] with its defaults.
///
/// The formula, shapes, dtypes, numerics, errors and the definition's source are those of [`BceWithLogitsLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[0.5f32, -1., 2.], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32, 0., 1.], &Device::Cpu)?;
/// let loss = candle_fused_loss::binary_cross_entropy_with_logits(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 0.304756).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn binary_cross_entropy_with_logits(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    BceWithLogitsLoss::new().forward(logits, target)
}

/// [`binary_cross_entropy_with_logits`] under the name that `candle_nn::loss` gives it.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[1e4f32], &Device::Cpu)?;
/// let target = Tensor::new(&[1f32], &Device::Cpu)?;
/// let loss = candle_fused_loss::binary_cross_entropy_with_logit(&logits, &target)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 0.);
/// # Ok(())
/// # }
/// ```
pub fn binary_cross_entropy_with_logit(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    binary_cross_entropy_with_logits(logits, target)
}
