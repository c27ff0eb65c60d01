//! How exact every element of a softmax gradient is, and what is finite: against f64, at logits that are chosen so that
//! nothing but the kernels' own arithmetic is measured.
//!
//! The gradient is a difference of two terms, `slope p` and `q`. No arithmetic keeps more than the digits of the larger
//! of the two, so that is what an element is measured by, in units in the last place of the arithmetic dtype; on CUDA
//! relative to it, in units of the distance from 1 to the next number. A 16-bit gradient is rounded once more, for half
//! a unit of its own.

use crate::common::{FLOATS, Random, arithmetic, devices, half_ulp, indices, is_slow, stored, tensor, values};
use crate::reference::sum;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{CrossEntropyLoss, Reduction, RowStatistics, log_softmax};
use std::f64::consts::LN_2;

/// The most units that an element may be off: one for the exponential, for each sum over the classes (of exponentials,
/// and of q) one, and half a unit for each of the six roundings of `upstream / denominator * (slope p - q)`.
const UNITS: f64 = 6.0;
/// On CUDA, where the exponential may be off by two, its units and those of the sums are of numbers that may be as much
/// as twice as large beside their last place as the element is: relative units, which add up.
const CUDA_UNITS: f64 = 6.0;

fn units_of(device: &Device) -> f64 {
    if device.is_cuda() { CUDA_UNITS } else { UNITS }
}

/// One way to have a gradient.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    probabilities: bool,
    weights: bool,
    smoothing: f64,
    z_loss: f64,
    softcap: Option<f64>,
    /// A power of two, so that the product is exact.
    scale: Option<f64>,
}

/// Logits in eighths, which every dtype holds and whose differences are exact.
fn logits(kind: usize, classes: usize, random: &mut Random) -> Vec<f64> {
    let mut x: Vec<f64> = match kind {
        // nearly level: the largest logit is no more probable than the others
        0 => (0..classes).map(|_| (random.below(2) as f64) / 8.0).collect(),
        // a single largest logit with a small probability
        1 => (0..classes).map(|c| if c == classes / 2 { 0.125 } else { 0.0 }).collect(),
        _ => random.normals(classes, 2.0).iter().map(|x| (x * 8.0).round().clamp(-64.0, 64.0) / 8.0).collect(),
    };
    if kind == 3 {
        x[0] += 15.0;
    }
    x
}

/// An element of a gradient, `slope p - q` times the chain rule's factors.
struct Element {
    value: f64,
    /// What its error is measured by.
    size: f64,
    p: f64,
}

/// The gradient of a row.
fn reference(way: Way, x: &[f64], q: &[f64]) -> Vec<Element> {
    let scale = way.scale.unwrap_or(1.0);
    let y: Vec<f64> = x.iter().map(|x| way.softcap.map_or(scale * x, |cap| cap * (scale * x / cap).tanh())).collect();
    let slope_of = |x: f64| scale * way.softcap.map_or(1.0, |cap| (scale * x / cap).cosh().powi(-2));
    let max = y.iter().fold(f64::NEG_INFINITY, |m, &y| m.max(y));
    let top = y.iter().position(|&y| y == max).unwrap();
    let rest = sum((0..y.len()).filter(|&c| c != top).map(|c| (y[c] - max).exp()));
    let mass = sum(q.iter().copied());
    let beyond = 2.0 * way.z_loss * (max + rest.ln_1p());
    let element = |c: usize| {
        let p = (y[c] - max).exp() / (1.0 + rest);
        let of_mass = if p > 0.5 { (mass - q[c]) - mass * (rest / (1.0 + rest)) } else { mass * p - q[c] };
        let factor = slope_of(x[c]);
        let size = factor.abs() * (mass * p).abs().max((beyond * p).abs()).max(q[c].abs());
        Element { value: factor * (of_mass + beyond * p), size, p }
    };
    (0..y.len()).map(element).collect()
}

