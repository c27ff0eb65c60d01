//! Binary cross-entropy of probabilities and of logits against the f64 reference: options, dtypes, shapes and layouts.

use super::losses::{BceLoss, BceWithLogitsLoss, FUSED, Reduction};
use crate::common::{
    Check, ELEMENT_COUNTS, FLOATS, Memory, NUMBERS, Operand, REDUCTIONS, Random, broadcastable, cases, devices,
    element_layouts, tensor, values,
};
use crate::reference::{Elements, Term};
use candle_core::{DType, Device, Result, Tensor};

/// One row of the option matrix.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    weight: bool,
    /// The rest is for logits only.
    pos_weight: bool,
    mask: bool,
    label_smoothing: f64,
}

const PROBABILITY_OPTIONS: [Options; 2] = [
    Options { weight: false, pos_weight: false, mask: false, label_smoothing: 0.0 },
    Options { weight: true, pos_weight: false, mask: false, label_smoothing: 0.0 },
];

fn logit_options() -> Vec<Options> {
    let flags = [false, true];
    let smoothing = [0.0, 0.1, 1.0];
    let mut all = vec![];
    for (weight, pos_weight) in flags.iter().flat_map(|&w| flags.map(|p| (w, p))) {
        for (mask, label_smoothing) in flags.iter().flat_map(|&m| smoothing.map(|e| (m, e))) {
            all.push(Options { weight, pos_weight, mask, label_smoothing });
        }
    }
    all
}

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    term: Term,
    dims: &'a [usize],
    dtype: DType,
    memory: Memory,
    target: DType,
    target_memory: Memory,
    options: Options,
}

/// Random operand that broadcasts to the input, in any float dtype, sometimes a strided view; and its values as
/// broadcast.
fn operand(
    case: &Case,
    device: &Device,
    random: &mut Random,
    value: impl Fn(&mut Random) -> f64,
) -> Result<(Tensor, Vec<f64>)> {
    let dims = broadcastable(case.dims, random);
    let data: Vec<_> = (0..dims.iter().product()).map(|_| value(random)).collect();
    let memory = match dims.len() {
        0 => Memory::Contiguous,
        rank => random.pick(&[Memory::Contiguous, Memory::Odd, Memory::Window(rank - 1), Memory::Swapped(0, rank - 1)]),
    };
    let operand = Operand::new(&data, &dims, random.pick(&FLOATS), device, memory)?;
    let seen = values(&operand.detached()?.broadcast_as(case.dims)?)?;
    Ok((operand.tracked()?, seen))
}

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        let Case { term, dims, dtype, options, .. } = *self;
        let n: usize = dims.iter().product();
        let x = match term {
            // f16 has no gradient at the ends but an infinite one, of which candle can't form a sum
            Term::Bce if dtype == DType::F16 && matches!(self.memory, Memory::Repeated(_)) => {
                random.uniforms(n).iter().map(|v| 0.1 + 0.8 * v).collect()
            }
            // with both ends
            Term::Bce => {
                random.labels(n).iter().map(|&v| if random.below(3) > 0 { random.uniform() } else { v }).collect()
            }
            _ => random.normals(n, 6.0),
        };
        let input = Operand::new(&x, dims, dtype, device, self.memory)?;
        let labels = random.labels(n);
        let labels: Vec<_> = labels.iter().map(|t| if self.target.is_float() { *t } else { t.round() }).collect();
        let target = Operand::new(&labels, dims, self.target, device, self.target_memory)?;

        let mut reference = Elements { label_smoothing: options.label_smoothing, ..Elements::new(term) };
        let (mut probabilities, mut logits) = (BceLoss::new(), BceWithLogitsLoss::new());
        logits = logits.with_label_smoothing(options.label_smoothing);
        if options.weight {
            let (weight, seen) =
                operand(self, device, random, |r| if r.below(5) == 0 { 0.0 } else { 2.0 * r.uniform() })?;
            reference.weight = Some(seen);
            probabilities = probabilities.with_weight(weight.clone());
            logits = logits.with_weight(weight);
        }
        if options.pos_weight {
            let (weight, seen) = operand(self, device, random, |r| 5.0 * r.uniform())?;
            reference.pos_weight = Some(seen);
            logits = logits.with_pos_weight(weight);
        }
        if options.mask {
            let (mask, _) = operand(self, device, random, |r| (r.below(3) > 0) as u8 as f64)?;
            // of any dtype; converted on the CPU, because candle has no such kernel for every pair
            let mask = mask.detach().to_device(&Device::Cpu)?.to_dtype(random.pick(&NUMBERS))?.to_device(device)?;
            reference.mask = Some(values(&mask.broadcast_as(dims)?)?);
            logits = logits.with_mask(mask);
        }
        let (x, t) = (input.values()?, target.values()?);
        for reduction in REDUCTIONS {
            let (p, l) = (probabilities.clone().with_reduction(reduction), logits.clone().with_reduction(reduction));
            let reference = Elements { reduction, ..reference.clone() };
            let bce = matches!(term, Term::Bce);
            Check {
                what: format!("{self:?} {reduction:?}"),
                input: &input,
                target: &target,
                loss_dims: if reduction == Reduction::None { dims.to_vec() } else { vec![] },
                forward: &|x, t| if bce { p.forward(x, t) } else { l.forward(x, t) },
                loss_and_grad: &|x, t| if bce { p.loss_and_grad(x, t) } else { l.loss_and_grad(x, t) },
                // composed too, these losses have the accuracy of the kernels
                absolute: 0.0,
                expected: &|upstream| reference.expected(&x, &t, upstream),
            }
            .run(random)?;
        }
        Ok(())
    }
}

