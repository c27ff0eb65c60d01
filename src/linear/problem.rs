//! Linear cross-entropy as it is asked for: its options and their checks.

use crate::check;
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
use candle_core::{Result, Tensor, bail};

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
        let arithmetic = check::arithmetic_dtype(name, "hidden states", hidden)?;
        let (rows, features) = match hidden.dims() {
            [] => bail!("{name}: scalar hidden states, expected shape (…, D)"),
            [.., 0] => bail!("{name}: no features in hidden states of shape {:?}, expected some", hidden.dims()),
            [rows @ .., features] => (rows, *features),
        };
        match options.rows.class_axis {
            None | Some(-1) => {}
            Some(axis) if axis == rows.len() as isize => {}
            Some(axis) => bail!("{name}: class axis {axis}, expected -1: the logits of a linear layer have it last"),
        }
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
            check::same_device(name, what, tensor, hidden)?;
            if tensor.dtype() != hidden.dtype() {
                bail!("{name}: {what} of dtype {:?}, expected the hidden states' {:?}", tensor.dtype(), hidden.dtype());
            }
        }
        check::same_device(name, "target", target, hidden)?;
        if target.dims() != rows {
            bail!("{name}: target of shape {:?}, expected class indices of shape {rows:?}", target.dims());
        }
        check::class_indices(name, target)?;
        let (rows, form) = options.rows.checked(name, (classes, rows), hidden, arithmetic)?;
        let options = SoftmaxOptions { rows, ..options.clone() };
        Ok(Linear { problem: CrossEntropy { name, axis: 1, form, options }, chunk_rows: self.chunk_rows })
    }
}

/// The checked options.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    /// The loss of all logits at once.
    pub problem: CrossEntropy,
    pub chunk_rows: Option<usize>,
}

/// The gradients that [`LinearCrossEntropyLoss::loss_and_grad`](crate::LinearCrossEntropyLoss::loss_and_grad) returns,
/// each with the shape and dtype of its input.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_fused_loss::{LinearCrossEntropyLoss, LinearGradients};
/// # fn main() -> candle_core::Result<()> {
/// let hidden = Tensor::ones((1, 2), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
/// let target = Tensor::new(&[0u32], &Device::Cpu)?;
/// let (_, LinearGradients { weight, .. }) =
///     LinearCrossEntropyLoss::new().loss_and_grad(&hidden, &weight, None, &target)?;
/// assert_eq!(weight.to_vec2::<f32>()?[0], [-0.75, -0.75]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LinearGradients {
    /// The gradient in the hidden states.
    pub hidden: Tensor,
    /// The gradient in the weight.
    pub weight: Tensor,
    /// The gradient in the bias, if there is one.
    pub bias: Option<Tensor>,
}
