//! How far the losses are from f64, in units of the last place: the table in the README.
//!
//! Measured where the definition cancels nothing, so that units in the last place of the result are a fair measure:
//! hard targets and no smoothing; for log-softmax's gradient the unit is that of the largest of it and its two terms.
//! Losses are those of all rows, and the mean; their unit is f32's (f64's for f64). The unit of a gradient is that of
//! the input's dtype, rounding to which costs half a unit. For f64 the numbers include the reference's own rounding.
//! `gradient_accuracy` has the gradients of all options.
//!
//! f32 logits do worse than 16-bit ones, because their differences to the row's maximum are rounded, which those of
//! 16-bit numbers are not: at a difference of 40 half a unit is 2e-6, and that is the relative error of the
//! exponential, and of a loss or gradient of 1e-17.

use crate::common::{FLOATS, Random, arithmetic, devices, half_ulp, indices, is_slow, tensor, values};
use crate::reference::{self, CrossEntropy, Elements, Expected, Near, Targets, Term};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss, Reduction, SigmoidFocalLoss,
    log_softmax,
};

/// The largest errors that are allowed on the CPU: loss and gradient for f16, bf16, f32, f64.
const BOUNDS: [(&str, [(f64, f64); 4]); 8] = [
    ("`CrossEntropyLoss`, class indices", [(14.0, 0.6), (5.0, 0.6), (20.0, 40.0), (6.0, 8.0)]),
    ("`CrossEntropyLoss`, probabilities", [(14.0, 0.6), (5.0, 0.6), (20.0, 40.0), (6.0, 8.0)]),
    ("`NllLoss`", [(1.0, 0.6), (1.0, 0.6), (1.0, 1.0), (1.0, 1.0)]),
    ("`log_softmax`", [(0.6, 0.6), (0.6, 0.6), (20.0, 4.0), (6.0, 6.0)]),
    ("`BceLoss`", [(2.0, 0.6), (2.0, 0.6), (2.0, 3.0), (2.0, 3.0)]),
    ("`BceWithLogitsLoss`", [(3.0, 0.6), (3.0, 0.6), (3.0, 4.0), (5.0, 5.0)]),
    ("`MultiLabelSoftMarginLoss`", [(3.0, 0.6), (3.0, 0.6), (3.0, 5.0), (7.0, 6.0)]),
    ("`SigmoidFocalLoss`", [(24.0, 0.6), (24.0, 0.6), (24.0, 24.0), (36.0, 36.0)]),
];

/// What is allowed on CUDA instead, where it is not the same: `ex2.approx` and `div.approx` may be off by 2 units in
/// the last place (CUDA's programming guide, "Intrinsic functions"), and these are the bounds with instructions that
/// are, as those of the software GPU with `SOFTGPU_ULP=2`.
const CUDA_BOUNDS: [(&str, [(f64, f64); 4]); 4] = [
    ("`CrossEntropyLoss`, class indices", [(16.0, 0.6), (8.0, 0.6), (20.0, 40.0), (6.0, 8.0)]),
    ("`CrossEntropyLoss`, probabilities", [(16.0, 0.6), (8.0, 0.6), (20.0, 40.0), (6.0, 8.0)]),
    ("`BceWithLogitsLoss`", [(6.0, 0.6), (6.0, 0.6), (6.0, 7.0), (5.0, 5.0)]),
    ("`MultiLabelSoftMarginLoss`", [(3.0, 0.6), (3.0, 0.6), (3.0, 7.0), (7.0, 6.0)]),
];

/// A line of the README's tables.
fn line(name: &str, errors: &[(f64, f64); 4]) -> String {
    let cells: Vec<_> = errors.iter().map(|(loss, grad)| format!("{loss} / {grad}")).collect();
    format!("| {name} | {} |", cells.join(" | "))
}

