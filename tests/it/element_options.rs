//! Weights, masks, reductions and normalizers, which all losses of elements have: each combination against the f64
//! reference, what a mask hides, and what there is to say about nothing.

use super::losses::{BceLoss, BceWithLogitsLoss, FUSED, L1Loss, MultiLabelSoftMarginLoss, Reduction, SigmoidFocalLoss};
use crate::common::{
    Check, FLOATS, Memory, NUMBERS, Operand, Random, bits, broadcastable, cases, everywhere, scalar, stored, tensor,
    values,
};
use crate::reference::{Elements, Term};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::Normalizer;

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bce,
    Logits,
    Margin,
    Focal,
    L1,
}

const KINDS: [Kind; 5] = [Kind::Bce, Kind::Logits, Kind::Margin, Kind::Focal, Kind::L1];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Bce => "binary_cross_entropy",
            Kind::Logits => "binary_cross_entropy_with_logits",
            Kind::Margin => "multi_label_soft_margin",
            Kind::Focal => "sigmoid_focal",
            Kind::L1 => "l1",
        }
    }

    fn term(self) -> Term {
        match self {
            Kind::Bce => Term::Bce,
            Kind::Logits | Kind::Margin => Term::BceWithLogits,
            Kind::Focal => Term::Focal { alpha: Some(0.25), gamma: 2.0 },
            Kind::L1 => Term::L1,
        }
    }

    /// How many adjacent elements of an input become one loss.
    fn group(self, dims: &[usize]) -> usize {
        if self == Kind::Margin { dims[dims.len() - 1] } else { 1 }
    }

    /// The shape of the losses.
    fn each(self, dims: &[usize]) -> Vec<usize> {
        if self == Kind::Margin { dims[..dims.len() - 1].to_vec() } else { dims.to_vec() }
    }
}

/// What all of the losses can be told.
#[derive(Clone, Default)]
struct Options {
    weight: Option<Tensor>,
    mask: Option<Tensor>,
    reduction: Reduction,
    normalizer: Option<Normalizer>,
}

type Pass<T> = Box<dyn Fn(&Tensor, &Tensor) -> Result<T>>;
type Count = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// A loss with its options, whichever it is.
struct Loss {
    forward: Pass<Tensor>,
    loss_and_grad: Pass<(Tensor, Tensor)>,
    count: Count,
}

impl Options {
    fn loss(&self, kind: Kind) -> Loss {
        macro_rules! loss {
            ($loss:ident) => {{
                let mut loss = $loss::new().with_reduction(self.reduction);
                if let Some(weight) = &self.weight {
                    loss = loss.with_weight(weight.clone());
                }
                if let Some(mask) = &self.mask {
                    loss = loss.with_mask(mask.clone());
                }
                if let Some(normalizer) = &self.normalizer {
                    loss = loss.with_normalizer(match normalizer {
                        Normalizer::Value(value) => Normalizer::from(*value),
                        Normalizer::Tensor(tensor) => Normalizer::from(tensor),
                    });
                }
                let [one, two, three] = [loss.clone(), loss.clone(), loss];
                Loss {
                    forward: Box::new(move |x, t| one.forward(x, t)),
                    loss_and_grad: Box::new(move |x, t| two.loss_and_grad(x, t)),
                    count: Box::new(move |t| three.count(t)),
                }
            }};
        }
        match kind {
            Kind::Bce => loss!(BceLoss),
            Kind::Logits => loss!(BceWithLogitsLoss),
            Kind::Margin => loss!(MultiLabelSoftMarginLoss),
            Kind::Focal => loss!(SigmoidFocalLoss),
            Kind::L1 => loss!(L1Loss),
        }
    }

    fn normalized(normalizer: impl Into<Normalizer>) -> Self {
        Options { normalizer: Some(normalizer.into()), ..Options::default() }
    }
}

/// How the losses become the result.
#[derive(Clone, Copy, Debug)]
enum Form {
    Reduced(Reduction),
    Value(f64),
    Scalar(f64, DType),
}

const FORMS: [Form; 7] = [
    Form::Reduced(Reduction::None),
    Form::Reduced(Reduction::Mean),
    Form::Reduced(Reduction::Sum),
    Form::Reduced(Reduction::BatchMean),
    Form::Value(3.75),
    Form::Scalar(3.75, DType::F64),
    Form::Scalar(7.0, DType::I32),
];

