//! Cross-entropy as the kernels are asked for it: its options, their checks, what a forward leaves for the backward,
//! and the kernels that a device has.

use crate::check::{self, arithmetic};
use crate::custom_op::{Arg, Argument, DeviceStorage};
use crate::reduction::LossForm;
use crate::rows::layout::{Rows, row_shape, rows_like, rows_of};
use crate::rows::options::RowOptions;
use crate::softmax::transform::RowTransform;
use candle_core::{DType, Device, Layout, Result, Shape, Tensor, bail};

/// The options of cross-entropy.
#[derive(Clone, Debug)]
pub(crate) struct SoftmaxOptions {
    pub rows: RowOptions,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: Option<f64>,
    pub logit_scale: f64,
    /// What becomes of the own class's negative log-likelihood.
    pub row_transform: Option<RowTransform>,
}

impl Default for SoftmaxOptions {
    fn default() -> Self {
        SoftmaxOptions {
            rows: RowOptions::default(),
            label_smoothing: 0.0,
            z_loss: 0.0,
            softcap: None,
            logit_scale: 1.0,
            row_transform: None,
        }
    }
}

impl SoftmaxOptions {
    /// What can be said without looking at the tensors.
    pub fn check(&self, name: &str) -> Result<()> {
        check::in_unit_interval(name, "label smoothing", self.label_smoothing)?;
        if !self.z_loss.is_finite() || self.z_loss < 0.0 {
            bail!("{name}: z-loss factor {}, expected a finite number of 0 or more", self.z_loss);
        }
        check::finite(name, "logit scale", self.logit_scale)?;
        self.row_transform.map_or(Ok(()), |transform| transform.check(name))?;
        match self.softcap {
            Some(cap) if !(cap.is_finite() && cap > 0.0) => {
                bail!("{name}: soft cap {cap}, expected a finite number above 0")
            }
            _ => self.rows.check(name),
        }
    }

    /// The logit scale as a factor of the logits ahead of a soft cap, and one of their differences to the row's
    /// largest. Without a cap the first is the scale's sign: a difference does not overflow where a product would, and
    /// does not lose what a product's rounding does. A scale of 0 makes all logits 0.
    pub fn split_scale(&self) -> (f64, f64) {
        match self.logit_scale {
            scale if self.softcap.is_some() || scale == 0.0 => (scale, 1.0),
            scale => (scale.signum(), scale.abs()),
        }
    }

    /// Checks both tensors against the options.
    pub fn problem(&self, name: &'static str, logits: &Tensor, target: &Tensor) -> Result<CrossEntropy> {
        self.check(name)?;
        let arithmetic = check::arithmetic_dtype(name, "logits", logits)?;
        let axis = check::class_axis(name, logits, self.rows.class_axis)?;
        check::same_device(name, "target", target, logits)?;
        let mut rows = logits.dims().to_vec();
        let classes = rows.remove(axis);
        if target.dims() == rows {
            check::class_indices(name, target)?;
        } else if target.dims() != logits.dims() {
            return Err(check::not_of_rows(name, target, logits, axis, " or probabilities of the logits' shape"));
        } else if !check::is_float(target.dtype()) {
            bail!(
                "{name}: a target of the logits' shape {:?} holds probabilities, which can't have dtype {:?}, expected \
                 f16, bf16, f32 or f64, or class indices of shape {rows:?}; for a label of each logit there is \
                 BceWithLogitsLoss",
                logits.dims(),
                target.dtype()
            );
        } else if self.rows.ignore_index >= 0 {
            bail!(
                "{name}: ignore_index {} with probability targets, expected none: it is for class indices",
                self.rows.ignore_index
            );
        }
        if target.dtype().is_float()
            && let Some(transform) = self.row_transform
        {
            bail!(
                "{name}: row transform {transform:?} with probability targets, expected none: it is for class indices"
            );
        }
        let (rows, form) = self.rows.checked(name, (classes, &rows), logits, arithmetic)?;
        Ok(CrossEntropy { name, axis, form, options: SoftmaxOptions { rows, ..self.clone() } })
    }
}

