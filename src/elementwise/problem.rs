//! The element-wise family as its kernels are asked for it: terms with the ranges of their parameters, options and
//! their checks.

use crate::cast::computable;
use crate::check;
use crate::custom_op::{Arg, Argument, DeviceStorage, Locked};
use crate::reduction::{Denominator, LossForm, Normalizer, Reduction};
use candle_core::{D, DType, Error, Layout, Result, Shape, Tensor, bail};

/// The formula of one element, of an input x, a target t and a positive weight p.
///
/// A term is declared here; its formula is in `terms.rs` for the CPU, in `kernels/elementwise/terms.cuh` for CUDA and
/// in `composed.rs` in tensor ops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Term {
    /// `-(t max(ln x, -100) + (1 - t) max(ln(1 - x), -100))` for a probability x
    Bce,
    /// `t p softplus(-x) + (1 - t) softplus(x)` for a logit x
    BceWithLogits,
    /// `a u^gamma (t softplus(-x) + (1 - t) softplus(x))`, `u = t sigmoid(-x) + (1 - t) sigmoid(x)`,
    /// `a = alpha t + (1 - alpha) (1 - t)` or 1, for a logit x
    Focal { alpha: Option<f64>, gamma: f64 },
    /// `|x - t|`
    L1,
}

/// How many numbers the kernels are given as a term's parameters: `TERM_PARAMETERS` of `kernels/elementwise/terms.cuh`.
pub(crate) const TERM_PARAMETERS: usize = 3;

/// What a term is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Domain {
    /// Probabilities and targets in [0, 1].
    Probabilities,
    /// Logits, and targets that are 0 or 1 if they are integers. Floats may be anything.
    Logits,
    /// Any numbers.
    Numbers,
}

impl Domain {
    /// The input in words, for errors.
    fn input(self) -> &'static str {
        match self {
            Domain::Probabilities => "probabilities",
            Domain::Logits => "logits",
            Domain::Numbers => "input",
        }
    }
}

/// Which operands of a problem have to be in [0, 1], where no mask takes them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnitOperands {
    pub input: bool,
    pub target: bool,
}

/// All that the crate has to know of a term but its formula.
pub(crate) struct TermDeclaration {
    pub domain: Domain,
    /// Its number in `FOR_EACH_TERM` of `kernels/elementwise/terms.cuh`.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub number: i32,
    /// The parameters, in the order of the enum in its struct in `kernels/elementwise/terms.cuh`; unused places are 0.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub parameters: [f64; TERM_PARAMETERS],
    /// The kernels that only this term has, if any: its line in `FOR_EACH_DENSE_TERM` of
    /// `kernels/elementwise/terms.cuh`.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub dense: Option<DenseKernels>,
}

/// The names of a term's dense kernels.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
#[derive(Clone, Copy)]
pub(crate) struct DenseKernels {
    pub loss: &'static str,
    /// The loss with its gradient.
    pub fused: &'static str,
    pub grad: &'static str,
}

impl Term {
    pub fn declaration(&self) -> TermDeclaration {
        match *self {
            Term::Bce => TermDeclaration {
                domain: Domain::Probabilities,
                number: 0,
                parameters: [0.0; TERM_PARAMETERS],
                dense: Some(DenseKernels { loss: "loss_bce_dense", fused: "fused_bce_dense", grad: "grad_bce_dense" }),
            },
            Term::BceWithLogits => TermDeclaration {
                domain: Domain::Logits,
                number: 1,
                parameters: [0.0; TERM_PARAMETERS],
                dense: Some(DenseKernels {
                    loss: "loss_bce_with_logits_dense",
                    fused: "fused_bce_with_logits_dense",
                    grad: "grad_bce_with_logits_dense",
                }),
            },
            Term::Focal { alpha, gamma } => TermDeclaration {
                domain: Domain::Logits,
                number: 2,
                parameters: match alpha {
                    Some(alpha) => [alpha, 1.0 - alpha, gamma],
                    None => [1.0, 1.0, gamma],
                },
                dense: Some(DenseKernels {
                    loss: "loss_focal_dense",
                    fused: "fused_focal_dense",
                    grad: "grad_focal_dense",
                }),
            },
            Term::L1 => {
                TermDeclaration { domain: Domain::Numbers, number: 3, parameters: [0.0; TERM_PARAMETERS], dense: None }
            }
        }
    }