impl Form {
    fn options(self, device: &Device) -> Result<Options> {
        match self {
            Form::Reduced(reduction) => Ok(Options { reduction, ..Options::default() }),
            Form::Value(value) => Ok(Options::normalized(value)),
            Form::Scalar(value, dtype) => Ok(Options::normalized(tensor(&[value], &[], dtype, device)?)),
        }
    }

    /// What the reference divides by, where it isn't told by the reduction.
    fn divisor(self, each: &[usize]) -> Option<f64> {
        match self {
            Form::Reduced(Reduction::BatchMean) => Some(each.first().map_or(1, |&size| size) as f64),
            Form::Reduced(_) => None,
            Form::Value(value) | Form::Scalar(value, _) => Some(value),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: Kind,
    dtype: DType,
    target: DType,
    dims: &'static [usize],
    memory: Memory,
    weight: bool,
    mask: bool,
    form: Form,
}

impl Case {
    /// Elements that suit the loss; where the mask is 0, input, target and weight are what must not be seen.
    fn drawn(&self, random: &mut Random, mask: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
        let n: usize = self.dims.iter().product();
        let mut x = match self.kind {
            Kind::Bce => random.uniforms(n).iter().map(|u| 0.02 + 0.96 * u).collect(),
            // multiples of 1/8, which every dtype holds
            Kind::L1 => random.normals(n, 16.0).iter().map(|v| v.trunc() / 8.0).collect(),
            _ => random.normals(n, 4.0),
        };
        let mut t = random.labels(n);
        if self.kind == Kind::L1 || !self.target.is_float() {
            t = t.iter().map(|t| t.round()).collect();
        }
        for i in (0..n).filter(|&i| mask.is_some_and(|mask| mask[i] == 0.0)) {
            x[i] = random.pick(&[NAN, INF, -INF, 7.0]);
            t[i] = if self.target.is_float() { random.pick(&[NAN, INF, -3.0]) } else { 200.0 };
        }
        (x, t)
    }

    /// The mask as it is given to the loss, in any dtype, shape and layout, and as it is seen.
    fn drawn_mask(&self, random: &mut Random, device: &Device) -> Result<(Tensor, Vec<f64>)> {
        let dims = if random.below(2) == 0 { self.dims.to_vec() } else { broadcastable(self.dims, random) };
        let data: Vec<_> = (0..dims.iter().product()).map(|_| (random.below(5) > 1) as u8 as f64).collect();
        let memory = match dims.len() {
            0 => Memory::Contiguous,
            rank => random.pick(&[Memory::Contiguous, Memory::Odd, Memory::Window(0), Memory::Swapped(0, rank - 1)]),
        };
        let mask = Operand::new(&data, &dims, random.pick(&NUMBERS), device, memory)?.detached()?;
        let seen = values(&mask.broadcast_as(self.dims)?)?;
        Ok((mask, seen))
    }

    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        let Case { kind, dims, dtype, .. } = *self;
        let mut reference = Elements { group: kind.group(dims), ..Elements::new(kind.term()) };
        let mut given = Options::default();
        if self.mask {
            let (mask, seen) = self.drawn_mask(random, device)?;
            (given.mask, reference.mask) = (Some(mask), Some(seen));
        }
        if self.weight {
            let dims = if kind == Kind::Margin { &dims[dims.len() - 1..] } else { dims };
            let mut data: Vec<_> =
                (0..dims.iter().product()).map(|_| random.below(4) as f64 * random.uniform()).collect();
            if let (Some(mask), true) = (&reference.mask, kind != Kind::Margin) {
                data.iter_mut().zip(mask).filter(|(_, m)| **m == 0.0).for_each(|(w, _)| *w = NAN);
            }
            let weight = tensor(&data, dims, random.pick(&FLOATS), device)?;
            reference.weight = Some(values(&weight.broadcast_as(self.dims)?)?);
            given.weight = Some(weight);
        }
        let (x, t) = self.drawn(random, reference.mask.as_deref());
        let input = Operand::new(&x, dims, dtype, device, self.memory)?;
        let target = Operand::new(&t, dims, self.target, device, Memory::Odd)?;
        let (x, t) = (input.values()?, target.values()?);
        let t: Vec<_> = t.into_iter().map(|t| stored(crate::common::arithmetic(dtype), t)).collect();
        let (each, form) = (kind.each(dims), self.form);
        let options = Options { weight: given.weight, mask: given.mask, ..form.options(device)? };
        let loss = options.loss(kind);
        let reference = Elements { reduction: options.reduction, divisor: form.divisor(&each), ..reference };
        Check {
            what: format!("{self:?}"),
            input: &input,
            target: &target,
            loss_dims: if options.reduction == Reduction::None { each } else { vec![] },
            forward: &*loss.forward,
            loss_and_grad: &*loss.loss_and_grad,
            // composed too, these losses have the accuracy of the kernels
            absolute: 0.0,
            expected: &|upstream| reference.expected(&x, &t, upstream),
        }
        .run(random)?;
        if !matches!(form, Form::Reduced(Reduction::BatchMean)) {
            let count = (loss.count)(&target.detached()?)?;
            assert_eq!((count.dtype(), count.dims()), (DType::F64, &[][..]), "{self:?}: count");
            assert_eq!(scalar(&count)?, reference.count(x.len()), "{self:?}: count");
        }
        Ok(())
    }
}

/// Every loss, dtype and combination of weights, mask, reduction and normalizer. A masked element holds NaN, infinities
/// and targets out of range, of which nothing is seen.
#[test]
fn every_option_of_every_loss() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(91);
        let shapes = [(&[6, 5][..], Memory::Contiguous), (&[2, 3, 7], Memory::Swapped(0, 2)), (&[33], Memory::Odd)];
        let kinds = KINDS.iter().flat_map(|&kind| FLOATS.map(|dtype| (kind, dtype)));
        let options = [(false, false), (true, false), (false, true), (true, true)];
        let all = kinds.flat_map(|kind| options.map(|option| (kind, option)));
        let all = all.flat_map(|(kind, option)| FORMS.map(|form| (kind, option, form)));
        for ((kind, dtype), (weight, mask), form) in cases(device, FUSED, all) {
            let (dims, memory) = random.pick(&shapes);
            let target = random.pick(&[dtype, DType::F32, DType::U8, DType::I16, DType::I64]);
            Case { kind, dtype, target, dims, memory, weight, mask, form }.check(device, &mut random)?;
        }
        Ok(())
    })
}