/// A cross-entropy whose options and tensors go together.
#[derive(Clone, Debug)]
pub(crate) struct CrossEntropy {
    /// The public function, for errors that only the data can cause.
    pub name: &'static str,
    /// The class axis of the logits.
    pub axis: usize,
    /// What becomes of the rows' losses.
    pub form: LossForm,
    pub options: SoftmaxOptions,
}

impl CrossEntropy {
    pub fn rows(&self, logits: &Layout) -> Result<Rows> {
        rows_of(self.name, logits, self.axis)
    }

    /// The rows of probability targets.
    pub fn target_rows(&self, target: &Layout, logits: &Rows) -> Result<Rows> {
        rows_like(self.name, target, self.axis, logits)
    }

    pub fn loss_shape(&self, logits: &Layout) -> Shape {
        self.form.shape(row_shape(logits, self.axis))
    }
}

/// What the backward needs of the forward: numbers of the arithmetic dtype, along one axis. First the maximum m of each
/// row; then each row's sum of `exp(x - m)` over the other classes; with probability targets, or class weights and
/// smoothing, the mass of each row; with a row transform, its slope; and last the denominator, which the sum of the
/// rows' losses is divided by: 1 for a plain sum, or where each row has its loss.
#[derive(Clone, Debug)]
pub(crate) struct Saved(pub Tensor);

/// The numbers of each row that [`CrossEntropyLoss::statistics`](crate::CrossEntropyLoss::statistics) and
/// [`forward_with_statistics`](crate::CrossEntropyLoss::forward_with_statistics) return.
///
/// # Shapes
/// Each tensor has the shape of class indices.
///
/// # Dtypes
/// f32 (f64 for f64 logits), but for `argmax`, u32, and `correct` and `counted`, f32.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{CrossEntropyLoss, RowStatistics};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 2., 3.], [5., 2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 1], &Device::Cpu)?;
/// let RowStatistics { argmax, correct, .. } = CrossEntropyLoss::new().statistics(&logits, &target)?;
/// assert_eq!(argmax.to_vec1::<u32>()?, [2, 0]);
/// assert_eq!(correct.to_vec1::<f32>()?, [1., 0.]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RowStatistics {
    /// The row's loss in nats, before any reduction; 0 for an ignored row.
    pub loss: Tensor,
    /// `log sum_c exp(x_c)` after scale and soft cap; 0 for an ignored row.
    pub lse: Tensor,
    /// The part `z lse^2` of the loss; 0 for an ignored row.
    pub z_loss: Tensor,
    /// The entropy `-sum_c p_c log p_c` of the prediction in nats; 0 for an ignored row.
    pub entropy: Tensor,
    /// The first class whose logit is the largest, for an ignored row too; u32.
    pub argmax: Tensor,
    /// 1 where `argmax` is the target class, or the first of a probability target's most probable classes; else 0, also
    /// for an ignored row; f32.
    pub correct: Tensor,
    /// 1 where the row counts, 0 where it is ignored; f32.
    pub counted: Tensor,
}

/// How many numbers [`RowStatistics`] has of each row.
pub(crate) const STATISTICS: usize = 7;

impl RowStatistics {
    /// The share of the rows that count whose prediction is correct: a scalar, f32, NaN where no row counts. Exact up
    /// to 2^24 rows.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fused_loss::CrossEntropyLoss;
    /// let logits = Tensor::new(&[[1f32, 2., 3.], [5., 2., 0.], [0., 0., 1.]], &Device::Cpu)?;
    /// let target = Tensor::new(&[2i64, 1, -100], &Device::Cpu)?;
    /// let rows = CrossEntropyLoss::new().statistics(&logits, &target)?;
    /// assert_eq!(rows.accuracy()?.to_scalar::<f32>()?, 0.5); // the last row is ignored
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn accuracy(&self) -> Result<Tensor> {
        self.correct.sum_all()? / self.counted.sum_all()?
    }

