//! The kernels against the CPU's loops, through the ops: every pass, variant and dtype.

use crate::cuda::work::{Work, work_of};
use crate::elementwise::problem::{ElementOptions, Elements, Term};
use crate::reduction::{Denominator, LossForm, Reduction};
use candle_core::{DType, Device, Result, Tensor, Var};
use std::cell::Cell;

thread_local! {
    /// Lets a test reach the regime of 2^31 elements with few.
    pub(super) static WIDE_INDICES_FROM: Cell<Option<usize>> = const { Cell::new(None) };
}

const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
const TERMS: [Term; 4] = [Term::Bce, Term::BceWithLogits, Term::Focal { alpha: Some(0.25), gamma: 1.5 }, Term::L1];

fn gpu() -> Device {
    Device::new_cuda(0).expect("a CUDA device: softgpu/README.md says how to have one in software")
}

/// What a loss without a normalizer does.
const REDUCTIONS: [Reduction; 3] = [Reduction::None, Reduction::Mean, Reduction::Sum];

fn form(reduction: Reduction) -> LossForm {
    match reduction {
        Reduction::None => LossForm::Each,
        Reduction::Mean => LossForm::MEAN,
        Reduction::Sum => LossForm::SUM,
        Reduction::BatchMean => divided_by(3.0),
    }
}

fn divided_by(value: f64) -> LossForm {
    LossForm::Scalar(Denominator::Value(value))
}

fn divided_by_tensor(value: f64, device: &Device) -> Result<LossForm> {
    Ok(LossForm::Scalar(Denominator::Tensor(Tensor::new(value, device)?)))
}

fn plain(term: Term, reduction: Reduction) -> Elements {
    let options = ElementOptions { reduction, ..ElementOptions::default() };
    Elements { name: "test", term, average_rows: false, form: form(reduction), options }
}

fn with(mut problem: Elements, change: impl FnOnce(&mut Elements)) -> Elements {
    change(&mut problem);
    problem
}

/// Deterministic numbers in [0, 1).
fn uniform(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n).map(|_| next()).collect()
}

/// Inputs that suit the term: probabilities, or logits from tiny to far beyond saturation.
fn inputs(term: Term, n: usize) -> Vec<f64> {
    let u = uniform(n, 7);
    match term {
        Term::Bce => u.iter().enumerate().map(|(i, &u)| if i % 13 == 5 { (i % 2) as f64 } else { u }).collect(),
        _ => u.iter().enumerate().map(|(i, &u)| (u - 0.5) * [0.01, 2.0, 20.0, 300.0][i % 4]).collect(),
    }
}

/// Labels of 0, 1 and in between.
fn labels(n: usize) -> Vec<f64> {
    uniform(n, 11).iter().enumerate().map(|(i, &u)| if i % 3 == 0 { u } else { u.round() }).collect()
}

fn tensor(values: Vec<f64>, shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Rounding of the dtype, times the deviation of a few differently rounded functions and of sums in another order. A
/// gradient may cancel, where a target between the labels meets its own probability: there, the rounding of its parts
/// counts. An exponential that is not a normal number is 0 on the CPU, and may have a weight.
fn close(case: &str, what: &str, arithmetic: DType, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dtype(), want.dtype(), "{case}: dtype of {what}");
    assert_eq!(got.dims(), want.dims(), "{case}: shape of {what}");
    let (relative, absolute) = match (want.dtype(), arithmetic) {
        (DType::F16, _) => (2e-3, 1.2e-7),
        (DType::BF16, _) => (1.6e-2, 1e-37),
        (_, DType::F64) => (1e-12, 1e-300),
        _ => (2e-5, 1e-37),
    };
    let want = values(want)?;
    let largest = want.iter().filter(|v| v.is_finite()).fold(0f64, |m, v| m.max(v.abs()));
    let rounding = if arithmetic == DType::F64 { 1e-15 } else { 4e-7 };
    let absolute = absolute + if what.ends_with("gradient") { rounding * largest } else { 0.0 };
    for (i, (g, w)) in values(got)?.into_iter().zip(want).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= relative * w.abs() + absolute;
        assert!(same, "{case}: {what}[{i}] is {g}, expected {w}");
    }
    Ok(())
}