/// More elements than a block takes, more than one block counts, and rows longer than a block.
#[test]
fn large_masked_tensors() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(92);
        let sizes = [(Kind::Margin, &[700, 3][..]), (Kind::Margin, &[9, 3001]), (Kind::Bce, &[70, 1000])];
        let all = FORMS.iter().flat_map(|&form| sizes.map(|size| (size, form)));
        for ((kind, dims), form) in cases(device, FUSED, all) {
            let (dtype, target, memory, weight) = (DType::F32, DType::U8, Memory::Contiguous, kind == Kind::Margin);
            Case { kind, dtype, target, dims, memory, weight, mask: true, form }.check(device, &mut random)?;
        }
        Ok(())
    })
}

/// Loss and gradient through the graph, and in one pass.
fn results(loss: &Loss, x: &Tensor, t: &Tensor) -> Result<[Vec<f64>; 4]> {
    let x = Var::from_tensor(x)?;
    let value = (loss.forward)(&x, t)?;
    let grads = value.sum_all()?.backward()?;
    let grad = grads.get(&x).map_or_else(|| x.zeros_like(), |grad| Ok(grad.clone()))?;
    let (one, one_grad) = (loss.loss_and_grad)(&x.detach(), t)?;
    Ok([values(&value)?, values(&grad)?, values(&one)?, values(&one_grad)?])
}