/// The largest error in units, of the gradients of the backward and of `loss_and_grad`.
fn units(way: Way, classes: usize, dtype: DType, device: &Device, random: &mut Random) -> Result<f64> {
    let rows = 4;
    let x: Vec<f64> = (0..rows).flat_map(|kind| logits(kind, classes, random)).collect();
    let dims = [rows, classes];
    let class_of = [1, classes as i64 / 2, 1, 0];
    let mut loss = CrossEntropyLoss::new().with_reduction(Reduction::Sum).with_label_smoothing(way.smoothing);
    loss = loss.with_z_loss(way.z_loss);
    if let Some(cap) = way.softcap {
        loss = loss.with_softcap(cap);
    }
    if let Some(scale) = way.scale {
        loss = loss.with_logit_scale(scale);
    }
    let weight = tensor(&random.uniforms(classes), &[classes], arithmetic(dtype), device)?;
    let weights = if way.weights { values(&weight)? } else { vec![1.0; classes] };
    if way.weights {
        loss = loss.with_weight(weight);
    }
    let mut soft: Vec<f64> = random.uniforms(rows * classes);
    soft.chunks_mut(classes).for_each(|row| {
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|t| *t /= sum);
    });
    // of the confident row all but nothing in the confident class
    soft[3 * classes..].iter_mut().enumerate().for_each(|(c, t)| *t = if c == 0 { 1.0 } else { 0.0 });
    let soft = tensor(&soft, &dims, dtype, device)?;
    let t = if way.probabilities { soft.clone() } else { indices(&class_of, &[rows], DType::U32, device)? };
    let soft = values(&soft)?;
    let q = |row: usize, c: usize| {
        let hard = (class_of[row] == c as i64) as u8 as f64;
        let t = if way.probabilities { soft[row * classes + c] } else { hard };
        weights[c] * ((1.0 - way.smoothing) * t + way.smoothing / classes as f64)
    };
    let x = tensor(&x, &dims, dtype, device)?;
    let leaf = Var::from_tensor(&x)?;
    let backward = loss.forward(&leaf, &t)?.backward()?.remove(&leaf).expect("a gradient");
    let one_pass = loss.loss_and_grad(&x, &t)?.1;
    let seen = values(&x)?;
    let mut worst = 0f64;
    for got in [backward, one_pass] {
        let got = values(&got)?;
        for row in 0..rows {
            let q: Vec<f64> = (0..classes).map(|c| q(row, c)).collect();
            let at = row * classes..(row + 1) * classes;
            for (want, got) in reference(way, &seen[at.clone()], &q).into_iter().zip(&got[at]) {
                worst = worst.max(off(device, dtype, *got, want.value, want.size));
            }
        }
    }
    Ok(worst)
}

/// How many units of a dtype's arithmetic an error is beside `size`, as the device's units are.
fn in_units(device: &Device, dtype: DType, error: f64, size: f64) -> f64 {
    let epsilon = if dtype == DType::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
    let relative = epsilon * size.max(least(dtype));
    error / if device.is_cuda() { relative } else { 2.0 * half_ulp(arithmetic(dtype), size) }
}

/// The least normal number of a dtype's arithmetic.
fn least(dtype: DType) -> f64 {
    if dtype == DType::F64 { f64::MIN_POSITIVE } else { f32::MIN_POSITIVE as f64 }
}

/// How many units a gradient is off, relative to `size`, without the rounding to its dtype.
fn off(device: &Device, dtype: DType, got: f64, want: f64, size: f64) -> f64 {
    let rounding =
        if dtype == arithmetic(dtype) { 0.0 } else { half_ulp(dtype, want * (1.0 + f32::EPSILON as f64 * 8.0)) };
    assert!(!got.is_nan(), "expected {want:e}");
    // what is below the normal numbers may be flushed, and 16-bit numbers have a least distance
    let error = (got - want).abs() - rounding - 64.0 * least(dtype);
    in_units(device, dtype, error.max(0.0), size)
}