type ViewOf = fn(&Tensor) -> Result<Tensor>;

fn same(t: &Tensor) -> Result<Tensor> {
    Ok(t.clone())
}

/// Everything a loss computes on a device.
struct Outcome {
    loss: Tensor,
    grad: Tensor,
    target_grad: Option<Tensor>,
    fused_loss: Tensor,
    fused_grad: Tensor,
}

fn outcome(problem: &Elements, x: &Tensor, t: &Tensor, view: ViewOf, device: &Device) -> Result<Outcome> {
    let on_device = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_device(device)).transpose();
    let problem = with(problem.clone(), |o| {
        o.options.weight = on_device(&problem.options.weight).unwrap();
        o.options.pos_weight = on_device(&problem.options.pos_weight).unwrap();
        o.options.mask = on_device(&problem.options.mask).unwrap();
        if let LossForm::Scalar(Denominator::Tensor(tensor)) = &mut o.form {
            *tensor = tensor.to_device(device).unwrap();
        }
    });
    let x = Var::from_tensor(&x.to_device(device)?)?;
    let t = t.to_device(device)?;
    let t_var = t.dtype().is_float().then(|| Var::from_tensor(&t)).transpose()?;
    let t = t_var.as_ref().map_or(&t, |t| t.as_tensor());
    let (x_view, t_view) = (view(&x)?, view(t)?);
    let loss = problem.clone().forward(&x_view, &t_view)?;
    let factors = uniform(loss.elem_count(), 3);
    let factors = Tensor::from_vec(factors, loss.dims(), &Device::Cpu)?.to_dtype(loss.dtype())?.to_device(device)?;
    let grads = (&loss * factors)?.sum_all()?.backward()?;
    let (fused_loss, fused_grad) = problem.loss_and_grad(&x_view.detach(), &t_view.detach())?;
    let grad = grads.get(&x).cloned().expect("a gradient of the input");
    let target_grad = t_var.map(|t| grads.get(&t).cloned().expect("a gradient of the target"));
    Ok(Outcome { loss, grad, target_grad, fused_loss, fused_grad })
}

fn compare(case: &str, problem: &Elements, x: &Tensor, t: &Tensor, view: ViewOf, device: &Device) -> Result<()> {
    let want = outcome(problem, x, t, view, &Device::Cpu)?;
    let got = compare_without_target(case, problem, x, t, view, device)?;
    let arithmetic = want.loss.dtype();
    if let (Some(got), Some(want)) = (got.target_grad, want.target_grad) {
        close(case, "target's gradient", arithmetic, &got, &want)?;
    }
    Ok(())
}

fn compare_without_target(
    case: &str,
    problem: &Elements,
    x: &Tensor,
    t: &Tensor,
    view: ViewOf,
    device: &Device,
) -> Result<Outcome> {
    let want = outcome(problem, x, t, view, &Device::Cpu)?;
    let got = outcome(problem, x, t, view, device)?;
    let arithmetic = want.loss.dtype();
    close(case, "loss", arithmetic, &got.loss, &want.loss)?;
    close(case, "gradient", arithmetic, &got.grad, &want.grad)?;
    close(case, "fused loss", arithmetic, &got.fused_loss, &want.fused_loss)?;
    close(case, "fused gradient", arithmetic, &got.fused_grad, &want.fused_grad)?;
    Ok(got)
}

#[test]
fn every_term_dtype_and_reduction() -> Result<()> {
    let device = gpu();
    for term in TERMS {
        for dtype in FLOATS {
            for reduction in REDUCTIONS {
                let n = 777;
                let (x, t) = (tensor(inputs(term, n), &[n], dtype)?, tensor(labels(n), &[n], dtype)?);
                compare(&format!("{term:?} {dtype:?} {reduction:?}"), &plain(term, reduction), &x, &t, same, &device)?;
            }
        }
    }
    Ok(())
}