/// A denominator of 0, because nothing counts or as a normalizer, makes the loss what the division gives, and lets no
/// gradient out: another loss that is added keeps its own.
#[test]
fn nothing_to_divide_by() -> Result<()> {
    everywhere(|device| {
        for (kind, dtype) in cases(device, FUSED, KINDS.iter().flat_map(|&kind| FLOATS.map(|dtype| (kind, dtype)))) {
            let x = tensor(&[0.25, 0.5, 0.75, 0.5], &[2, 2], dtype, device)?;
            let t = tensor(&[0.0, 1.0, 1.0, 0.0], &[2, 2], DType::U8, device)?;
            let zero = Options::normalized(Tensor::zeros((), DType::F32, device)?);
            let masked = Options { mask: Some(Tensor::zeros(1, DType::U8, device)?), ..Options::default() };
            let both = Options { mask: masked.mask.clone(), ..zero.clone() };
            for (options, want) in [(&zero, INF), (&masked, NAN), (&both, NAN)] {
                let loss = options.loss(kind);
                let [value, grad, one, one_grad] = results(&loss, &x, &t)?;
                for value in [value[0], one[0]] {
                    assert!(value == want || (value.is_nan() && want.is_nan()), "{kind:?} {dtype:?}: {value}");
                }
                assert_eq!([grad, one_grad], [[0.0; 4], [0.0; 4]], "{kind:?} {dtype:?}");
                assert_eq!(scalar(&(loss.count)(&t)?)?, 0.0, "{kind:?}");
                let x = Var::from_tensor(&x)?;
                let sum = ((loss.forward)(&x, &t)?.to_dtype(DType::F32)? + x.to_dtype(DType::F32)?.sum_all()?)?;
                let grads = sum.backward()?;
                assert_eq!(values(grads.get(&x).expect("a gradient"))?, [1.0; 4], "{kind:?} {dtype:?}: with another");
            }
            // without a denominator, what is masked is 0
            for reduction in [Reduction::None, Reduction::Sum, Reduction::BatchMean] {
                let loss = Options { reduction, ..masked.clone() }.loss(kind);
                for result in results(&loss, &x, &t)? {
                    assert!(result.iter().all(|v| *v == 0.0), "{kind:?} {reduction:?}: {result:?}");
                }
            }
        }
        Ok(())
    })
}

/// A row's average is over the classes that are left, and a row without any is none.
#[test]
fn masked_classes_are_none_of_a_row() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.5, -1.0, 3.0, 1.5, -2.0, 0.0, 1.0, 1.0, 1.0], &[3, 3], DType::F64, device)?;
        let t = tensor(&[1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], &[3, 3], DType::U8, device)?;
        let mask = tensor(&[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], &[3, 3], DType::I16, device)?;
        let weight = tensor(&[0.5, 2.0, 1.5], &[3], DType::F32, device)?;
        let softplus = |x: f64| x.exp().ln_1p();
        let rows = [(0.5 * softplus(-0.5) + 2.0 * softplus(-1.0)) / 2.0, 1.5 * 2f64.ln(), 0.0];
        let sum = rows[0] + rows[1];
        let options = Options { weight: Some(weight), mask: Some(mask), ..Options::default() };
        for (form, want) in [
            (Form::Reduced(Reduction::None), rows.to_vec()),
            (Form::Reduced(Reduction::Mean), vec![sum / 2.0]),
            (Form::Reduced(Reduction::Sum), vec![sum]),
            (Form::Reduced(Reduction::BatchMean), vec![sum / 3.0]),
            (Form::Value(0.5), vec![sum / 0.5]),
            (Form::Scalar(5.0, DType::U32), vec![sum / 5.0]),
        ] {
            let of = form.options(device)?;
            let loss =
                Options { reduction: of.reduction, normalizer: of.normalizer, ..options.clone() }.loss(Kind::Margin);
            let [value, _, one, _] = results(&loss, &x, &t)?;
            for (got, want) in value.iter().chain(&one).zip(want.iter().chain(&want)) {
                assert!((got - want).abs() <= 1e-14 * want, "{form:?}: got {got}, expected {want}");
            }
        }
        assert_eq!(scalar(&(options.loss(Kind::Margin).count)(&t)?)?, 2.0);
        Ok(())
    })
}

/// What weighs nothing may be anything: NaN, infinitely wrong, and a label that is none.
#[test]
fn weights_of_0_hide_everything() -> Result<()> {
    everywhere(|device| {
        for (kind, dtype) in cases(device, FUSED, KINDS.iter().flat_map(|&kind| FLOATS.map(|dtype| (kind, dtype)))) {
            let (x, t) = match kind {
                Kind::Bce => ([NAN, 7.0, 0.5], [255.0, 0.0, 1.0]),
                _ => ([NAN, INF, 0.5], [255.0, 0.0, 1.0]),
            };
            let x = tensor(&x, &[1, 3], dtype, device)?;
            let t = tensor(&t, &[1, 3], DType::U8, device)?;
            let weight = Some(tensor(&[0.0, 0.0, 1.0], &[3], DType::F32, device)?);
            let [value, grad, one, one_grad] = results(&Options { weight, ..Options::default() }.loss(kind), &x, &t)?;
            // the mean is of 3 elements, whatever they weigh
            let last = |t: &Tensor| t.narrow(1, 2, 1)?.contiguous();
            let [alone, alone_grad, ..] = results(&Options::default().loss(kind), &last(&x)?, &last(&t)?)?;
            for (got, want) in
                [(value[0], alone[0]), (one[0], alone[0]), (grad[2], alone_grad[0]), (one_grad[2], alone_grad[0])]
            {
                let relative = crate::common::epsilon(dtype).max(4e-7);
                assert!((3.0 * got - want).abs() <= relative * want.abs(), "{kind:?} {dtype:?}: {got} of {want}");
            }
            for grad in [grad, one_grad] {
                assert_eq!(grad[..2], [0.0, 0.0], "{kind:?} {dtype:?}");
            }
        }
        Ok(())
    })
}