/// The largest error in units of the last place; `unit_of` is the number whose unit counts.
fn ulps(got: &Tensor, want: &[Near], unit_of: impl Fn(usize) -> f64) -> Result<f64> {
    let dtype = got.dtype();
    let got = values(got)?;
    let least = if arithmetic(dtype) == DType::F64 { f64::MIN_POSITIVE } else { f32::MIN_POSITIVE as f64 };
    let error = |(i, (got, want)): (usize, (&f64, &Near))| {
        // what is below the normal numbers of the arithmetic may be 0
        if want.value.abs() < least { 0.0 } else { (got - want.value).abs() / (2.0 * half_ulp(dtype, unit_of(i))) }
    };
    Ok(got.iter().zip(want).enumerate().map(error).fold(0.0, f64::max))
}

type OnePass<'a> = &'a dyn Fn(Reduction) -> Result<(Tensor, Tensor)>;

/// The errors of rows and mean, and of the rows' gradient.
fn errors(one_pass: OnePass, expected: impl Fn(Reduction) -> Expected) -> Result<(f64, f64)> {
    let (rows, grad) = one_pass(Reduction::None)?;
    let mean = one_pass(Reduction::Mean)?.0;
    let (want, want_mean) = (expected(Reduction::None), expected(Reduction::Mean).loss);
    let loss = ulps(&rows, &want.loss, |i| want.loss[i].value)?.max(ulps(&mean, &want_mean, |i| want_mean[i].value)?);
    Ok((loss, ulps(&grad, &want.grad, |i| want.grad[i].value)?))
}

fn softmax_errors(dtype: DType, classes: usize, n: usize, device: &Device) -> Result<[(f64, f64); 4]> {
    let mut random = Random::new(81);
    let dims = [n, classes];
    let mut x = random.normals(n * classes, 4.0);
    // some rows that are confident
    x.iter_mut().step_by(7 * classes).for_each(|x| *x += 30.0);
    let x = tensor(&x, &dims, dtype, device)?;
    let seen = values(&x)?;
    let mut classes_of = random.classes(n, classes);
    classes_of.iter_mut().step_by(7).for_each(|t| *t = 0);
    let t = indices(&classes_of, &[n], DType::U32, device)?;
    let mut one_hot = vec![0.0; n * classes];
    classes_of.iter().enumerate().for_each(|(row, &t)| one_hot[row * classes + t as usize] = 1.0);
    let soft = tensor(&one_hot, &dims, dtype, device)?;

    let reference = |reduction, targets| {
        CrossEntropy { reduction, ..Default::default() }.expected(&dims, 1, &seen, targets, &[1.0])
    };
    let ce = CrossEntropyLoss::new();
    let nll = NllLoss::new();
    let of_classes = errors(&|r| ce.clone().with_reduction(r).loss_and_grad(&x, &t), |r| {
        reference(r, Targets::Classes(&classes_of))
    })?;
    let of_probabilities = errors(&|r| ce.clone().with_reduction(r).loss_and_grad(&x, &soft), |r| {
        reference(r, Targets::Probabilities(&one_hot))
    })?;
    let of_nll = errors(&|r| nll.clone().with_reduction(r).loss_and_grad(&x, &t), |reduction| {
        CrossEntropy { reduction, ..Default::default() }.expected_nll(&dims, 1, &seen, &classes_of, &[1.0])
    })?;

    let upstream = random.normals(n * classes, 1.0);
    let upstream = tensor(&upstream, &dims, dtype, device)?;
    let g = values(&upstream)?;
    let leaf = Var::from_tensor(&x)?;
    let y = log_softmax(&leaf, 1)?;
    let grads = (&y * &upstream)?.sum_all()?.backward()?;
    let want = reference::log_softmax(&dims, 1, &seen, &g);
    let sums: Vec<f64> = g.chunks(classes).map(|row| row.iter().map(|g| g.abs()).sum()).collect();
    let larger = |i: usize| g[i].abs().max(want.loss[i].value.exp() * sums[i / classes]).max(want.grad[i].value.abs());
    let of_log_softmax = (
        ulps(&y, &want.loss, |i| want.loss[i].value)?,
        ulps(grads.get(&leaf).expect("a gradient"), &want.grad, larger)?,
    );
    Ok([of_classes, of_probabilities, of_nll, of_log_softmax])
}