/// Around a window (2 to 8 elements), a warp, a block and the switch to a second launch.
#[test]
fn sizes_around_the_launch_shapes() -> Result<()> {
    let device = gpu();
    for dtype in [DType::BF16, DType::F32] {
        for n in [1, 2, 3, 7, 8, 9, 31, 32, 33, 1023, 1025, 8192, 8193, 16384, 16385, 40_001] {
            for reduction in [Reduction::None, Reduction::Mean] {
                let term = Term::BceWithLogits;
                let (x, t) = (tensor(inputs(term, n), &[n], dtype)?, tensor(labels(n), &[n], dtype)?);
                compare(&format!("{n} {dtype:?} {reduction:?}"), &plain(term, reduction), &x, &t, same, &device)?;
            }
        }
    }
    Ok(())
}

/// Windows begin where the input is aligned, whatever the offset, and outputs where they are.
#[test]
fn unaligned_offsets() -> Result<()> {
    let device = gpu();
    let views: [ViewOf; 4] =
        [|t| t.narrow(0, 1, 500), |t| t.narrow(0, 3, 17), |t| t.narrow(0, 8, 505), |t| t.narrow(0, 11, 2)];
    for dtype in FLOATS {
        for (i, view) in views.into_iter().enumerate() {
            for reduction in REDUCTIONS {
                let term = Term::BceWithLogits;
                let (x, t) = (tensor(inputs(term, 520), &[520], dtype)?, tensor(labels(520), &[520], dtype)?);
                compare(&format!("view {i} {dtype:?} {reduction:?}"), &plain(term, reduction), &x, &t, view, &device)?;
            }
        }
    }
    // input and target aligned differently
    for dtype in FLOATS {
        let problem = plain(Term::BceWithLogits, Reduction::Sum);
        let (x, t) = (tensor(inputs(problem.term, 300), &[300], dtype)?, tensor(labels(300), &[300], dtype)?);
        let run = |device: &Device| -> Result<Tensor> {
            problem.clone().forward(&x.to_device(device)?.narrow(0, 1, 290)?, &t.to_device(device)?.narrow(0, 2, 290)?)
        };
        close(
            "apart",
            "loss",
            if dtype == DType::F64 { DType::F64 } else { DType::F32 },
            &run(&device)?,
            &run(&Device::Cpu)?,
        )?;
    }
    Ok(())
}