/// Of no elements the count is 0, the mean NaN, and what is divided by a normalizer 0.
#[test]
fn options_of_nothing() -> Result<()> {
    everywhere(|device| {
        for (kind, masked) in KINDS.iter().flat_map(|&kind| [false, true].map(|masked| (kind, masked))) {
            let x = Tensor::zeros((0, 3), DType::F32, device)?;
            let mask = if masked { Some(Tensor::ones((1, 3), DType::U8, device)?) } else { None };
            for (form, want) in [
                (Form::Reduced(Reduction::Mean), NAN),
                (Form::Reduced(Reduction::Sum), 0.0),
                (Form::Reduced(Reduction::BatchMean), NAN),
                (Form::Value(2.0), 0.0),
                (Form::Scalar(2.0, DType::F64), 0.0),
            ] {
                let loss = Options { mask: mask.clone(), ..form.options(device)? }.loss(kind);
                let [value, grad, one, one_grad] = results(&loss, &x, &x)?;
                for value in [value[0], one[0]] {
                    assert!(value == want || (value.is_nan() && want.is_nan()), "{kind:?} {form:?}: {value}");
                }
                assert!(grad.is_empty() && one_grad.is_empty());
                let count = form.divisor(&[0]).unwrap_or(0.0);
                if !matches!(form, Form::Reduced(Reduction::BatchMean)) {
                    assert_eq!(scalar(&(loss.count)(&x)?)?, count, "{kind:?} {form:?}");
                }
            }
        }
        Ok(())
    })
}

/// The counts of several batches, added up on the device, are the normalizer of each: the parts' means add up to the
/// mean of the whole.
#[test]
fn counts_are_normalizers() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(93);
        for kind in KINDS {
            let x = tensor(&random.uniforms(40), &[8, 5], DType::F64, device)?;
            let t = tensor(&random.labels(40), &[8, 5], DType::F64, device)?;
            let mask: Vec<_> = (0..40).map(|_| random.below(2) as f64).collect();
            let mask = tensor(&mask, &[8, 5], DType::U8, device)?;
            let whole = Options { mask: Some(mask.clone()), ..Options::default() }.loss(kind);
            let want = scalar(&(whole.forward)(&x, &t)?)?;
            let part = |first: usize, len: usize| -> Result<_> {
                let of = |t: &Tensor| t.narrow(0, first, len);
                Ok((of(&x)?, of(&t)?, Options { mask: Some(of(&mask)?), ..Options::default() }))
            };
            let parts = [part(0, 3)?, part(3, 5)?];
            let mut total = Tensor::zeros((), DType::F64, device)?;
            for (_, t, options) in &parts {
                total = (total + (options.loss(kind).count)(t)?)?;
            }
            assert_eq!(scalar(&total)?, scalar(&(whole.count)(&t)?)?, "{kind:?}");
            let mut sum = 0.0;
            for (x, t, options) in parts {
                let loss = Options { normalizer: Some(Normalizer::from(&total)), ..options }.loss(kind);
                sum += scalar(&(loss.forward)(&x, &t)?)?;
            }
            assert!((sum - want).abs() <= 1e-14 * want, "{kind:?}: {sum}, expected {want}");
        }
        Ok(())
    })
}