    /// Checks the ranges of the term's parameters.
    fn check(&self, name: &str) -> Result<()> {
        match *self {
            Term::Bce | Term::BceWithLogits | Term::L1 => Ok(()),
            Term::Focal { gamma, .. } if !gamma.is_finite() || gamma < 0.0 => {
                bail!("{name}: gamma {gamma}, expected a finite number of 0 or more")
            }
            // a negative alpha never gets here: it means off
            Term::Focal { alpha, .. } => alpha.map_or(Ok(()), |alpha| check::in_unit_interval(name, "alpha", alpha)),
        }
    }
}

/// The options of the losses on elements.
///
/// In a problem, weights and mask are views of the input's shape (stride 0 where they were broadcast), detached; the
/// weights in the arithmetic dtype.
#[derive(Clone, Debug)]
pub(crate) struct ElementOptions {
    /// Factors of the loss and of its positive part.
    pub weight: Option<Tensor>,
    pub pos_weight: Option<Tensor>,
    /// Elements where this is 0 don't count.
    pub mask: Option<Tensor>,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    /// What `Mean` divides by in place of the number of elements that count.
    pub normalizer: Option<Normalizer>,
    /// A factor of the gradients of a pass without a graph.
    pub grad_scale: f64,
    /// On CUDA: synchronise to check the values that have to be in [0, 1]. The CPU always checks them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub target_check: bool,
    /// Whether to run the kernels where there are some, not candle's tensor ops.
    pub fused: bool,
}

impl Default for ElementOptions {
    fn default() -> Self {
        ElementOptions {
            weight: None,
            pos_weight: None,
            mask: None,
            label_smoothing: 0.0,
            reduction: Reduction::Mean,
            normalizer: None,
            grad_scale: 1.0,
            target_check: false,
            fused: true,
        }
    }
}

impl ElementOptions {
    /// Checks both tensors against the options.
    pub fn problem(&self, name: &'static str, term: Term, input: &Tensor, target: &Tensor) -> Result<Elements> {
        self.problem_of((name, term, false), input, target)
    }