#[test]
fn every_element_is_within_a_few_units() -> Result<()> {
    let plain = Way::default();
    let soft = Way { probabilities: true, ..plain };
    let ways = [
        plain,
        Way { weights: true, ..plain },
        Way { smoothing: 0.1, z_loss: 1e-4, ..plain },
        Way { smoothing: 0.1, weights: true, scale: Some(2.0), ..plain },
        Way { scale: Some(-0.5), ..plain },
        soft,
        Way { weights: true, smoothing: 0.2, z_loss: 1e-4, ..soft },
    ];
    for device in devices() {
        let mut worst = (0.0, String::new());
        for dtype in FLOATS {
            let sizes: &[usize] =
                if is_slow(&device) { &[2, 10, 64, 333, 6000] } else { &[2, 3, 10, 64, 65, 333, 1000, 6000] };
            for (&classes, way) in sizes.iter().flat_map(|c| ways.iter().map(move |w| (c, *w))) {
                let mut random = Random::new(141);
                let units = units(way, classes, dtype, &device, &mut random)?;
                if units > worst.0 {
                    worst = (units, format!("{classes} classes, {dtype:?}, {way:?}"));
                }
            }
        }
        println!("{:?}: {} units, {}", device.location(), worst.0, worst.1);
        let bound = units_of(&device);
        assert!(worst.0 <= bound, "{} units of {bound}: {}", worst.0, worst.1);
    }
    Ok(())
}

/// Beside a mass of 1 that cancels, the z-loss is all there is to a confident row's gradient.
#[test]
fn the_part_of_the_z_loss_keeps_its_digits() -> Result<()> {
    for device in devices() {
        for (dtype, way) in [DType::F32, DType::F64].into_iter().flat_map(|dtype| {
            [(None, None), (Some(2.0), None), (None, Some(100.0))]
                .map(|(scale, softcap)| (dtype, Way { z_loss: 1e-4, scale, softcap, ..Way::default() }))
        }) {
            let x = [20.0, 0.0, 0.0];
            let mut loss = CrossEntropyLoss::new().with_z_loss(way.z_loss).with_logit_scale(way.scale.unwrap_or(1.0));
            if let Some(cap) = way.softcap {
                loss = loss.with_softcap(cap);
            }
            let t = Tensor::new(&[0u32], &device)?;
            let got = values(&loss.loss_and_grad(&tensor(&x, &[1, 3], dtype, &device)?, &t)?.1)?;
            let want = reference(way, &x, &[1.0, 0.0, 0.0])[0].value;
            let error = in_units(&device, dtype, (got[0] - want).abs(), want.abs());
            assert!(
                error <= units_of(&device),
                "{dtype:?}, {way:?}: got {:e}, expected {want:e}, off by {error} units",
                got[0]
            );
        }
    }
    Ok(())
}

/// A gradient that is tiny because the own class is nearly certain, by class index, by probability and with a weight.
#[test]
fn confident_rows_keep_their_digits() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64] {
            let x = tensor(&[20.0, 0.0, 0.0], &[1, 3], dtype, &device)?;
            let index = Tensor::new(&[0u32], &device)?;
            let soft = tensor(&[1.0, 0.0, 0.0], &[1, 3], dtype, &device)?;
            let weight = tensor(&[3.0, 1.0, 1.0], &[3], dtype, &device)?;
            let rest = 2.0 * (-20f64).exp();
            let want = -rest / (1.0 + rest);
            let sum = CrossEntropyLoss::new().with_reduction(Reduction::Sum);
            let weighted = sum.clone().with_weight(weight);
            let grad = |loss: &CrossEntropyLoss, t: &Tensor| values(&loss.loss_and_grad(&x, t)?.1);
            let all = [(grad(&sum, &index)?, 1.0), (grad(&sum, &soft)?, 1.0), (grad(&weighted, &index)?, 3.0)];
            let leaf = Var::from_tensor(&x)?;
            // log-softmax's, for an upstream gradient that is nonzero at this class alone
            let log_prob = log_softmax(&leaf, 1)?.narrow(1, 0, 1)?.sum_all()?;
            let of_log_softmax = values(log_prob.backward()?.get(&leaf).expect("a gradient"))?;
            for (got, factor) in all.into_iter().chain([(of_log_softmax, -1.0)]) {
                let want = factor * want;
                let error = in_units(&device, dtype, (got[0] - want).abs(), want.abs());
                assert!(
                    error <= units_of(&device),
                    "{dtype:?}: got {:e}, expected {want:e}, off by {error} units",
                    got[0]
                );
            }
        }
    }
    Ok(())
}