#[test]
fn strides() -> Result<()> {
    let device = gpu();
    let views: [(&str, ViewOf); 5] = [
        ("transposed", |t| t.transpose(0, 2)),
        ("inner axes swapped", |t| t.transpose(1, 2)),
        ("every second row", |t| t.reshape((3, 2, 4, 9))?.narrow(1, 1, 1)?.squeeze(1)),
        ("broadcast", |t| t.narrow(1, 2, 1)?.broadcast_as((6, 5, 9))),
        ("narrowed inside", |t| t.narrow(2, 1, 7)?.narrow(1, 1, 2)),
    ];
    for dtype in [DType::BF16, DType::F32] {
        for (name, view) in views {
            for term in TERMS {
                let n = 6 * 4 * 9;
                let (x, t) = (tensor(inputs(term, n), &[6, 4, 9], dtype)?, tensor(labels(n), &[6, 4, 9], dtype)?);
                for reduction in [Reduction::None, Reduction::Mean] {
                    compare(
                        &format!("{name} {term:?} {dtype:?} {reduction:?}"),
                        &plain(term, reduction),
                        &x,
                        &t,
                        view,
                        &device,
                    )?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn wide_indices() -> Result<()> {
    let device = gpu();
    WIDE_INDICES_FROM.set(Some(0));
    let n = 6 * 4 * 9;
    let term = Term::BceWithLogits;
    let (x, t) = (tensor(inputs(term, n), &[6, 4, 9], DType::F32)?, tensor(labels(n), &[6, 4, 9], DType::F32)?);
    for average_rows in [false, true] {
        let problem = with(plain(term, Reduction::None), |o| o.average_rows = average_rows);
        compare("transposed", &problem, &x, &t, |t| t.transpose(0, 2), &device)?;
    }
    WIDE_INDICES_FROM.set(None);
    Ok(())
}

#[test]
fn weights_masks_and_smoothing() -> Result<()> {
    let device = gpu();
    let (rows, classes) = (60, 35);
    let n = rows * classes;
    let term = Term::BceWithLogits;
    let broadcast = |seed: u64, dtype: DType| -> Result<Option<Tensor>> {
        let row: Vec<f64> = uniform(classes, seed).iter().map(|u| u + 0.5).collect();
        tensor(row, &[classes], dtype)?.broadcast_as((rows, classes)).map(Some)
    };
    for dtype in FLOATS {
        let arithmetic = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let (x, t) = (tensor(inputs(term, n), &[rows, classes], dtype)?, tensor(labels(n), &[rows, classes], dtype)?);
        let full: Vec<f64> = uniform(n, 23);
        let mask: Vec<f64> = uniform(n, 29).iter().map(|u| f64::from(*u > 0.3)).collect();
        for reduction in REDUCTIONS {
            for mask_dtype in [DType::U8, DType::F32, dtype] {
                let problem = with(plain(term, reduction), |o| {
                    o.options.weight = Some(tensor(full.clone(), &[rows, classes], arithmetic).unwrap());
                    o.options.pos_weight = broadcast(5, arithmetic).unwrap();
                    o.options.mask = Some(tensor(mask.clone(), &[rows, classes], mask_dtype).unwrap());
                    o.options.label_smoothing = 0.1;
                });
                compare(&format!("all {dtype:?} {mask_dtype:?} {reduction:?}"), &problem, &x, &t, same, &device)?;
            }
            let problem = with(plain(Term::Focal { alpha: None, gamma: 2.0 }, reduction), |o| {
                o.options.weight = broadcast(17, arithmetic).unwrap()
            });
            compare(&format!("weights {dtype:?} {reduction:?}"), &problem, &x, &t, same, &device)?;
        }
    }
    Ok(())
}

#[test]
fn rows_are_averaged() -> Result<()> {
    let device = gpu();
    for (rows, classes) in [(1, 1), (300, 1), (70, 3), (33, 20), (5, 257), (2, 5000)] {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            for reduction in REDUCTIONS {
                for weighted in [false, true] {
                    let term = Term::BceWithLogits;
                    let shape = [rows, classes];
                    let arithmetic = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                    let weight = tensor(uniform(classes, 5), &[classes], arithmetic)?.broadcast_as(&shape)?;
                    let problem = with(plain(term, reduction), |o| {
                        o.average_rows = true;
                        o.options.weight = weighted.then_some(weight);
                    });
                    let x = tensor(inputs(term, rows * classes), &shape, dtype)?;
                    let t = tensor(labels(rows * classes), &shape, dtype)?;
                    let case = format!("{shape:?} {dtype:?} {reduction:?} weighted {weighted}");
                    compare(&case, &problem, &x, &t, same, &device)?;
                }
            }
        }
    }
    Ok(())
}

/// A normalizer in memory has the effect of the same number as a parameter, to the bit, in every pass; one of 0 makes
/// the loss what the division gives, and lets no gradient out.
#[test]
fn normalizers() -> Result<()> {
    let device = gpu();
    for (rows, classes) in [(6, 35), (70, 1000)] {
        let shape = [rows, classes];
        let mask: Vec<f64> = uniform(rows * classes, 29).iter().map(|u| f64::from(*u > 0.3)).collect();
        for (term, dtype) in TERMS.into_iter().zip([DType::BF16, DType::F32, DType::F16, DType::F64]) {
            let x = tensor(inputs(term, rows * classes), &shape, dtype)?;
            let t = tensor(labels(rows * classes), &shape, dtype)?;
            let mask = tensor(mask.clone(), &shape, DType::U8)?;
            for (masked, average_rows) in [(false, false), (true, false), (false, true)] {
                let of = |form: LossForm| {
                    let options = ElementOptions { mask: masked.then(|| mask.clone()), ..ElementOptions::default() };
                    Elements { name: "test", term, average_rows, form, options }
                };
                let case = format!("{shape:?} {term:?} {dtype:?} masked {masked} rows {average_rows}");
                let (number, memory) = (of(divided_by(7.25)), of(divided_by_tensor(7.25, &Device::Cpu)?));
                compare(&case, &memory, &x, &t, same, &device)?;
                let number = outcome(&number, &x, &t, same, &device)?;
                let memory = outcome(&memory, &x, &t, same, &device)?;
                let all = |o: &Outcome| -> Result<Vec<Vec<f64>>> {
                    [&o.loss, &o.grad, &o.fused_loss, &o.fused_grad].into_iter().map(values).collect()
                };
                assert_eq!(all(&number)?, all(&memory)?, "{case}");
                let nothing = outcome(&of(divided_by_tensor(0.0, &Device::Cpu)?), &x, &t, same, &device)?;
                for loss in [&nothing.loss, &nothing.fused_loss] {
                    assert_eq!(values(loss)?, [f64::INFINITY], "{case}");
                }
                for grad in [Some(&nothing.grad), nothing.target_grad.as_ref(), Some(&nothing.fused_grad)] {
                    assert!(grad.map_or(Ok(vec![]), values)?.iter().all(|g| *g == 0.0), "{case}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn target_dtypes() -> Result<()> {
    let device = gpu();
    let n = 600;
    let label: Vec<f64> = uniform(n, 11).iter().map(|u| u.round()).collect();
    for target_dtype in [DType::U8, DType::U32, DType::I32, DType::I64, DType::F16, DType::BF16, DType::F32, DType::F64]
    {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            for term in TERMS {
                let (x, t) = (tensor(inputs(term, n), &[n], dtype)?, tensor(label.clone(), &[n], target_dtype)?);
                compare(&format!("{target_dtype:?} {dtype:?}"), &plain(term, Reduction::Mean), &x, &t, same, &device)?;
            }
        }
    }
    Ok(())
}

/// Infinite logits, saturated and subnormal ones, and NaN, with exact labels and with ones in between.
#[test]
fn extreme_logits() -> Result<()> {
    let device = gpu();
    let inf = f64::INFINITY;
    let logits = [inf, -inf, 1e4, -1e4, 89.0, -89.0, 104.0, -104.0, 17.0, -20.0, 1e-30, -1e-30, 0.0, f64::NAN];
    let targets = [0.0, 1.0, 0.25];
    let terms = [
        Term::BceWithLogits,
        Term::Focal { alpha: Some(0.25), gamma: 2.0 },
        Term::Focal { alpha: None, gamma: 0.0 },
        Term::Focal { alpha: None, gamma: 0.5 },
        Term::Focal { alpha: Some(0.9), gamma: 3.5 },
    ];
    for dtype in FLOATS {
        for term in terms {
            let x: Vec<f64> = targets.iter().flat_map(|_| logits).collect();
            let t: Vec<f64> = targets.iter().flat_map(|&t| logits.map(|_| t)).collect();
            let n = x.len();
            let problem = plain(term, Reduction::None);
            let (x, t) = (tensor(x, &[n], dtype)?, tensor(t, &[n], dtype)?);
            // the target's gradient is infinite at an infinite logit
            let got = compare_without_target(&format!("{term:?} {dtype:?}"), &problem, &x, &t, same, &device)?;
            for (i, ((x, loss), grad)) in values(&x)?.iter().zip(values(&got.loss)?).zip(values(&got.grad)?).enumerate()
            {
                let finite = x.is_finite();
                assert_eq!(loss.is_nan(), x.is_nan(), "{term:?} {dtype:?}: loss {i} at {x} is {loss}");
                assert_eq!(grad.is_nan(), x.is_nan(), "{term:?} {dtype:?}: gradient {i} at {x} is {grad}");
                assert!(!finite || (loss.is_finite() && grad.is_finite()), "{term:?} {dtype:?}: {loss}, {grad} at {x}");
            }
        }
    }
    Ok(())
}

#[test]
fn masked_elements_leak_nothing() -> Result<()> {
    let device = gpu();
    for mean in [Reduction::Mean, Reduction::Sum, Reduction::BatchMean, Reduction::None] {
        let x = Tensor::new(&[1f32, f32::NAN, f32::INFINITY, -1.0], &device)?;
        let t = Tensor::new(&[1f32, 0.0, f32::NAN, 0.0], &device)?;
        let mask = Tensor::new(&[1u8, 0, 0, 1], &device)?;
        let problem = with(plain(Term::BceWithLogits, mean), |o| o.options.mask = Some(mask));
        let (loss, grad) = problem.loss_and_grad(&x, &t)?;
        let softplus = (-1f64).exp().ln_1p();
        let slope = 1.0 / (1.0 + 1f64.exp());
        let (want, scale) = match mean {
            Reduction::Mean => (vec![softplus], 0.5),
            Reduction::Sum => (vec![2.0 * softplus], 1.0),
            Reduction::BatchMean => (vec![2.0 / 3.0 * softplus], 1.0 / 3.0),
            Reduction::None => (vec![softplus, 0.0, 0.0, softplus], 1.0),
        };
        for (g, w) in values(&loss)?.iter().zip(&want) {
            assert!((g - w).abs() < 1e-6, "{g} {w}");
        }
        let grad = values(&grad)?;
        assert_eq!(grad[1..3], [0.0, 0.0]);
        assert!((grad[0] + scale * slope).abs() < 1e-6 && (grad[3] - scale * slope).abs() < 1e-6, "{grad:?}");
    }
    // nothing left: the mean is NaN, the gradient 0
    let x = Tensor::new(&[1f32, f32::NAN], &device)?;
    let problem = with(plain(Term::BceWithLogits, Reduction::Mean), |o| {
        o.options.mask = Some(Tensor::new(&[0u8, 0], &device).unwrap())
    });
    let (loss, grad) = problem.loss_and_grad(&x, &x)?;
    assert!(values(&loss)?[0].is_nan());
    assert_eq!(values(&grad)?, [0.0, 0.0]);
    Ok(())
}

#[test]
fn probabilities_out_of_range() -> Result<()> {
    let device = gpu();
    let x = Tensor::new(&[0.5f32, 1.5, 0.25, f32::NAN, 0.0, 1.0], &device)?;
    let t = Tensor::new(&[1f32, 0.0, -0.5, 0.0, 0.0, 1.0], &device)?;
    let problem = plain(Term::Bce, Reduction::None);
    let (loss, grad) = problem.clone().loss_and_grad(&x, &t)?;
    let nan: Vec<bool> = values(&loss)?.iter().map(|v| v.is_nan()).collect();
    assert_eq!(nan, [false, true, true, true, false, false]);
    let nan: Vec<bool> = values(&grad)?.iter().map(|v| v.is_nan()).collect();
    assert_eq!(nan, [false, true, true, true, false, false]);

    let checked = with(problem, |o| o.options.target_check = true);
    for start in 0..4 {
        let len = 6 - start;
        let message = |device: &Device| -> Result<String> {
            let x = x.to_device(device)?.narrow(0, start, len)?;
            let t = t.to_device(device)?.narrow(0, start, len)?;
            Ok(checked.clone().forward(&x, &t).expect_err("a bad element").to_string())
        };
        let first_line = |s: String| s.lines().next().unwrap_or_default().to_string();
        assert_eq!(first_line(message(&device)?), first_line(message(&Device::Cpu)?));
    }
    checked.clone().forward(&x.narrow(0, 4, 2)?, &t.narrow(0, 4, 2)?)?;
    // behind a mask nothing is refused
    let mask = Tensor::new(&[1u8, 0, 0, 0, 1, 1], &device)?;
    let (loss, grad) = with(checked, |o| o.options.mask = Some(mask)).loss_and_grad(&x, &t)?;
    assert!((values(&loss)?[0] - 2f64.ln()).abs() < 1e-6);
    assert_eq!(values(&loss)?[1..], [0.0; 5]);
    assert_eq!(values(&grad)?, [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    Ok(())
}

#[test]
fn nothing_is_launched_for_no_elements() -> Result<()> {
    let device = gpu();
    let x = Tensor::zeros((0, 3), DType::BF16, &device)?;
    for reduction in REDUCTIONS {
        let work = work_of(|| plain(Term::BceWithLogits, reduction).loss_and_grad(&x, &x))?;
        assert_eq!((work.launches, work.waits), (0, 0));
        let (loss, grad) = plain(Term::BceWithLogits, reduction).loss_and_grad(&x, &x)?;
        assert_eq!((grad.dims(), grad.dtype()), (x.dims(), x.dtype()));
        let loss = values(&loss)?;
        match reduction {
            Reduction::None => assert!(loss.is_empty()),
            Reduction::Mean => assert!(loss[0].is_nan()),
            Reduction::Sum | Reduction::BatchMean => assert_eq!(loss, [0.0]),
        }
    }
    Ok(())
}

/// Every kernel of the family is launched by some call.
#[test]
fn every_kernel_is_reached() -> Result<()> {
    let device = gpu();
    let (rows, classes) = (70, 1000);
    for dtype in FLOATS {
        let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let x = Var::from_tensor(&Tensor::full(0.5f32, (rows, classes), &device)?.to_dtype(dtype)?)?;
        let t = Var::from_tensor(&Tensor::zeros((rows, classes), dtype, &device)?)?;
        for term in TERMS {
            let weight = Some(Tensor::ones((rows, classes), acc, &device)?);
            let mask = Some(Tensor::ones((rows, classes), DType::U8, &device)?);
            let checked = with(plain(term, Reduction::Mean), |o| o.options.target_check = true);
            for loss in [
                checked,
                with(plain(term, Reduction::Mean), |o| {
                    o.options.weight = weight;
                    o.options.mask = mask;
                }),
            ] {
                loss.clone().forward(&x, &t)?.backward()?;
                loss.loss_and_grad(&x, &t)?;
            }
        }
        assert_eq!(super::call::module("test", dtype)?.unused(), [""; 0], "{dtype:?}");
    }
    Ok(())
}

/// Launches, allocations and waits of a call: one launch, mean included; a count of the mask goes ahead of a gradient
/// where it is long. Beside the results, one allocation holds the denominator, sums and counts.
#[test]
fn work_of_a_call() -> Result<()> {
    let device = gpu();
    let one = Work { launches: 1, allocations: 1, waits: 0 };
    // (rows, classes, launches of a masked mean with its gradient)
    for (rows, classes, masked) in [(1, 2, 1), (10, 100, 1), (64, 1000, 1), (70, 1000, 2)] {
        for dtype in [DType::BF16, DType::F32] {
            let x = Var::from_tensor(&Tensor::ones((rows, classes), dtype, &device)?)?;
            let t = Tensor::zeros((rows, classes), dtype, &device)?;
            let weight = Some(Tensor::ones(classes, DType::F32, &device)?.broadcast_as((rows, classes))?);
            let mask = Some(Tensor::ones((rows, classes), DType::U8, &device)?);
            for (term, reduction) in
                TERMS.into_iter().zip([Reduction::Mean, Reduction::Sum, Reduction::Mean, Reduction::Sum])
            {
                let without = plain(term, reduction);
                let labels = with(plain(term, reduction), |o| {
                    o.name = "multi_label";
                    o.average_rows = true;
                });
                let weighted = with(plain(term, reduction), |o| {
                    o.options.weight = weight.clone();
                    o.options.pos_weight = weight.clone();
                });
                let with_mask = with(plain(term, Reduction::Mean), |o| o.options.mask = mask.clone());
                // read where it is: neither waited for nor copied, and a mask need not be counted
                let normalized = with(with_mask.clone(), |o| o.form = divided_by_tensor(3.0, &device).unwrap());
                let dense = with(without.clone(), |o| o.form = normalized.form.clone());
                let one_launch = [without, labels, weighted, normalized, dense].map(|loss| (loss, 1));
                for (loss, launches) in one_launch.into_iter().chain([(with_mask, masked)]) {
                    let what = format!("{rows} x {classes}, {dtype:?}, {loss:?}");
                    let forward = work_of(|| loss.clone().forward(&x, &t))?;
                    assert_eq!(forward, Work { launches: 1, allocations: 2, waits: 0 }, "{what}: forward");
                    let both = work_of(|| loss.clone().loss_and_grad(&x, &t))?;
                    assert_eq!((both.launches, both.waits), (launches, 0), "{what}: loss_and_grad");
                    assert!(both.allocations <= 3, "{what}: loss_and_grad: {both:?}");
                    let loss = loss.forward(&x, &t)?;
                    assert_eq!(work_of(|| loss.backward())?, one, "{what}: backward");
                }
            }
        }
    }
    let x = Tensor::zeros((300, 100), DType::F32, &device)?;
    for average_rows in [false, true] {
        let problem = with(plain(Term::BceWithLogits, Reduction::None), |o| o.average_rows = average_rows);
        assert_eq!(work_of(|| problem.clone().forward(&x, &x))?.launches, 1);
    }
    Ok(())
}

/// The same call gives the same bits.
#[test]
fn sums_are_reproducible() -> Result<()> {
    let device = gpu();
    let n = 50_000;
    let x = tensor(inputs(Term::BceWithLogits, n), &[n], DType::F32)?.to_device(&device)?;
    let t = tensor(labels(n), &[n], DType::F32)?.to_device(&device)?;
    let run = || values(&plain(Term::BceWithLogits, Reduction::Sum).forward(&x, &t)?);
    assert_eq!(run()?, run()?);
    Ok(())
}

/// A problem that was not checked with these tensors is an error, not an access out of bounds.
#[test]
fn operands_that_do_not_fit() -> Result<()> {
    let gpu = gpu();
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &gpu);
    let (x, short) = (zeros(&[2, 3], DType::F32)?, zeros(&[2, 2], DType::F32)?);
    let says = |problem: Elements, target: &Tensor, part: &str| {
        for result in [problem.clone().forward(&x, target), problem.loss_and_grad(&x, target).map(|(loss, _)| loss)] {
            let error = result.expect_err(part).to_string();
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    };
    let l1 = || plain(Term::L1, Reduction::Mean);
    says(l1(), &short, "an operand of another shape than the input's [2, 3]");
    says(with(l1(), |p| p.options.mask = Some(short.clone())), &x, "an operand of another shape");
    let normalizer = |tensor: Tensor| with(l1(), |p| p.form = LossForm::Scalar(Denominator::Tensor(tensor)));
    says(normalizer(zeros(&[], DType::F32)?), &x, "a normalizer other than one number of f64");
    says(normalizer(zeros(&[0], DType::F64)?), &x, "a normalizer other than one number of f64");
    let wide = zeros(&[2, 3], DType::F64)?;
    says(with(l1(), |p| p.options.weight = Some(wide)), &x, "weights of another dtype than F32");
    Ok(())
}