    fn problem_of(
        &self,
        (name, term, average_rows): (&'static str, Term, bool),
        input: &Tensor,
        target: &Tensor,
    ) -> Result<Elements> {
        let arithmetic = check::arithmetic_dtype(name, term.declaration().domain.input(), input)?;
        check::in_unit_interval(name, "label smoothing", self.label_smoothing)?;
        check::finite(name, "grad scale", self.grad_scale)?;
        term.check(name)?;
        check::same_device(name, "target", target, input)?;
        if target.dims() != input.dims() {
            bail!("{name}: target of shape {:?}, expected the input's shape {:?}", target.dims(), input.dims());
        }
        check::number(name, "target", target.dtype())?;
        let options = ElementOptions {
            weight: check::broadcast_weights(name, "weight", &self.weight, input, arithmetic)?,
            pos_weight: check::broadcast_weights(name, "pos_weight", &self.pos_weight, input, arithmetic)?,
            mask: self.checked_mask(name, input)?,
            ..self.clone()
        };
        let each = losses_shape(input.shape(), average_rows);
        let form = LossForm::new(name, (self.reduction, self.normalizer.as_ref()), input, &each)?;
        Ok(Elements { name, term, average_rows, form, options })
    }

    /// The mask as a view of the input's shape.
    fn checked_mask(&self, name: &str, input: &Tensor) -> Result<Option<Tensor>> {
        let Some(mask) = &self.mask else { return Ok(None) };
        check::number(name, "mask", mask.dtype())?;
        check::same_device(name, "mask", mask, input)?;
        check::broadcast(name, "mask", mask.detach(), input).map(Some)
    }

    /// As [`Self::problem`] for losses that average the last axis, with weights for its classes.
    pub fn multi_label_problem(&self, name: &'static str, input: &Tensor, target: &Tensor) -> Result<Elements> {
        let classes = classes(name, input)?;
        match &self.weight {
            Some(weight) if weight.dims() != [classes] => {
                bail!("{name}: class weights of shape {:?}, expected ({classes}), one for each class", weight.dims())
            }
            _ => {}
        }
        let problem = self.problem_of((name, Term::BceWithLogits, true), input, target)?;
        problem.averaging_unmasked(classes, check::arithmetic(input.dtype()))
    }

    /// What the mean of elements with these targets divides by, a scalar f64 on their device.
    pub fn count(&self, name: &str, target: &Tensor) -> Result<Tensor> {
        self.count_of(name, target, false)
    }

    /// As [`Self::count`] for losses that average the last axis.
    pub fn multi_label_count(&self, name: &str, target: &Tensor) -> Result<Tensor> {
        classes(name, target)?;
        self.count_of(name, target, true)
    }

    fn count_of(&self, name: &str, target: &Tensor, average_rows: bool) -> Result<Tensor> {
        check::number(name, "target", target.dtype())?;
        let mask = self.checked_mask(name, target)?;
        let each = losses_shape(target.shape(), average_rows);
        let constant = |value: f64| Tensor::full(value, (), target.device());
        match (LossForm::new(name, (Reduction::Mean, self.normalizer.as_ref()), target, &each)?, mask) {
            (LossForm::Scalar(Denominator::Tensor(tensor)), _) => Ok(tensor),
            (LossForm::Scalar(Denominator::Value(value)), _) => constant(value),
            (_, Some(mask)) if mask.elem_count() > 0 => {
                let counts = unmasked_along_rows(&mask)?;
                if average_rows { nonzero(&counts) } else { counts.sum_all() }
            }
            _ => constant(each.elem_count() as f64),
        }
    }
}

/// The size of the axis that is averaged.
fn classes(name: &str, input: &Tensor) -> Result<usize> {
    match input.dims() {
        [] => bail!("{name}: a scalar input, expected shape (C) or (…, C)"),
        [.., 0] => bail!("{name}: no classes in an input of shape {:?}, expected at least one", input.dims()),
        [.., classes] => Ok(*classes),
    }
}

/// How many elements a mask leaves along the last axis, whose size becomes 1: f64.
fn unmasked_along_rows(mask: &Tensor) -> Result<Tensor> {
    let mask = if mask.rank() == 0 { mask.unsqueeze(0)? } else { mask.clone() };
    let unmasked = computable(&mask)?.contiguous()?.ne(0f64)?;
    unmasked.to_dtype(DType::U32)?.sum_keepdim(D::Minus1)?.to_dtype(DType::F64)
}

/// How many numbers are not 0.
fn nonzero(counts: &Tensor) -> Result<Tensor> {
    counts.ne(0f64)?.to_dtype(DType::F64)?.sum_all()
}

/// The shape of the losses of an input's elements, or of the averages along its last axis.
fn losses_shape(input: &Shape, average_rows: bool) -> Shape {
    match input.dims() {
        [rows @ .., _] if average_rows => Shape::from(rows),
        _ => input.clone(),
    }
}

/// The tensors of a call beside input and target, locked: weight, positive weight, mask and normalizer.
pub(crate) struct LockedOptions<'a>([Option<Locked<'a>>; 4]);

impl LockedOptions<'_> {
    /// As arguments of a kernel of `name`.
    pub fn args<S: DeviceStorage>(&self, name: &str) -> Result<[Option<Arg<'_, S>>; 4]> {
        let arg = |i: usize| self.0[i].as_ref().map(|locked| locked.arg(name)).transpose();
        Ok([arg(0)?, arg(1)?, arg(2)?, arg(3)?])
    }
}