/// `g - p sum(g)` with p from the input: off by the one rounding to 16 bits, where p from the rounded output would be
/// off by several.
#[test]
fn log_softmax_has_a_gradient_of_its_input() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(142);
        for dtype in FLOATS {
            for classes in if is_slow(&device) { vec![3, 333] } else { vec![2, 3, 64, 333, 6000] } {
                let dims = [4, classes];
                let x: Vec<f64> = (0..4).flat_map(|kind| logits(kind, classes, &mut random)).collect();
                let g = tensor(&random.normals(4 * classes, 1.0), &dims, dtype, &device)?;
                let x = Var::from_tensor(&tensor(&x, &dims, dtype, &device)?)?;
                let grads = (log_softmax(&x, 1)? * &g)?.sum_all()?.backward()?;
                let got = values(grads.get(&x).expect("a gradient"))?;
                let (seen, g) = (values(&x)?, values(&g)?);
                for (row, g) in g.chunks(classes).enumerate() {
                    let at = row * classes..(row + 1) * classes;
                    // the gradient of cross-entropy for probabilities g, with the other sign
                    let want = reference(Way::default(), &seen[at.clone()], g);
                    // f64 numbers of both signs are added in f64: what that loses is in each element times p
                    let sizes: f64 = if dtype == DType::F64 { g.iter().map(|g| g.abs()).sum() } else { 0.0 };
                    for (c, (want, got)) in want.into_iter().zip(&got[at]).enumerate() {
                        let Element { value, size, p } = want;
                        let units = off(&device, dtype, *got, -value, size.max(p * sizes));
                        let what = format!("{dtype:?}, {classes} classes, [{row}, {c}]");
                        assert!(
                            units <= units_of(&device),
                            "{what}: got {got:e}, expected {:e}, off by {units} units",
                            -value
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// Inputs whose classes lie apart, at an offset, or in another order than the upstream gradient's: the same gradient as
/// of a contiguous copy.
#[test]
fn log_softmax_of_any_layout_has_the_same_gradient() -> Result<()> {
    type View = fn(&Tensor) -> Result<Tensor>;
    let views: [(&str, View); 6] = [
        ("all", |x| Ok(x.clone())),
        ("transposed", |x| x.transpose(0, 2)),
        ("transposed, at an offset", |x| x.narrow(0, 1, 3)?.transpose(1, 2)),
        ("windows", |x| x.narrow(2, 3, 6)),
        ("windows of transposed rows", |x| x.narrow(1, 2, 4)?.transpose(0, 1)),
        ("broadcast", |x| x.narrow(1, 0, 1)?.broadcast_as((5, 7, 11))),
    ];
    for device in devices() {
        let mut random = Random::new(143);
        for dtype in [DType::BF16, DType::F32] {
            let whole = Var::from_tensor(&tensor(&random.normals(5 * 7 * 11, 2.0), &[5, 7, 11], dtype, &device)?)?;
            for ((what, view), axis) in views.iter().flat_map(|view| (0..3).map(move |axis| (view, axis))) {
                let dims = view(&whole)?.dims().to_vec();
                let g = tensor(&random.normals(dims.iter().product(), 1.0), &dims, dtype, &device)?;
                let swapped = g.transpose(0, 2)?.force_contiguous()?.transpose(0, 2)?;
                let gradient = |x: &Tensor, g: &Tensor| {
                    let grads = (log_softmax(x, axis)? * g)?.sum_all()?.backward()?;
                    values(grads.get(&whole).expect("a gradient"))
                };
                let want = gradient(&view(&whole)?.contiguous()?, &g)?;
                for g in [&g, &swapped] {
                    for (i, (got, want)) in gradient(&view(&whole)?, g)?.iter().zip(&want).enumerate() {
                        // sums run in another order; candle adds the gradients of what is broadcast in their dtype
                        let near = (got - want).abs() <= 1e-5 + 8.0 * half_ulp(dtype, *want);
                        assert!(near, "{what}, axis {axis}, {dtype:?} [{i}]: {got:e}, {want:e}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// What a call returned, as numbers.
fn finite_call(loss: &CrossEntropyLoss, x: &Tensor, t: &Tensor) -> Result<(Vec<f64>, Vec<f64>)> {
    let leaf = Var::from_tensor(x)?;
    let forward = loss.forward(&leaf, t)?;
    // candle leaves out the gradient of what is multiplied by 0
    let backward = forward.backward()?.get(&leaf).map_or_else(|| Ok(vec![0.0; x.elem_count()]), values)?;
    let (again, grad) = loss.loss_and_grad(x, t)?;
    assert_eq!((values(&forward)?, &backward), (values(&again)?, &values(&grad)?));
    Ok((values(&again)?, backward))
}

fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f64(),
        DType::BF16 => half::bf16::MAX.to_f64(),
        DType::F32 => f32::MAX as f64,
        _ => f64::MAX,
    }
}

/// Finite logits have a finite gradient, and a finite loss unless that is larger than any number: at the largest logits
/// of each dtype, scaled and capped.
#[test]
fn the_largest_logits_have_a_softmax() -> Result<()> {
    let plain = CrossEntropyLoss::new();
    for device in devices() {
        for dtype in FLOATS {
            let most = largest(dtype);
            let scaled = |scale| CrossEntropyLoss::new().with_logit_scale(scale);
            // logits, target, the loss for the first logit and its distance to the second, gradient
            type Row<'a> = (&'a CrossEntropyLoss, [f64; 2], u32, fn(f64) -> f64, [f64; 2]);
            let rows: [Row; 13] = [
                (&plain, [most, -most], 0, |_| 0.0, [0.0, 0.0]),
                (&plain, [most, -most], 1, |d| d, [1.0, -1.0]),
                (&plain, [most, most], 0, |_| LN_2, [-0.5, 0.5]),
                (&plain, [-most, -most], 1, |_| LN_2, [0.5, -0.5]),
                (&scaled(2.0), [most, most], 0, |_| LN_2, [-1.0, 1.0]),
                (&scaled(2.0), [-most, -most], 0, |_| LN_2, [-1.0, 1.0]),
                (&scaled(2.0), [most, 0.5 * most], 0, |_| 0.0, [0.0, 0.0]),
                (&scaled(2.0), [most, 0.75 * most], 1, |d| 2.0 * d, [2.0, -2.0]),
                (&scaled(-2.0), [most, -most], 1, |_| 0.0, [0.0, 0.0]),
                (&scaled(-2.0), [most, most], 1, |_| LN_2, [-1.0, 1.0]),
                (&scaled(0.0), [most, -most], 1, |_| LN_2, [0.0, 0.0]),
                (&scaled(2.0).with_softcap(1.5), [most, most], 0, |_| LN_2, [0.0, 0.0]),
                (&plain.clone().with_softcap(1.5), [most, -most], 1, |_| 3.0 + (-3f64).exp().ln_1p(), [0.0, 0.0]),
            ];
            for (loss, x, t, want, gradient) in rows {
                let x = tensor(&x, &[1, 2], dtype, &device)?;
                let seen = values(&x)?;
                let want = stored(arithmetic(dtype), want(seen[0] - seen[1]));
                let what = format!("{dtype:?}, {:?}: {loss:?}", seen);
                let t = Tensor::new(&[t], &device)?;
                let near = |got: f64, want: f64| got == want || (got - want).abs() <= 1e-6 * want.abs();
                for loss in [loss.clone(), loss.clone().with_fused(false)] {
                    let (got, grad) = finite_call(&loss, &x, &t)?;
                    assert!(near(got[0], want), "{what}: loss {:e}, expected {want:e}", got[0]);
                    assert!(near(grad[0], gradient[0]) && near(grad[1], gradient[1]), "{what}: gradient {grad:?}");
                }
            }
        }
    }
    Ok(())
}

/// Targets and statistics where the row begins with classes so far below its maximum that their distance is no number.
#[test]
fn the_lowest_logits_are_no_nan_in_sums() -> Result<()> {
    for device in devices() {
        for (dtype, classes) in
            FLOATS.into_iter().flat_map(|d| [(d, 3), (d, if is_slow(&device) { 700 } else { 70_000 })])
        {
            let most = largest(dtype);
            let mut x = vec![-most; classes];
            x[classes - 1] = most;
            let mut soft = vec![0.0; classes];
            soft[classes - 1] = 1.0;
            let x = tensor(&x, &[1, classes], dtype, &device)?;
            let soft = tensor(&soft, &[1, classes], dtype, &device)?;
            let index = Tensor::new(&[classes as u32 - 1], &device)?;
            for t in [&soft, &index] {
                let (loss, grad) = finite_call(&CrossEntropyLoss::new(), &x, t)?;
                assert_eq!(loss, [0.0], "{dtype:?}");
                assert!(grad.iter().all(|g| *g == 0.0), "{dtype:?}");
                let RowStatistics { loss, lse, z_loss, entropy, .. } = CrossEntropyLoss::new().statistics(&x, t)?;
                assert_eq!([values(&loss)?, values(&z_loss)?, values(&entropy)?].concat(), [0.0; 3], "{dtype:?}");
                assert_eq!(values(&lse)?, [most], "{dtype:?}");
            }
            let leaf = Var::from_tensor(&x)?;
            let y = log_softmax(&leaf, 1)?;
            let grads = y.narrow(1, 0, 1)?.sum_all()?.backward()?;
            let grad = values(grads.get(&leaf).expect("a gradient"))?;
            assert_eq!((grad[0], grad[classes - 1]), (1.0, -1.0), "{dtype:?}");
        }
    }
    Ok(())
}

/// A scale multiplies differences of logits, so that what they have in common costs no accuracy.
#[test]
fn scaled_logits_with_a_common_offset() -> Result<()> {
    for device in devices() {
        for (scale, soft) in [(0.7, false), (0.7, true), (-1.3, false), (-1.3, true)] {
            let x = tensor(&[1e8 + 8.0, 1e8], &[1, 2], DType::F32, &device)?;
            let loss = CrossEntropyLoss::new().with_logit_scale(scale);
            let t = match soft {
                true => tensor(&[0.25, 0.75], &[1, 2], DType::F32, &device)?,
                false => Tensor::new(&[1u32], &device)?,
            };
            let y = scale * 8.0;
            let log_sum = y.max(0.0) + (-y.abs()).exp().ln_1p();
            let want = if soft { log_sum - 0.25 * y } else { log_sum };
            let p = 1.0 / (1.0 + (-y).exp());
            let slope = scale * if soft { p - 0.25 } else { p };
            let (got, grad) = finite_call(&loss, &x, &t)?;
            assert!((got[0] - want).abs() <= 4e-6 * want, "{scale} {soft}: loss {}, expected {want}", got[0]);
            assert!((grad[0] - slope).abs() <= 4e-6 * slope.abs(), "{scale} {soft}: {}, expected {slope}", grad[0]);
        }
    }
    Ok(())
}