const CONTIGUOUS: Case = Case {
    term: Term::Bce,
    dims: &[],
    dtype: DType::F32,
    memory: Memory::Contiguous,
    target: DType::F32,
    target_memory: Memory::Contiguous,
    options: PROBABILITY_OPTIONS[0],
};

fn options_and_dtypes(term: Term, options: &[Options]) -> Result<()> {
    for device in devices() {
        let mut random = Random::new(11);
        let dtypes = FLOATS.iter().flat_map(|&d| NUMBERS.map(|t| (d, t)));
        let all = dtypes.flat_map(|(dtype, target)| options.iter().map(move |&options| (dtype, target, options)));
        for (dtype, target, options) in cases(&device, FUSED, all) {
            Case { term, dims: &[3, 4, 5], dtype, target, options, ..CONTIGUOUS }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

fn layouts(term: Term, options: &[Options]) -> Result<()> {
    for device in devices() {
        let mut random = Random::new(12);
        for (dims, memory, target_memory) in cases(&device, FUSED, element_layouts()) {
            let (dtype, target) = (random.pick(&FLOATS), random.pick(&NUMBERS));
            let options = random.pick(options);
            Case { term, dims, dtype, memory, target, target_memory, options }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

fn sizes(term: Term, options: &[Options]) -> Result<()> {
    for device in devices() {
        let mut random = Random::new(13);
        let all = ELEMENT_COUNTS.iter().flat_map(|&n| FLOATS.map(|d| (n, d)));
        for (n, dtype) in cases(&device, FUSED, all) {
            let (memory, target_memory) = (random.pick(&[Memory::Contiguous, Memory::Odd]), Memory::Odd);
            let options = random.pick(options);
            Case { term, dims: &[n], dtype, memory, target_memory, options, ..CONTIGUOUS }
                .check(&device, &mut random)?;
        }
    }
    // as many as several threads share; on the CPU alone: a device in software takes too long
    let case = Case { term, dims: &[300, 1001], options: options[options.len() - 1], ..CONTIGUOUS };
    case.check(&Device::Cpu, &mut Random::new(14))
}

#[test]
fn probability_options_and_dtypes() -> Result<()> {
    options_and_dtypes(Term::Bce, &PROBABILITY_OPTIONS)
}

#[test]
fn probability_layouts() -> Result<()> {
    layouts(Term::Bce, &PROBABILITY_OPTIONS)
}

#[test]
fn probability_sizes() -> Result<()> {
    sizes(Term::Bce, &PROBABILITY_OPTIONS)
}

#[test]
fn logit_options_and_dtypes() -> Result<()> {
    options_and_dtypes(Term::BceWithLogits, &logit_options())
}

#[test]
fn logit_layouts() -> Result<()> {
    layouts(Term::BceWithLogits, &logit_options())
}

#[test]
fn logit_sizes() -> Result<()> {
    sizes(Term::BceWithLogits, &logit_options())
}

/// `(C)`, `(C, 1, 1)`, a full tensor and one number as weights of `(N, C, H, W)`.
#[test]
fn shapes_of_weights() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(15);
        let dims = [2, 3, 4, 5];
        let x = tensor(&random.normals(120, 2.0), &dims, DType::F32, &device)?;
        let t = tensor(&random.labels(120), &dims, DType::F32, &device)?;
        for shape in [&[][..], &[1], &[5], &[4, 1], &[3, 1, 1], &[2, 1, 1, 1], &[2, 3, 4, 5]] {
            let weight = tensor(&random.uniforms(shape.iter().product()), shape, DType::F32, &device)?;
            let full = weight.broadcast_as(&dims)?.contiguous()?;
            let loss = |w: &Tensor| {
                let loss = BceWithLogitsLoss::new().with_pos_weight(w.clone()).with_weight(w.clone());
                loss.with_mask(w.gt(0.5)?).loss_and_grad(&x, &t)
            };
            let (got, want) = (loss(&weight)?, loss(&full)?);
            assert_eq!(values(&got.0)?, values(&want.0)?, "loss, weights of shape {shape:?}");
            assert_eq!(values(&got.1)?, values(&want.1)?, "gradient, weights of shape {shape:?}");
        }
    }
    Ok(())
}