/// A loss of elements whose options and tensors go together.
#[derive(Clone, Debug)]
pub(crate) struct Elements {
    /// The public function, for errors that only the data can cause.
    pub name: &'static str,
    pub term: Term,
    /// Whether the elements along the last axis are averaged before the reduction, so that the axis disappears.
    pub average_rows: bool,
    /// What becomes of the losses. A mean of averages under a mask has its denominator in a tensor.
    pub form: LossForm,
    pub options: ElementOptions,
}

impl Elements {
    /// With a mask, a row's average is over the classes that it leaves, and a row without any is none of the mean's.
    ///
    /// Kernels divide by all classes and count elements. What is right comes from a weight, all classes over those that
    /// are left, and from a denominator that is the number of rows with any: the kernels need no word of it.
    fn averaging_unmasked(mut self, classes: usize, arithmetic: DType) -> Result<Self> {
        let Some(mask) = &self.options.mask else { return Ok(self) };
        if mask.elem_count() == 0 {
            return Ok(self); // of which candle's CUDA part takes no sum
        }
        let counts = unmasked_along_rows(mask)?;
        let share = (counts.maximum(1f64)?.recip()? * classes as f64)?.to_dtype(arithmetic)?;
        self.options.weight = Some(match &self.options.weight {
            Some(weight) => weight.broadcast_mul(&share)?,
            None => share.broadcast_as(mask.shape())?,
        });
        if self.form.is_counted() {
            self.form = LossForm::Scalar(Denominator::Tensor(nonzero(&counts)?));
        }
        Ok(self)
    }

    /// The tensors beside input and target, locked for the time of a call.
    pub fn lock(&self) -> LockedOptions<'_> {
        let ElementOptions { weight, pos_weight, mask, .. } = &self.options;
        let all = [weight.as_ref(), pos_weight.as_ref(), mask.as_ref(), self.form.tensor()];
        LockedOptions(all.map(|tensor| tensor.map(Locked::new)))
    }

    /// How many adjacent elements are averaged into one loss.
    pub fn group(&self, input: &Layout) -> usize {
        match input.dims() {
            [.., last] if self.average_rows => *last,
            _ => 1,
        }
    }

    /// What the values of the operands have to be, with a target of this dtype.
    pub fn unit_operands(&self, target: DType) -> UnitOperands {
        let domain = self.term.declaration().domain;
        let input = domain == Domain::Probabilities;
        UnitOperands { input, target: input || (domain == Domain::Logits && !target.is_float()) }
    }

    /// The error about an element whose input or target, given with their dtypes, is not in [0, 1] though it has to.
    pub fn out_of_range(&self, element: usize, input: (f64, DType), target: (f64, DType)) -> Error {
        let input_is_bad = self.unit_operands(target.1).input && !(0.0..=1.0).contains(&input.0);
        let (what, (value, dtype)) = if input_is_bad { ("probability", input) } else { ("target", target) };
        check::not_in_unit_interval(self.name, what, value, dtype, element)
    }

    pub fn loss_shape(&self, input: &Layout) -> Shape {
        self.form.shape(losses_shape(input.shape(), self.average_rows))
    }
}

/// The element-wise family's kernels of a device, for operands of any layout.
pub(crate) trait ElementKernels: DeviceStorage {
    /// The loss and the denominator of its sum: a scalar in the arithmetic dtype, 1 for a plain sum or for each.
    fn forward(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)>;

    /// The gradient of an argument, in row-major order.
    fn backward(
        problem: &Elements,
        denominator: &Tensor,
        of: Argument,
        input: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self>;

    /// The loss, and the gradient of the input for an upstream gradient of `grad_scale` everywhere, in row-major order.
    fn loss_and_grad(problem: &Elements, input: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)>;
}