fn element_errors(dtype: DType, n: usize, device: &Device) -> Result<[(f64, f64); 4]> {
    let mut random = Random::new(82);
    let dims = [n / 10, 10];
    let x = tensor(&random.normals(n, 8.0), &dims, dtype, device)?;
    // away from the ends: the gradient there is beyond f16
    let probs = random.uniforms(n).iter().map(|u| 0.001 + 0.998 * u).collect::<Vec<_>>();
    let probs = tensor(&probs, &dims, dtype, device)?;
    let t = tensor(&random.labels(n).iter().map(|t| t.round()).collect::<Vec<_>>(), &dims, DType::U8, device)?;
    let (seen, seen_probs, labels) = (values(&x)?, values(&probs)?, values(&t)?);
    let reference = |term, group, x: &[f64], reduction| {
        Elements { reduction, group, ..Elements::new(term) }.expected(x, &labels, &[1.0])
    };
    let focal = Term::Focal { alpha: Some(0.25), gamma: 2.0 };
    Ok([
        errors(&|r| BceLoss::new().with_reduction(r).loss_and_grad(&probs, &t), |r| {
            reference(Term::Bce, 1, &seen_probs, r)
        })?,
        errors(&|r| BceWithLogitsLoss::new().with_reduction(r).loss_and_grad(&x, &t), |r| {
            reference(Term::BceWithLogits, 1, &seen, r)
        })?,
        errors(&|r| MultiLabelSoftMarginLoss::new().with_reduction(r).loss_and_grad(&x, &t), |r| {
            reference(Term::BceWithLogits, 10, &seen, r)
        })?,
        errors(&|r| SigmoidFocalLoss::new().with_reduction(r).loss_and_grad(&x, &t), |r| {
            reference(focal, 1, &seen, r)
        })?,
    ])
}

/// Prints the measured table with `--nocapture`.
#[test]
fn errors_are_within_the_table() -> Result<()> {
    for device in devices() {
        let mut measured = BOUNDS.map(|(name, _)| (name, [(0f64, 0f64); 4]));
        for (column, dtype) in FLOATS.into_iter().enumerate() {
            let (rows, elements) = if is_slow(&device) { (8, 4000) } else { (256, 200_000) };
            let mut all = vec![];
            for classes in [10, 1000] {
                all.push(softmax_errors(dtype, classes, rows, &device)?.to_vec());
            }
            if !is_slow(&device) {
                all.push(softmax_errors(dtype, 32_000, 8, &device)?.to_vec());
            }
            let elements = element_errors(dtype, elements, &device)?;
            for (loss, worst) in measured.iter_mut().enumerate() {
                let cell = &mut worst.1[column];
                let of_rows = all.iter().filter_map(|errors| errors.get(loss));
                for error in of_rows.chain(loss.checked_sub(4).map(|i| &elements[i])) {
                    *cell = (cell.0.max(error.0), cell.1.max(error.1));
                }
            }
        }
        println!(
            "{:?}: loss / gradient in units of the last place\n| loss | f16 | bf16 | f32 | f64 |",
            device.location()
        );
        for (name, errors) in &measured {
            println!(
                "{}",
                line(name, &errors.map(|(a, b)| ((a * 100.0).round() / 100.0, (b * 100.0).round() / 100.0)))
            );
        }
        for ((name, measured), (_, on_the_cpu)) in measured.iter().zip(&BOUNDS) {
            let on_cuda = CUDA_BOUNDS.iter().find(|(of, _)| of == name).filter(|_| device.is_cuda());
            let bounds = on_cuda.map_or(on_the_cpu, |(_, bounds)| bounds);
            for ((measured, bound), dtype) in measured.iter().zip(bounds).zip(FLOATS) {
                assert!(measured.0 <= bound.0, "{name} {dtype:?}: loss {} ulp, bound {}", measured.0, bound.0);
                assert!(measured.1 <= bound.1, "{name} {dtype:?}: gradient {} ulp, bound {}", measured.1, bound.1);
            }
        }
    }
    Ok(())
}

#[test]
fn readme_has_the_table() {
    let readme = include_str!("../../README.md");
    for (name, bounds) in BOUNDS.iter().chain(&CUDA_BOUNDS) {
        let line = line(name, bounds);
        assert!(readme.contains(&line), "README.md lacks the line {line}");
    }
}
