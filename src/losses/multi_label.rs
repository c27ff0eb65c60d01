//! Multi-label soft margin.

use crate::elementwise::problem::ElementOptions;
use crate::reduction::{Normalizer, Reduction};
use candle_core::{Result, Tensor};

const NAME: &str = "multi_label_soft_margin";

/// Multi-label soft margin of logits and binary targets: the mean binary cross-entropy over the classes of a row.
///
/// For a row of logits x with targets t, in nats:
///
/// ```text
/// loss = -(1 / C) sum_c w_c (t_c log sigmoid(x_c) + (1 - t_c) log sigmoid(-x_c))
/// ```
///
/// `Mean` divides the sum of the rows' losses by the number of rows. With a mask, C is the number of the row's classes
/// that are left, the sum is over these, and a row without any is left out: its loss is 0, and it is not counted.
///
/// Definition:
/// [`torch.nn.MultiLabelSoftMarginLoss`](https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiLabelSoftMarginLoss.html);
/// the mask is this crate's own.
///
/// # Shapes
/// Logits `(C)` or `(…, C)` in any layout, and a target of the same shape. Weights are `(C)`, a mask broadcasts to the
/// logits. The loss is a scalar, or with [`Reduction::None`] has the logits' shape without the last axis.
///
/// # Dtypes
/// Logits f16, bf16, f32 or f64; targets of these or, holding 0 and 1, u8, u32, i16, i32 or i64. Arithmetic and loss
/// are f32 (f64 for f64); the gradient has the logits' dtype.
///
/// # Numerics
/// As for [`BceWithLogitsLoss`](crate::BceWithLogitsLoss). The classes that a mask leaves are counted ahead of the
/// loss, by a few of candle's tensor ops.
///
/// # Errors
/// Shapes, dtypes or devices that don't fit; integer targets other than 0 and 1 where the mask does not leave them out,
/// as for [`BceWithLogitsLoss`](crate::BceWithLogitsLoss). Setters check nothing: all errors come from the call that
/// takes the tensors.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::MultiLabelSoftMarginLoss;
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0.5f64, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[0.5f64, 2., 1.5], &Device::Cpu)?;
/// let loss = MultiLabelSoftMarginLoss::new().with_weight(weight).forward(&logits, &target)?;
/// assert!((loss.to_scalar::<f64>()? - 1.1801210641860962).abs() < 1e-7);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct MultiLabelSoftMarginLoss {
    pub(crate) options: ElementOptions,
}

impl MultiLabelSoftMarginLoss {
    /// The defaults: no weights, no mask, mean.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::MultiLabelSoftMarginLoss;
    /// let logits = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;
    /// let loss = MultiLabelSoftMarginLoss::new().forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 0.892902).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn new() -> Self {
        MultiLabelSoftMarginLoss { options: ElementOptions::default() }
    }

    /// Sets class weights, one for each class: shape `(C)`, any float dtype. They are constants: no gradient flows into
    /// them.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::MultiLabelSoftMarginLoss;
    /// let logits = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;
    /// let weight = Tensor::new(&[0.5f32, 2., 1.5], &Device::Cpu)?;
    /// let loss = MultiLabelSoftMarginLoss::new().with_weight(weight).forward(&logits, &target)?;
    /// assert!((loss.to_scalar::<f32>()? - 1.180121).abs() < 1e-6);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn with_weight(mut self, weight: Tensor) -> Self {
        self.options.weight = Some(weight);
        self
    }

    element_mask_setter! {
        loss: "MultiLabelSoftMarginLoss",
        inputs: "let logits = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        left: "and its row's sum is divided by the number of classes that are left. A row without any has loss 0, and \
               the mean does not count it",
        mask: "let mask = Tensor::new(&[[1u8, 1, 0], [0, 0, 0]], &Device::Cpu)?;",
        masked: "0.393669",
        counted: "the number of rows, or of those with a class that the mask leaves",
        count: multi_label_count(NAME),
    }

    element_check_setter! {
        loss: "MultiLabelSoftMarginLoss",
        inputs: "let logits = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        values: "an integer target other than 0 and 1",
        refused: "let target = Tensor::new(&[[1u8, 255, 1], [0, 1, 0]], &Device::Cpu)?;",
    }

    loss_setters! {
        loss: "MultiLabelSoftMarginLoss",
        inputs: "let logits = Tensor::new(&[[0.5f32, -1., 3.], [1.5, -2., 0.]], &Device::Cpu)?;\n\
                 let target = Tensor::new(&[[1u8, 0, 1], [0, 1, 0]], &Device::Cpu)?;",
        args: "(&logits, &target)",
        options: self.options,
        of: "rows",
        mean: "0.892902",
        sum: "1.785805",
        normalized: "0.44645125",
    }

    /// The loss, differentiable in the logits and in float targets.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[0f32, 0.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
    /// let loss = candle_fused_loss::MultiLabelSoftMarginLoss::new().forward(&logits, &target)?;
    /// assert_eq!(loss.to_scalar::<f32>()?, std::f32::consts::LN_2);
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward(&self, logits: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.options.multi_label_problem(NAME, logits, target)?.forward(logits, target)
    }

    /// The loss, and its gradient in the logits for an upstream gradient of ones, in one pass and without a graph.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # fn main() -> candle_core::Result<()> {
    /// let logits = Tensor::new(&[0f32, 0.], &Device::Cpu)?;
    /// let target = Tensor::new(&[1f32, 0.], &Device::Cpu)?;
    /// let (_, grad) = candle_fused_loss::MultiLabelSoftMarginLoss::new().loss_and_grad(&logits, &target)?;
    /// assert_eq!(grad.to_vec1::<f32>()?, [-0.25, 0.25]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn loss_and_grad(&self, logits: &Tensor, target: &Tensor) -> Result<(Tensor, Tensor)> {
        self.options.multi_label_problem(NAME, logits, target)?.loss_and_grad(logits, target)
    }
}

/// The mean multi-label soft margin of logits and targets `(N, C)`, in nats: [`MultiLabelSoftMarginLoss`] with its
/// defaults.
///
/// The formula, the other shapes, dtypes, numerics, errors and the definition's source are those of
/// [`MultiLabelSoftMarginLoss`].
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[0f32, 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[[1u32, 0]], &Device::Cpu)?;
/// let loss = candle_fused_loss::multi_label_soft_margin(&logits, &target)?;
/// assert_eq!(loss.to_scalar::<f32>()?, std::f32::consts::LN_2);
/// # Ok(())
/// # }
/// ```
pub fn multi_label_soft_margin(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    MultiLabelSoftMarginLoss::new().forward(logits, target)
}