    /// From tensors in the order of the fields, in which kernels have them too.
    pub(crate) fn in_order(tensors: [Tensor; STATISTICS]) -> Self {
        let [loss, lse, z_loss, entropy, argmax, correct, counted] = tensors;
        RowStatistics { loss, lse, z_loss, entropy, argmax, correct, counted }
    }

    /// Zeros: of rows that are all ignored and have no logits, or of no rows.
    pub(crate) fn zeros(shape: &Shape, arithmetic: DType, device: &Device) -> Result<Self> {
        let zeros = |dtype: DType| Tensor::zeros(shape, dtype, device);
        let (number, flag) = (zeros(arithmetic)?, zeros(DType::F32)?);
        let numbers = || number.clone();
        Ok(Self::in_order([numbers(), numbers(), numbers(), numbers(), zeros(DType::U32)?, flag.clone(), flag]))
    }

    /// In the same order.
    pub(crate) fn all(&self) -> [&Tensor; STATISTICS] {
        [&self.loss, &self.lse, &self.z_loss, &self.entropy, &self.argmax, &self.correct, &self.counted]
    }

    /// A function of each, which is told its place in that order.
    pub(crate) fn try_map(&self, f: impl Fn(usize, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let all = self.all();
        let f = |i: usize| f(i, all[i]);
        Ok(Self::in_order([f(0)?, f(1)?, f(2)?, f(3)?, f(4)?, f(5)?, f(6)?]))
    }

    /// The rows of several pieces, each with one axis, one after the other.
    pub(crate) fn cat(pieces: &[Self]) -> Result<Option<Self>> {
        let of_all =
            |i: usize, _: &Tensor| Tensor::cat(&pieces.iter().map(|piece| piece.all()[i]).collect::<Vec<_>>(), 0);
        pieces.first().map(|first| first.try_map(of_all)).transpose()
    }
}

/// The dtype that kernels write the gradient of probability targets in: the logits' where the targets have it too, so
/// that nothing is left to convert, else the arithmetic one.
pub(crate) fn target_gradient_dtype(logits: DType, target: DType) -> DType {
    if logits == target { logits } else { arithmetic(logits) }
}

/// The softmax family's kernels of a device. Logits and probabilities are as [`as_rows`](crate::rows::layout::as_rows)
/// leaves them, class indices contiguous.
pub(crate) trait SoftmaxKernels: DeviceStorage {
    /// The loss, and what the backward needs.
    fn forward(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Saved)>;

    /// The gradient of an argument, in the order that [`Rows::class_last`] says; of a target in the
    /// [`target_gradient_dtype`].
    fn backward(
        problem: &CrossEntropy,
        saved: &Saved,
        of: Argument,
        logits: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self>;

    /// The loss, and the gradient of the logits for an upstream gradient of ones.
    fn loss_and_grad(problem: &CrossEntropy, logits: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)>;

    /// As [`Self::loss_and_grad`]; the gradient replaces the logits, which are contiguous.
    fn loss_and_grad_inplace(
        problem: &CrossEntropy,
        logits: &mut Self,
        layout: &Layout,
        target: Arg<Self>,
    ) -> Result<Self>;

    /// As [`Self::forward`], and the statistics of each row in the order of [`RowStatistics`].
    fn forward_with_statistics(
        problem: &CrossEntropy,
        logits: Arg<Self>,
        target: Arg<Self>,
    ) -> Result<(Self, Saved, [Self; STATISTICS])>;

    /// `x - log sum exp(x)` of each row, in the order that [`Rows::class_last`] says; with `save`, maximum and rest as
    /// in [`Saved`], of shape `(2, rows)`.
    fn log_softmax(name: &str, logits: &Self, rows: &Rows, save: bool) -> Result<(Self, Option<Self>)>;

    /// `g - p sum(g)` of each row, in the order of [`Self::log_softmax`], from the statistics that it saved.
    fn log_softmax_backward(
        name: &str,
        logits: (&Self, &Rows),
        statistics: &Tensor,
        upstream: (&Self, &Rows),
    ) -> Result<Self>;
}