/// A normalizer in a tensor is the same number as one of the host, to the bit.
#[test]
fn normalizers_of_every_dtype() -> Result<()> {
    everywhere(|device| {
        let kinds = KINDS.iter().flat_map(|&kind| [DType::F32, DType::BF16].map(|dtype| (kind, dtype)));
        let all = kinds.flat_map(|kind| NUMBERS.map(|number| (kind, number)));
        for (i, ((kind, dtype), number)) in cases(device, FUSED, all).into_iter().enumerate() {
            let x = tensor(&[0.25, 0.5, 0.75, 0.5], &[2, 2], dtype, device)?;
            let t = tensor(&[0.0, 1.0, 1.0, 0.0], &[2, 2], DType::U8, device)?;
            let want = results(&Options::normalized(5.0).loss(kind), &x, &t)?;
            let given = tensor(&[5.0], [&[][..], &[1], &[1, 1]][(i + i / 9) % 3], number, device)?;
            let given = if number.is_float() { Var::from_tensor(&given)?.into_inner() } else { given };
            assert_eq!(
                results(&Options::normalized(&given).loss(kind), &x, &t)?,
                want,
                "{kind:?} {dtype:?} {number:?}"
            );
        }
        Ok(())
    })
}

fn fails(kind: Kind, options: Options, (x, t): (&Tensor, &Tensor), part: &str) {
    let loss = options.loss(kind);
    let results = [(loss.forward)(x, t), (loss.loss_and_grad)(x, t).map(|(loss, _)| loss)];
    for message in results.map(|result| result.expect_err(part).to_string()) {
        assert!(message.contains(part) && message.contains(kind.name()), "{kind:?}: no {part:?} in {message:?}");
    }
}

#[test]
fn options_that_are_refused() -> Result<()> {
    everywhere(|device| {
        let ones = |dims: &[usize], dtype| Tensor::ones(dims, dtype, device);
        let x = (ones(&[2, 3], DType::F32)? * 0.5)?;
        let t = ones(&[2, 3], DType::U8)?;
        // candle's CUDA part has no number of that dtype
        let odd = Tensor::ones((), DType::F32, &Device::Cpu)?.to_dtype(DType::F8E4M3)?.to_device(device)?;
        for kind in KINDS {
            for reduction in [Reduction::None, Reduction::Sum, Reduction::BatchMean] {
                let part = format!("a normalizer with Reduction::{reduction:?}");
                for normalized in [Options::normalized(2.0), Options::normalized(ones(&[], DType::F64)?)] {
                    fails(kind, Options { reduction, ..normalized }, (&x, &t), &part);
                }
            }
            for (value, shown) in [(0.0, "0"), (-2.0, "-2"), (NAN, "NaN"), (INF, "inf"), (-INF, "-inf")] {
                let options = Options::normalized(value);
                let part = format!("normalizer {shown}, expected a finite number above 0");
                assert!((options.loss(kind).count)(&t).expect_err(&part).to_string().contains(&part));
                fails(kind, options, (&x, &t), &part);
            }
            for (dims, shown) in [(&[2][..], "[2]"), (&[0], "[0]"), (&[2, 3], "[2, 3]")] {
                let options = Options::normalized(Tensor::zeros(dims, DType::F32, device)?);
                fails(kind, options, (&x, &t), &format!("a normalizer of shape {shown}, expected a scalar"));
            }
            fails(kind, Options::normalized(&odd), (&x, &t), "normalizer of dtype F8E4M3");
            let masked = |mask: Tensor| Options { mask: Some(mask), ..Options::default() };
            fails(kind, masked(odd.clone()), (&x, &t), "mask of dtype F8E4M3");
            fails(kind, masked(ones(&[2], DType::U8)?), (&x, &t), "mask of shape [2]");
            assert!((masked(ones(&[2], DType::U8)?).loss(kind).count)(&t).is_err());
            let weighted = |weight: Tensor| Options { weight: Some(weight), ..Options::default() };
            fails(kind, weighted(ones(&[2], DType::F32)?), (&x, &t), "of shape [2]");
            fails(kind, weighted(ones(&[3], DType::U8)?), (&x, &t), "weight of dtype U8");
        }
        let scalar = Options::default().loss(Kind::Margin);
        let error = (scalar.count)(&ones(&[], DType::U8)?).expect_err("a scalar").to_string();
        assert!(error.contains("multi_label_soft_margin: a scalar input"), "{error}");
        assert_eq!(bits(&(Options::default().loss(Kind::L1).count)(&ones(&[], DType::U8)?)?)?, [1f64.to_bits()]);
        Ok(())
    })
}
