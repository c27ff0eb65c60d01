//! The CUDA path against the CPU path, in every launch regime.

use super::detail::{Detail, KERNELS};
use super::plan::Thresholds;
use crate::cuda::gpu::Image;
use crate::cuda::testing::{FLOATS, assert_close, form_of, indices, numbers, random, tolerance};
use crate::cuda::work::{Work, work_of};
use crate::reduction::{Denominator, LossForm, Reduction};
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
use crate::softmax::transform::RowTransform;
use candle_core::{DType, Device, Result, Tensor, Var};
use std::cell::Cell;

thread_local! {
    /// The thresholds of this thread's plans: lowered to reach each regime with small rows.
    pub(super) static THRESHOLDS: Cell<Thresholds> = Cell::new(Thresholds::default());
}

/// Regimes by the thresholds that send small rows there.
fn regimes() -> Vec<(&'static str, Thresholds)> {
    let usual = Thresholds::default();
    let no_tiles = Thresholds { tile_classes: 0, register_windows: 0, ..usual };
    let registers = Thresholds { register_windows: 16, ..no_tiles };
    vec![
        // with more classes than a tile has, the next regime
        ("tiles", usual),
        ("tiles in turn, counted ahead", Thresholds { blocks: 1, count_rows: 1, ..usual }),
        ("few lanes", Thresholds { row_threads: 0, ..usual }),
        ("registers", registers),
        ("registers, rows in turn, counted ahead", Thresholds { blocks: 1, count_rows: 1, ..registers }),
        ("warps", Thresholds { warp_bytes: 1 << 20, ..no_tiles }),
        ("warps, rows in turn", Thresholds { warp_bytes: 1 << 20, blocks: 1, ..no_tiles }),
        ("a block a row", Thresholds { warp_bytes: 0, ..no_tiles }),
        ("blocks, rows in turn, counted ahead", Thresholds { warp_bytes: 0, blocks: 2, count_rows: 1, ..no_tiles }),
        ("cluster of 2", Thresholds { warp_bytes: 0, cluster_bytes: 700, ..no_tiles }),
        ("cluster of 4", Thresholds { warp_bytes: 0, cluster_bytes: 350, ..no_tiles }),
        ("cluster of 8", Thresholds { warp_bytes: 0, cluster_bytes: 170, ..no_tiles }),
        ("cluster of 16", Thresholds { warp_bytes: 0, cluster_bytes: 16, ..no_tiles }),
        ("split rows", Thresholds { warp_bytes: 0, split_bytes: 256, part_bytes: 256, ..no_tiles }),
    ]
}

fn plain() -> CrossEntropy {
    CrossEntropy { name: "cross_entropy", axis: 1, form: LossForm::MEAN, options: SoftmaxOptions::default() }
}

fn with(mut problem: CrossEntropy, change: impl FnOnce(&mut SoftmaxOptions)) -> CrossEntropy {
    change(&mut problem.options);
    problem.form = form_of(problem.options.rows.reduction);
    problem
}

/// Every option at once.
fn everything(classes: usize) -> Result<CrossEntropy> {
    Ok(with(plain(), |o| {
        o.rows.weight = Some(random(&[classes], 7, DType::F32).unwrap().abs().unwrap());
        o.label_smoothing = 0.1;
        o.z_loss = 0.01;
        o.softcap = Some(2.5);
        o.logit_scale = 0.7;
    }))
}

/// The options that leave one number for all classes.
fn uniform() -> CrossEntropy {
    with(plain(), |o| {
        o.label_smoothing = 0.1;
        o.z_loss = 0.01;
        o.logit_scale = 1.7;
    })
}

/// A soft cap with the options that leave one number for all classes.
fn capped(softcap: f64) -> CrossEntropy {
    with(uniform(), |o| o.softcap = Some(softcap))
}

fn with_weight_on(options: &CrossEntropy, device: &Device, dtype: DType) -> Result<CrossEntropy> {
    let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let weight = options.options.rows.weight.as_ref().map(|w| w.to_dtype(acc)?.to_device(device)).transpose()?;
    let row_weight = options.options.rows.row_weight.as_ref().map(|w| w.to_device(device)).transpose()?;
    let moved = with(options.clone(), |o| (o.rows.weight, o.rows.row_weight) = (weight, row_weight));
    Ok(match &options.form {
        LossForm::Scalar(Denominator::Tensor(tensor)) => divided_by(moved, tensor.to_device(device)?),
        _ => moved,
    })
}

fn divided_by(problem: CrossEntropy, normalizer: Tensor) -> CrossEntropy {
    CrossEntropy { form: LossForm::Scalar(Denominator::Tensor(normalizer)), ..problem }
}

/// Compares all passes of one problem on both devices. `view` makes the logits of the operand that is on the device.
fn compare(
    what: &str,
    options: &CrossEntropy,
    logits: &Tensor,
    target: &Tensor,
    view: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let dtype = logits.dtype();
    let on = |device: &Device| -> Result<_> {
        let options = with_weight_on(options, device, dtype)?;
        let target = target.to_device(device)?;
        let var = Var::from_tensor(&logits.to_device(device)?)?;
        let x = view(var.as_tensor())?;
        let forward = options.clone().forward(&x, &target)?;
        let rows = forward.elem_count();
        let upstream = random(&[rows], 5, forward.dtype())?.reshape(forward.shape())?.to_device(device)?;
        let grads = (&forward * &upstream)?.sum_all()?.backward()?;
        let backward = grads.get(&var).unwrap().clone();
        let (loss, grad) = options.clone().loss_and_grad(&x, &target)?;
        let own = x.detach().force_contiguous()?;
        let inplace_loss = options.clone().loss_and_grad_inplace(&own, &target)?;
        let mut results = vec![
            ("forward", forward),
            ("backward", backward),
            ("loss", loss),
            ("gradient", grad),
            ("loss in place", inplace_loss),
            ("gradient in place", own),
        ];
        // one pass for both, whose gradient starts from the statistics
        let (forward, rows) = options.clone().forward_with_statistics(&x, &target)?;
        let grads = (&forward * &upstream)?.sum_all()?.backward()?;
        results.extend([("forward beside statistics", forward), ("its backward", grads.get(&var).unwrap().clone())]);
        let names = ["row loss", "lse", "z-loss", "entropy", "argmax", "correct", "counted"];
        results.extend(names.into_iter().zip(rows.all().map(Tensor::clone)));
        Ok(results)
    };
    for ((name, got), (_, expected)) in on(&gpu)?.iter().zip(&on(&Device::Cpu)?) {
        let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        // gradients are rounded to the logits' dtype
        let tolerance = if got.dtype() == dtype { tolerance(dtype) } else { tolerance(acc) };
        assert_close(&format!("{what}, {dtype:?}, {:?}: {name}", logits.dims()), got, expected, tolerance);
    }
    Ok(())
}

#[test]
fn regimes_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        // odd: every row begins elsewhere in its window
        let (rows, classes) = (5, 333);
        for dtype in FLOATS {
            let logits = random(&[rows, classes], 1, dtype)?;
            let target = indices(rows, classes, 2)?;
            compare(regime, &plain(), &logits, &target, |x| Ok(x.clone()))?;
            let weighted = with(plain(), |o| {
                o.rows.weight = Some(random(&[classes], 7, DType::F32).unwrap().abs().unwrap());
                o.rows.reduction = Reduction::None;
            });
            compare(regime, &weighted, &logits, &target, |x| Ok(x.clone()))?;
            compare(regime, &uniform(), &logits, &target, |x| Ok(x.clone()))?;
            let unsmoothed = with(weighted, |o| o.z_loss = 0.01);
            compare(regime, &unsmoothed, &logits, &target, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

#[test]
fn regimes_match_the_cpu_with_every_option() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let (rows, classes) = (5, 167);
        for dtype in FLOATS {
            let logits = random(&[rows, classes], 1, dtype)?;
            compare(regime, &everything(classes)?, &logits, &indices(rows, classes, 2)?, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

/// Caps far below the logits, as language models have them, and far above; alone and with what the same kernels serve.
#[test]
fn soft_caps_match_the_cpu() -> Result<()> {
    let (rows, classes) = (5, 167);
    let alone = |softcap| with(plain(), |o| o.softcap = Some(softcap));
    let weighted = with(plain(), |o| {
        o.softcap = Some(30.0);
        o.z_loss = 0.01;
        o.rows.weight = Some(random(&[classes], 7, DType::F32).unwrap().abs().unwrap());
        o.rows.reduction = Reduction::None;
    });
    // logits of up to two thirds of the cap, and of twice as much
    let scaled = |scale| with(alone(30.0), |o| o.logit_scale = scale);
    let problems = [alone(0.5), alone(30.0), alone(1e4), scaled(7.0), scaled(20.0), capped(2.5), capped(1e4), weighted];
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            let logits = random(&[rows, classes + 3], 1, dtype)?;
            let target = indices(rows, classes, 2)?;
            for (i, options) in problems.iter().enumerate() {
                compare(regime, options, &logits, &target, |x| x.narrow(1, i % 4, classes))?;
            }
        }
    }
    Ok(())
}

/// A cap without effect: the loss is that of the logits, up to (x / softcap)^2.
#[test]
fn large_soft_caps_change_nothing() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    THRESHOLDS.set(Thresholds::default());
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let logits = random(&[5, 300], 1, dtype)?.to_device(&gpu)?;
        let target = indices(5, 300, 2)?.to_device(&gpu)?;
        let options = with(plain(), |o| o.softcap = Some(1e5));
        let (capped, expected) = (options.forward(&logits, &target)?, plain().forward(&logits, &target)?);
        assert_close("large cap", &capped, &expected, tolerance(DType::F32));
    }
    Ok(())
}

/// With a cap as without: a row whose target is its largest logit has the loss log1p(rest) with all its digits.
#[test]
fn confident_capped_rows_are_accurate() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let classes = 200;
            let mut row = vec![0f32; classes];
            row[77] = 60.0;
            let logits = Tensor::new(row, &gpu)?.reshape((1, classes))?.to_dtype(dtype)?;
            let target = Tensor::new(&[77u32], &gpu)?;
            let options = with(plain(), |o| o.softcap = Some(30.0));
            let (loss, grad) = options.loss_and_grad(&logits, &target)?;
            let rest = 199.0 * (-30.0 * 2f64.tanh()).exp();
            let loss = loss.to_scalar::<f32>()? as f64;
            assert!((loss / rest - 1.0).abs() < 3e-5, "{regime}, {dtype:?}: {loss:e}, expected {rest:e}");
            let slope = 1.0 - 2f64.tanh().powi(2);
            let grad = grad.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let expected = if dtype == DType::F16 { 0.0 } else { -rest * slope };
            let error = (grad[77] as f64 - expected).abs();
            assert!(error <= 5e-3 * expected.abs(), "{regime}, {dtype:?}: {:e}, expected {expected:e}", grad[77]);
        }
    }
    Ok(())
}

#[test]
fn probability_targets_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let (rows, classes) = (3, 70);
        for (dtype, of_target) in
            [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::F16), (DType::F64, DType::BF16)]
        {
            let logits = random(&[rows, classes], 1, dtype)?;
            let target = random(&[rows, classes], 3, of_target)?.abs()?;
            compare(regime, &plain(), &logits, &target, |x| Ok(x.clone()))?;
            compare(regime, &everything(classes)?, &logits, &target, |x| Ok(x.clone()))?;
        }
    }
    Ok(())
}

/// Targets that windows of logits are aligned with, or not, and whose classes lie apart, in each pair of dtypes.
#[test]
fn probability_targets_of_each_layout_match_the_cpu() -> Result<()> {
    let (rows, classes) = (3, 150);
    for (regime, thresholds) in regimes() {
        if !["warps", "a block a row", "split rows"].contains(&regime) {
            continue;
        }
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            for of_target in FLOATS {
                let logits = random(&[rows, classes + 9], 1, dtype)?;
                let wide = random(&[rows, classes + 9], 3, of_target)?.abs()?;
                let apart = random(&[classes, rows], 3, of_target)?.abs()?.t()?;
                let targets =
                    [("aligned", 0, wide.narrow(1, 0, classes)?), ("unaligned", 3, wide.narrow(1, 2, classes)?)];
                for (what, offset, target) in targets.into_iter().chain([("apart", 5, apart)]) {
                    let what = format!("{regime}, {what} targets of {of_target:?}");
                    compare(&what, &plain(), &logits, &target, |x| x.narrow(1, offset, classes))?;
                }
            }
        }
    }
    Ok(())
}

/// A probability of 0 at a logit of -inf counts as 0, any other makes the loss infinite; confident rows.
#[test]
fn extreme_probabilities_match_the_cpu() -> Result<()> {
    let classes = 41;
    let mut rows = vec![numbers(classes, 1); 5];
    let mut target = vec![vec![1f32 / classes as f32; classes]; 5];
    // hidden classes, at the first maximum of a window too
    for k in (0..classes).step_by(3) {
        (rows[0][k], target[0][k]) = (f32::NEG_INFINITY, 0.0);
    }
    rows[1][40] = f32::NEG_INFINITY;
    rows[2][7] = f32::NAN;
    rows[3] = vec![0.0; classes];
    rows[3][5] = 20.0;
    target[3] = vec![0.0; classes];
    target[3][5] = 1.0;
    target[4][2] = f32::NAN;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            let logits = Tensor::new(rows.concat(), &Device::Cpu)?.reshape((5, classes))?.to_dtype(dtype)?;
            let target = Tensor::new(target.concat(), &Device::Cpu)?.reshape((5, classes))?;
            let negative = with(plain(), |o| o.logit_scale = -0.5);
            for options in [plain(), negative, with(plain(), |o| o.softcap = Some(30.0))] {
                let options = with(options, |o| o.rows.reduction = Reduction::None);
                compare(regime, &options, &logits, &target, |x| Ok(x.clone()))?;
            }
        }
    }
    Ok(())
}

/// Threads on the same rows as many as the classes allow, and one or two, which then take many classes each; blocks
/// that take rows in turn.
fn strided_regimes() -> [(&'static str, Thresholds); 3] {
    let usual = Thresholds::default();
    [
        ("deep blocks", usual),
        ("a thread a row", Thresholds { strided_depth: 1, ..usual }),
        ("rows in turn, counted ahead", Thresholds { strided_depth: 2, blocks: 1, count_rows: 1, ..usual }),
    ]
}

#[test]
fn strided_logits_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in strided_regimes() {
        THRESHOLDS.set(thresholds);
        // images of an even number of pixels, whose rows lie in pairs, and of an odd one; more rows than a block takes
        for (n, classes, inner) in [(3, 21, 10), (3, 21, 7), (1, 40, 9), (2, 12, 300)] {
            for dtype in FLOATS {
                let logits = random(&[n, classes, inner], 1, dtype)?;
                let target = indices(n * inner, classes, 2)?.reshape((n, inner))?;
                let what = format!("{regime}, middle axis");
                compare(&what, &plain(), &logits, &target, |x| Ok(x.clone()))?;
                if inner > 10 {
                    continue;
                }
                compare(&what, &uniform(), &logits, &target, |x| Ok(x.clone()))?;
                compare(&what, &capped(2.5), &logits, &target, |x| Ok(x.clone()))?;
                compare(&what, &everything(classes)?, &logits, &target, |x| Ok(x.clone()))?;
                let swapped = random(&[n, inner, classes], 1, dtype)?;
                compare("transposed", &plain(), &swapped, &target, |x| x.transpose(1, 2))?;
                let matrix = random(&[classes, n * inner], 1, dtype)?;
                compare("matrix transposed", &uniform(), &matrix, &target.flatten_all()?, |x| x.t())?;
            }
        }
    }
    Ok(())
}

/// Rows in pairs and not: each combination of an even or odd place of the first logit, distance of the classes and
/// distance of the images.
#[test]
fn strided_views_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in strided_regimes() {
        THRESHOLDS.set(thresholds);
        let (n, classes) = (2, 23);
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for (inner, wide, offset) in [(6, 8, 2), (6, 8, 1), (6, 7, 0), (5, 6, 0), (5, 8, 3), (1, 4, 2)] {
                let logits = random(&[n, classes + 1, wide], 1, dtype)?;
                let target = indices(n * inner, classes, 2)?.reshape((n, inner))?;
                for first in 0..2 {
                    let view = |x: &Tensor| x.narrow(1, first, classes)?.narrow(2, offset, inner);
                    compare(&format!("{regime}, {offset} of {wide}"), &uniform(), &logits, &target, view)?;
                }
                // the same of a matrix whose rows are its columns
                let matrix = random(&[classes + 1, wide], 1, dtype)?;
                let target = target.narrow(0, 0, 1)?.flatten_all()?;
                for first in 0..2 {
                    let view = |x: &Tensor| x.narrow(0, first, classes)?.narrow(1, offset, inner)?.t();
                    compare(&format!("{regime}, columns"), &plain(), &matrix, &target, view)?;
                }
            }
        }
    }
    Ok(())
}

/// Of two rows that a thread takes at a time, one that is ignored or has no softmax leaves the other as it is.
#[test]
fn strided_neighbours_are_independent() -> Result<()> {
    for (regime, thresholds) in strided_regimes() {
        THRESHOLDS.set(thresholds);
        let (classes, inner) = (13, 6);
        let mut values = numbers(classes * inner, 1);
        for class in 0..classes {
            // an ignored row of NaN, a row of -inf, and a NaN
            values[class * inner] = f32::NAN;
            values[class * inner + 3] = f32::NEG_INFINITY;
        }
        values[2 * inner + 4] = f32::NAN;
        let target = Tensor::new(&[[-100i64, 5, 3, 1, 2, 12]], &Device::Cpu)?;
        for dtype in FLOATS {
            let logits = Tensor::new(values.clone(), &Device::Cpu)?.reshape((1, classes, inner))?.to_dtype(dtype)?;
            for options in [plain(), uniform(), everything(classes)?] {
                let options = with(options, |o| o.rows.reduction = Reduction::None);
                compare(regime, &options, &logits, &target, |x| Ok(x.clone()))?;
            }
        }
    }
    Ok(())
}

/// A gradient in place of logits that do not begin at a word of two: read and written one by one.
#[test]
fn strided_logits_are_replaced_wherever_they_begin() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in strided_regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in [DType::BF16, DType::F32] {
            for offset in [0, 1, 2] {
                let wide = random(&[offset + 2 * 15 * 6], 1, dtype)?;
                let target = indices(12, 15, 2)?.reshape((2, 6))?;
                let on = |device: &Device| -> Result<_> {
                    let x = wide.to_device(device)?.narrow(0, offset, 2 * 15 * 6)?.reshape((2, 15, 6))?;
                    let loss = plain().loss_and_grad_inplace(&x, &target.to_device(device)?)?;
                    Ok((loss, x))
                };
                let (got, expected) = (on(&gpu)?, on(&Device::Cpu)?);
                let what = format!("{regime}, {dtype:?}, from {offset} on");
                assert_close(&what, &got.0, &expected.0, tolerance(DType::F32));
                assert_close(&what, &got.1, &expected.1, tolerance(dtype));
            }
        }
    }
    Ok(())
}

/// A name and thresholds for each way to take rows of adjacent classes that are not next to each other.
fn regimes_of_apart_rows() -> Vec<(&'static str, Thresholds)> {
    let block = Thresholds { warp_bytes: 0, ..Thresholds::default() };
    vec![
        ("registers or warps", Thresholds::default()),
        ("a block a row", block),
        ("nothing kept", Thresholds { shared_bytes: Some(0), ..block }),
        ("cluster of 2", Thresholds { cluster_bytes: 200, ..block }),
        ("cluster of 8", Thresholds { cluster_bytes: 50, ..block }),
        ("split rows", Thresholds { split_bytes: 16, part_bytes: 16, ..block }),
    ]
}

/// Rows that begin at each place of a 16-byte word, each with its gradient at another place.
#[test]
fn unaligned_rows_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes_of_apart_rows() {
        THRESHOLDS.set(thresholds);
        let classes = 85;
        for dtype in FLOATS {
            for offset in 0..=16 / dtype.size_in_bytes() {
                let logits = random(&[3, classes + 9], 1, dtype)?;
                let options = [plain(), uniform(), capped(2.5)][offset % 3].clone();
                compare(regime, &options, &logits, &indices(3, classes, 2)?, |x| x.narrow(1, offset, classes))?;
            }
        }
    }
    Ok(())
}

/// The logits of a language model without each text's last one, for an odd vocabulary.
#[test]
fn shifted_texts_match_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes_of_apart_rows() {
        THRESHOLDS.set(thresholds);
        let (texts, length, classes) = (9, 3, 85);
        for dtype in [DType::BF16, DType::F32] {
            let logits = random(&[texts, length, classes], 1, dtype)?;
            let target = indices(texts * (length - 1), classes, 2)?.reshape((texts, length - 1))?;
            let options = CrossEntropy { axis: 2, ..plain() };
            compare(regime, &options, &logits, &target, |x| x.narrow(1, 0, length - 1))?;
        }
    }
    Ok(())
}

/// Values whose probabilities are known: what a row of these gives is NaN, 0 or tiny, in that row alone.
#[test]
fn extreme_rows_match_the_cpu() -> Result<()> {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let classes = 41;
        let mut rows = vec![numbers(classes, 1); 9];
        rows[0] = vec![-inf; classes];
        rows[1][7] = nan;
        rows[2][3] = inf;
        rows[3] = vec![-inf; classes];
        rows[3][40] = 2.0;
        // confident: a loss of about 1e-7
        rows[4] = vec![0.0; classes];
        rows[4][5] = 20.0;
        // a common offset, and ties
        rows[5] = vec![1e8; classes];
        rows[6][..20].fill(-inf);
        rows[7].fill(nan);
        let target = Tensor::new(&[0i64, 1, 2, 40, 5, 6, 30, -100, 8], &Device::Cpu)?;
        for dtype in FLOATS {
            let logits = Tensor::new(rows.concat(), &Device::Cpu)?.reshape((9, classes))?.to_dtype(dtype)?;
            let smoothed = with(plain(), |o| {
                o.label_smoothing = 0.1;
                o.z_loss = 0.1;
            });
            // an infinite logit of an unlikely class has no part in the loss but with smoothing
            let scaled = with(plain(), |o| {
                o.z_loss = 0.1;
                o.logit_scale = 0.5;
            });
            // where a cap makes every logit finite
            let soft_capped = with(plain(), |o| o.softcap = Some(2.5));
            let negative = with(plain(), |o| o.logit_scale = -0.5);
            for options in [plain(), smoothed, scaled, negative, soft_capped, capped(2.5)] {
                let options = with(options, |o| o.rows.reduction = Reduction::None);
                compare(regime, &options, &logits, &target, |x| Ok(x.clone()))?;
            }
        }
    }
    Ok(())
}

/// What a mask leaves (the lowest number of the dtype) has a finite smoothed loss, and a common offset changes nothing.
#[test]
fn smoothed_rows_are_accurate() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let options = with(plain(), |o| o.label_smoothing = 0.1);
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let classes = 200;
            let target = Tensor::new(&[3u32], &gpu)?;
            let offset = Tensor::full(if dtype == DType::F16 { 3e4f32 } else { 1e8 }, (1, classes), &gpu)?;
            let loss = options.clone().forward(&offset.to_dtype(dtype)?, &target)?.to_scalar::<f32>()?;
            assert!((loss / 200f32.ln() - 1.0).abs() < 1e-6, "{regime}, {dtype:?}: {loss}");

            let lowest = match dtype {
                DType::F16 => -65504.0,
                _ => -3.3e38f32,
            };
            let mut masked = vec![1f32; classes];
            masked[20..].fill(lowest);
            let masked = Tensor::new(masked, &gpu)?.reshape((1, classes))?.to_dtype(dtype)?;
            let loss = options.clone().forward(&masked, &target)?.to_scalar::<f32>()?;
            let lowest = masked.to_dtype(DType::F32)?.min_all()?.to_scalar::<f32>()?;
            let expected = 20f64.ln() + 0.1 / 200.0 * 180.0 * (1.0 - lowest as f64);
            assert!((loss as f64 / expected - 1.0).abs() < 1e-6, "{regime}, {dtype:?}: {loss}, expected {expected}");
        }
    }
    Ok(())
}

/// Confident rows keep their relative accuracy: with a sum of all terms, log(1 + 2e-9) and 1 - p would be 0.
#[test]
fn confident_rows_are_accurate() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (_, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let logits = Tensor::new(&[[20f32, 0., 0.]], &gpu)?;
        let target = Tensor::new(&[0u32], &gpu)?;
        let (loss, grad) = plain().loss_and_grad(&logits, &target)?;
        let grad = grad.flatten_all()?.to_vec1::<f32>()?;
        assert!((loss.to_scalar::<f32>()? / 4.122_307e-9 - 1.0).abs() < 1e-6);
        assert!((grad[0] / -4.122_307e-9 - 1.0).abs() < 1e-6);
        assert!((grad[1] / 2.061_153_6e-9 - 1.0).abs() < 1e-6);
    }
    Ok(())
}

/// A bad target: NaN in its row, the other rows as they are without it, and the device survives.
#[test]
fn bad_targets_stay_in_their_rows() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let classes = 37;
        let logits = random(&[4, classes], 1, DType::F32)?.to_device(&gpu)?;
        let good = Tensor::new(&[1i64, 2, 3, 4], &gpu)?;
        for bad in [-1, classes as i64, 1 << 32, (1 << 32) + 1, i64::MIN] {
            let target = Tensor::new(&[1i64, bad, 3, 4], &gpu)?;
            let options = with(plain(), |o| o.rows.reduction = Reduction::None);
            let (loss, grad) = options.clone().loss_and_grad(&logits, &target)?;
            let (loss_without, grad_without) = options.clone().loss_and_grad(&logits, &good)?;
            for (what, with, without) in [("loss", loss, loss_without), ("gradient", grad, grad_without)] {
                let (with, without) =
                    (with.reshape((4, ()))?.to_vec2::<f32>()?, without.reshape((4, ()))?.to_vec2::<f32>()?);
                for row in 0..4 {
                    let right = if row == 1 { with[row].iter().all(|v| v.is_nan()) } else { with[row] == without[row] };
                    assert!(right, "{regime}: {what} of row {row} with target {bad}");
                }
            }
            let checked = with(options, |o| o.rows.target_check = true);
            let on_gpu = checked.clone().forward(&logits, &target).unwrap_err().to_string();
            let on_cpu = checked
                .forward(&logits.to_device(&Device::Cpu)?, &target.to_device(&Device::Cpu)?)
                .unwrap_err()
                .to_string();
            assert_eq!(on_gpu.lines().next(), on_cpu.lines().next());
        }
        let narrow = Tensor::new(&[1u8, 200, 3, 4], &gpu)?;
        assert!(plain().forward(&logits, &narrow)?.to_scalar::<f32>()?.is_nan());
    }
    Ok(())
}

#[test]
fn all_rows_ignored() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let logits = Tensor::full(f32::NAN, (3, 50), &gpu)?;
        let target = Tensor::new(&[7u32, 7, 7], &gpu)?;
        let (loss, grad) = with(plain(), |o| o.rows.ignore_index = 7).loss_and_grad(&logits, &target)?;
        assert!(loss.to_scalar::<f32>()?.is_nan(), "{regime}");
        assert!(grad.flatten_all()?.to_vec1::<f32>()?.iter().all(|&g| g == 0.0), "{regime}");
    }
    Ok(())
}

/// Nothing is launched for no rows.
#[test]
fn no_rows() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let logits = Var::zeros((0, 5), DType::F32, &gpu)?;
    let target = Tensor::zeros(0, DType::U32, &gpu)?;
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None, Reduction::BatchMean] {
        let options = with(plain(), |o| o.rows.reduction = reduction);
        let work = work_of(|| options.clone().forward(&logits, &target))?;
        assert_eq!((work.launches, work.waits), (0, 0), "{reduction:?}");
        assert_eq!(work_of(|| options.clone().loss_and_grad(&logits, &target))?.launches, 0, "{reduction:?}");
        assert_eq!(work_of(|| options.clone().forward_with_statistics(&logits, &target))?.launches, 0, "{reduction:?}");
        let forward = options.clone().forward(&logits, &target)?;
        let (loss, grad) = options.clone().loss_and_grad(&logits, &target)?;
        assert_eq!(grad.dims(), [0, 5]);
        match reduction {
            Reduction::Mean => assert!(forward.to_scalar::<f32>()?.is_nan() && loss.to_scalar::<f32>()?.is_nan()),
            Reduction::Sum => assert!(forward.to_scalar::<f32>()? == 0.0 && loss.to_scalar::<f32>()? == 0.0),
            Reduction::None => assert!(forward.dims() == [0] && loss.dims() == [0]),
            // of the scalar that the form is made for
            Reduction::BatchMean => assert_eq!((forward.to_scalar::<f32>()?, loss.to_scalar::<f32>()?), (0.0, 0.0)),
        }
    }
    Ok(())
}

/// What `enough_bytes_are_in_flight` counts on: kernels without registers for all the loads that memory needs on their
/// way prefetch the rest, ahead of their loops (over classes apart, for two turns) and in them, and all of them rows of
/// later waves.
#[test]
fn kernels_prefetch() -> Result<()> {
    use Detail::{General, Plain, Uniform};
    for dtype in FLOATS {
        for (detail, kernel, ahead, in_loops, later) in [
            (General, "softmax_reduce_general_rows", 4, 1, 3),
            (General, "softmax_statistics_rows", 4, 1, 3),
            (General, "softmax_emit_general_rows", 2, 2, 3),
            (General, "softmax_fused_general_rows", 4, 3, 3),
            (General, "softmax_reduce_general_strided", 4, 1, 2),
            (General, "softmax_statistics_strided", 4, 1, 2),
            (General, "softmax_emit_general_strided", 4, 1, 2),
            (General, "softmax_fused_general_strided", 4, 2, 2),
            // rows and classes apart, written in one of two dtypes where there are two
            (General, "softmax_target_gradient", 4 + 4, 1, 3 + 2),
            (Plain, "softmax_reduce_plain_rows", 4, 0, 3),
            (Plain, "softmax_fused_plain_rows", 4, 0, 3),
            (Plain, "softmax_log_softmax_rows", 0, 0, 3),
            (Plain, "softmax_reduce_plain_tile", 0, 0, 1),
            (Plain, "softmax_fused_plain_tile", 1, 0, 1),
            (Plain, "softmax_log_softmax_tile", 0, 0, 1),
            (Plain, "softmax_reduce_plain_registers_4", 0, 0, 1),
            (Plain, "softmax_fused_plain_registers_4", 0, 0, 1),
            (Plain, "softmax_log_softmax_registers_4", 0, 0, 1),
            (Plain, "softmax_log_softmax_strided", 0, 0, 2),
            // of the logits and of the upstream gradient
            (Plain, "softmax_log_softmax_backward_rows", 2, 2, 3 + 3),
            (Plain, "softmax_log_softmax_backward_any", 4, 1, 2 + 2),
            (Uniform, "softmax_reduce_uniform_rows", 4, 0, 3),
            (Uniform, "softmax_emit_uniform_rows", 2, 0, 3),
            (Uniform, "softmax_fused_uniform_rows", 4, 0, 3),
            (Uniform, "softmax_reduce_uniform_tile", 0, 0, 1),
            (Uniform, "softmax_emit_uniform_tile", 0, 0, 1),
            (Uniform, "softmax_fused_uniform_tile", 1, 0, 1),
            (Uniform, "softmax_reduce_uniform_registers_4", 0, 0, 1),
            (Uniform, "softmax_fused_uniform_registers_4", 0, 0, 1),
            (Uniform, "softmax_reduce_uniform_strided", 0, 0, 2),
            (Uniform, "softmax_emit_uniform_strided", 0, 0, 2),
            (Uniform, "softmax_fused_uniform_strided", 0, 0, 2),
        ] {
            // doubles have fewer kernels
            if dtype == DType::F64 && (detail == Uniform || !detail.module(dtype)?.kernels.contains(&kernel)) {
                continue;
            }
            let ptx = String::from_utf8(detail.module(dtype)?.image(Image::Ptx)?).expect("PTX is text");
            let (_, code) = ptx.split_once(&format!(".entry {kernel}(")).expect("the kernel");
            let code = code.split(".entry ").next().unwrap_or(code);
            let found = code.matches("prefetch.global.L2").count();
            assert!(found >= ahead + in_loops + later, "{kernel}, {dtype:?}: {found} prefetches");
        }
    }
    Ok(())
}

/// The table of kernels has all that were compiled; some plan chooses each of them, and its results are right.
#[test]
fn every_kernel_is_reached() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        let size = dtype.size_in_bytes();
        let usual = Thresholds::default();
        let whole = Thresholds { warp_bytes: 0, split_bytes: 1 << 30, ..usual };
        let cluster = |blocks: usize| Thresholds { cluster_bytes: (333 * size).div_ceil(blocks) as u64, ..whole };
        let mut problems = vec![
            (Thresholds { count_rows: 1, ..usual }, vec![300, 10]),
            (Thresholds { tile_classes: 0, ..usual }, vec![3, 50]),
            (usual, vec![3, 70]),
            // 130 and 260 windows
            (usual, vec![2, 130 * 16 / size]),
            (usual, vec![2, 260 * 16 / size]),
            (usual, vec![2, 21, 5]),
            (Thresholds { split_bytes: 256, part_bytes: 256, ..whole }, vec![2, 333]),
        ];
        problems.extend([2, 4, 8, 16].map(|blocks| (cluster(blocks), vec![2, 333])));
        for (thresholds, dims) in problems {
            THRESHOLDS.set(thresholds);
            let classes = dims[1];
            let logits = random(&dims, 1, dtype)?;
            let rows = logits.elem_count() / classes;
            let index_dims: Vec<usize> =
                dims.iter().enumerate().filter(|&(axis, _)| axis != 1).map(|(_, &n)| n).collect();
            let target = indices(rows, classes, 2)?.reshape(index_dims)?;
            for options in [plain(), uniform(), everything(classes)?] {
                compare("every kernel", &options, &logits, &target, |x| Ok(x.clone()))?;
            }
            let on = |device: &Device| -> Result<[Tensor; 2]> {
                let x = Var::from_tensor(&logits.to_device(device)?)?;
                let y = crate::softmax::op::log_softmax("log_softmax", true, x.as_tensor(), 1)?;
                let grads = y.sqr()?.sum_all()?.backward()?;
                Ok([y, grads.get(&x).unwrap().clone()])
            };
            for (got, expected) in on(&gpu)?.iter().zip(&on(&Device::Cpu)?) {
                assert_close(&format!("log_softmax {dtype:?} {dims:?}"), got, expected, 2.0 * tolerance(dtype));
            }
        }
        let target = Var::from_tensor(&random(&[2, 9], 2, DType::F32)?.abs()?.to_device(&gpu)?)?;
        plain().forward(&random(&[2, 9], 1, dtype)?.to_device(&gpu)?, target.as_tensor())?.backward()?;
        for detail in [Detail::Plain, Detail::Uniform, Detail::General] {
            if (detail, dtype) == (Detail::Uniform, DType::F64) {
                continue;
            }
            for &name in detail.module(dtype)?.kernels {
                assert!(KERNELS.iter().any(|kernel| kernel.3 == name), "{dtype:?}, {detail:?}: {name} is in no table");
            }
            let unused = detail.module(dtype)?.unused();
            assert!(unused.is_empty(), "{dtype:?}, {detail:?}: no plan chooses {unused:?}");
        }
    }
    Ok(())
}

/// Launches, allocations and waits of a call, in every regime: the loss and the gradient are memory of their own, all
/// else that a call needs is one allocation. Nothing waits.
#[test]
fn work_of_each_regime() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let (rows, classes) = (64, 130);
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let logits = Var::from_tensor(&random(&[rows, classes], 1, DType::F32)?.to_device(&gpu)?)?;
        let target = indices(rows, classes, 2)?.to_device(&gpu)?;
        for (reduction, options) in [
            (Reduction::Mean, plain()),
            (Reduction::Sum, plain()),
            (Reduction::None, plain()),
            (Reduction::Mean, uniform()),
            (Reduction::Mean, with_weight_on(&everything(classes)?, &gpu, DType::F32)?),
        ] {
            let what = format!("{regime}, {reduction:?}");
            let options = with(options, |o| o.rows.reduction = reduction);
            let split = regime == "split rows";
            let forward = work_of(|| options.clone().forward(&logits, &target))?;
            let expected = Work { launches: 1 + split as usize, allocations: 2, waits: 0 };
            assert_eq!(forward, expected, "{what}: forward");
            // a launch ahead counts the rows of a mean where they are many
            let both = work_of(|| options.clone().loss_and_grad(&logits, &target))?;
            let ahead = regime == "blocks, rows in turn, counted ahead" && reduction == Reduction::Mean;
            let sums = thresholds.blocks > 1 && reduction != Reduction::None;
            let launches = if split { 3 } else { 1 + ahead as usize };
            let expected = Work { launches, allocations: 2 + (sums || split || ahead) as usize, waits: 0 };
            assert_eq!(both, expected, "{what}: loss_and_grad");
            // seven numbers of each row are the caller's
            let statistics = work_of(|| options.clone().forward_with_statistics(&logits, &target))?;
            assert_eq!(statistics, Work { launches: 1, allocations: 9, waits: 0 }, "{what}: statistics");
            let loss = options.clone().forward(&logits, &target)?.sum_all()?;
            let backward = work_of(|| loss.backward())?;
            assert_eq!(backward, Work { launches: 1, allocations: 1, waits: 0 }, "{what}: backward");
        }
    }
    Ok(())
}

/// Up to 64 rows of 1000 classes: one launch forward, one backward and one for both, mean included, whatever the
/// options.
#[test]
fn small_problems_take_one_launch() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    THRESHOLDS.set(Thresholds::default());
    for (rows, classes) in [(1, 2), (5, 10), (64, 64), (64, 1000)] {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let logits = Var::from_tensor(&random(&[rows, classes], 1, dtype)?.to_device(&gpu)?)?;
            let index = indices(rows, classes, 2)?.to_device(&gpu)?;
            let probabilities = random(&[rows, classes], 3, DType::F32)?.abs()?.to_device(&gpu)?;
            let weight = random(&[classes], 7, DType::F32)?.abs()?;
            let weighted = with_weight_on(&with(plain(), |o| o.rows.weight = Some(weight)), &gpu, acc)?;
            let ignoring = with(plain(), |o| o.rows.ignore_index = index.get(0).unwrap().to_scalar::<i64>().unwrap());
            let all = with_weight_on(&everything(classes)?, &gpu, acc)?;
            for (what, options, target) in [
                ("plain", plain(), &index),
                ("weights", weighted, &index),
                ("ignored rows", ignoring, &index),
                ("every option", all.clone(), &index),
                ("probabilities", all, &probabilities),
            ] {
                let what = format!("{what}, {rows} x {classes}, {dtype:?}");
                let forward = work_of(|| options.clone().forward(&logits, target))?;
                assert_eq!(forward, Work { launches: 1, allocations: 2, waits: 0 }, "{what}: forward");
                let both = work_of(|| options.clone().loss_and_grad(&logits, target))?;
                assert_eq!((both.launches, both.waits), (1, 0), "{what}: loss_and_grad");
                // one for the sums of several blocks, where one block does not have threads for all rows
                let most = 2 + (rows == 64) as usize;
                assert!((2..=most).contains(&both.allocations), "{what}: loss_and_grad: {both:?}");
                let loss = options.forward(&logits, target)?;
                let backward = work_of(|| loss.backward())?;
                assert_eq!(backward, Work { launches: 1, allocations: 1, waits: 0 }, "{what}: backward");
            }
            // two numbers of each row are saved for a backward, where there can be one
            for (logits, allocations) in [(logits.as_tensor().clone(), 2), (logits.as_detached_tensor(), 1)] {
                let log_probs = work_of(|| crate::softmax::op::log_softmax("log_softmax", true, &logits, 1))?;
                assert_eq!(log_probs, Work { launches: 1, allocations, waits: 0 }, "log_softmax, {rows} x {classes}");
            }
        }
    }
    Ok(())
}

/// A problem that was not checked with these tensors is an error, not an access out of bounds.
#[test]
fn operands_that_do_not_fit() -> Result<()> {
    let says = |result: Result<Tensor>, part: &str| {
        let error = result.expect_err(part).to_string();
        assert!(error.contains(part), "{part:?} is not in {error:?}");
    };
    for device in [Device::Cpu, Device::new_cuda(0)?] {
        let x = random(&[5, 6], 1, DType::F32)?.to_device(&device)?;
        let (four, five) = (indices(4, 6, 2)?.to_device(&device)?, indices(5, 6, 2)?.to_device(&device)?);
        says(plain().forward(&x, &four), "4 class indices, expected one for each of 5 rows");
        says(plain().loss_and_grad(&x, &four).map(|(loss, _)| loss), "4 class indices");
        says(plain().forward_with_statistics(&x, &four).map(|(loss, _)| loss), "4 class indices");
        if device.is_cpu() {
            continue;
        }
        for (classes, dtype) in [(5, DType::F32), (6, DType::BF16)] {
            let weight = random(&[classes], 7, dtype)?.to_device(&device)?;
            says(
                with(plain(), |o| o.rows.weight = Some(weight)).forward(&x, &five),
                "expected 6 contiguous ones of F32",
            );
        }
        let probabilities = random(&[4, 6], 3, DType::F32)?.to_device(&device)?;
        says(plain().forward(&x, &probabilities), "target of shape [4, 6], expected the logits' [5, 6]");
    }
    Ok(())
}

/// Indices that lie apart are put together by a launch.
#[test]
fn strided_indices_take_one_launch_more() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    THRESHOLDS.set(Thresholds::default());
    let logits = random(&[4, 10], 1, DType::F32)?.to_device(&gpu)?;
    for dtype in [DType::U8, DType::U32, DType::I32, DType::I64] {
        let target = indices(8, 10, 2)?.to_dtype(dtype)?.reshape((4, 2))?.to_device(&gpu)?;
        let apart = target.narrow(1, 1, 1)?.squeeze(1)?;
        let both = work_of(|| plain().loss_and_grad(&logits, &apart))?;
        assert_eq!(both, Work { launches: 2, allocations: 3, waits: 0 }, "{dtype:?}");
    }
    Ok(())
}

/// Only the check of the targets waits for the device.
#[test]
fn the_target_check_waits() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let logits = random(&[4, 10], 1, DType::F32)?.to_device(&gpu)?;
    let target = indices(4, 10, 2)?.to_device(&gpu)?;
    let checked = with(plain(), |o| o.rows.target_check = true);
    assert_eq!(work_of(|| checked.forward(&logits, &target))?.waits, 1);
    Ok(())
}

/// Every number of classes that a tile can have, with more rows than a block has, and with the gradient aligned as the
/// logits and not.
#[test]
fn tiles_match_the_cpu() -> Result<()> {
    for (i, classes) in (1..=65).enumerate() {
        // as many lanes as can work on a row, and as few
        THRESHOLDS.set(Thresholds { row_threads: (i as u32 / 4) % 2 * 1024, ..Thresholds::default() });
        for dtype in [FLOATS[i % 4], FLOATS[(i + 1) % 4]] {
            let rows = 300 / (classes / 8 + 1);
            let logits = random(&[rows + 1, classes], 1, dtype)?;
            // from the second row on: unaligned as a whole
            compare("tiles", &plain(), &logits, &indices(rows, classes, 2)?, |x| x.narrow(0, 1, rows))?;
        }
        let dtype = FLOATS[i % 4];
        let some = random(&[9, classes], 1, dtype)?;
        compare("tiles", &uniform(), &some, &indices(9, classes, 2)?, |x| Ok(x.clone()))?;
        compare("tiles", &capped(2.5), &some, &indices(9, classes, 2)?, |x| Ok(x.clone()))?;
        compare("tiles", &everything(classes)?, &some, &indices(9, classes, 2)?, |x| Ok(x.clone()))?;
    }
    // rows that begin at each place of a word, more of them than a warp has
    for classes in [5, 8, 9, 31, 33, 64] {
        for (i, dtype) in FLOATS.into_iter().enumerate() {
            THRESHOLDS.set(Thresholds { row_threads: i as u32 % 2 * 1024, ..Thresholds::default() });
            for offset in 0..16 / dtype.size_in_bytes() {
                let wide = random(&[offset + 70 * classes], 1, dtype)?;
                let view = |x: &Tensor| x.narrow(0, offset, 70 * classes)?.reshape((70, classes));
                compare("tiles from anywhere", &uniform(), &wide, &indices(70, classes, 2)?, view)?;
                let log_probs = |device: &Device| {
                    crate::softmax::op::log_softmax("log_softmax", true, &view(&wide.to_device(device)?)?, 1)
                };
                let (got, expected) = (log_probs(&Device::new_cuda(0)?)?, log_probs(&Device::Cpu)?);
                assert_close(&format!("log_softmax, {classes} from {offset} on"), &got, &expected, tolerance(dtype));
            }
        }
    }
    Ok(())
}

/// Rows in registers at the edges of what 8, 16 and 32 lanes with 4, 8 and 16 windows keep; several rows for each of
/// the lanes.
#[test]
fn rows_in_registers_match_the_cpu() -> Result<()> {
    let few = Thresholds { blocks: 1, ..Thresholds::default() };
    for thresholds in [few, Thresholds::default()] {
        THRESHOLDS.set(thresholds);
        for (dtype, per_window) in [(DType::BF16, 8), (DType::F16, 8), (DType::F32, 4)] {
            for windows in [0, 9, 32, 33, 64, 65, 128, 129, 256, 257, 512] {
                for extra in [0, 1, per_window - 1] {
                    let classes = windows * per_window + extra;
                    if classes <= 64 || classes * dtype.size_in_bytes() > 8 << 10 {
                        continue;
                    }
                    let rows = if windows < 64 { 70 } else { 19 };
                    let rows = if thresholds.blocks == 1 { rows } else { 3 };
                    let logits = random(&[rows, classes + 3], 1, dtype)?;
                    let target = indices(rows, classes, 2)?;
                    for options in [plain(), uniform(), capped(2.5)] {
                        compare("registers", &options, &logits, &target, |x| x.narrow(1, extra % 4, classes))?;
                    }
                }
            }
        }
        // rows of two axes, at one distance from the next and not
        let swapped = random(&[3, 5, 70], 1, DType::BF16)?;
        let target = indices(15, 70, 2)?.reshape((3, 5))?;
        compare("registers, transposed", &plain(), &swapped, &target, |x| x.transpose(1, 2))?;
        let padded = random(&[3, 7, 70], 1, DType::BF16)?;
        compare("registers, uneven", &plain(), &padded, &target, |x| x.narrow(1, 1, 5)?.transpose(1, 2))?;
    }
    Ok(())
}

/// Sizes next to a warp, to a window and to a regime's edge, and vocabularies.
#[test]
fn sizes_match_the_cpu() -> Result<()> {
    THRESHOLDS.set(Thresholds::default());
    for classes in [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1000, 1001, 4095, 5003] {
        let logits = random(&[3, classes], 1, DType::BF16)?;
        compare("sizes", &plain(), &logits, &indices(3, classes, 2)?, |x| Ok(x.clone()))?;
    }
    THRESHOLDS.set(Thresholds::default());
    for classes in [1, 3, 9, 33, 64, 65, 1001, 4095, 5003] {
        let logits = random(&[7, classes], 1, DType::F32)?;
        for options in [plain(), uniform(), capped(2.5)] {
            compare("sizes", &options, &logits, &indices(7, classes, 2)?, |x| Ok(x.clone()))?;
        }
    }
    // in clusters, and split over blocks
    for split_bytes in [1 << 30, 16 << 10] {
        THRESHOLDS.set(Thresholds { split_bytes, ..Thresholds::default() });
        for classes in [32_000, 50_257] {
            let logits = random(&[2, classes], 1, DType::BF16)?;
            for options in [plain(), uniform(), capped(30.0)] {
                compare("sizes", &options, &logits, &indices(2, classes, 2)?, |x| Ok(x.clone()))?;
            }
        }
    }
    Ok(())
}

/// Rows of few classes, of which each thread prefetches its next ones: packed, with gaps between them, and apart.
#[test]
fn few_classes_match_the_cpu() -> Result<()> {
    // prefetched by their own block, and by an earlier one
    let usual = Thresholds { strided_depth: 1, ..Thresholds::default() };
    let ways = [Thresholds { blocks: 1, ..usual }, Thresholds { wave: Some(1), ..usual }];
    for (i, classes) in [1, 2, 10, 17, 3, 5, 9, 21].into_iter().enumerate() {
        THRESHOLDS.set(ways[i / 2 % 2]);
        let rows = 700;
        let target = indices(rows, classes, 2)?;
        for dtype in [FLOATS[i % 4], FLOATS[(i + 2) % 4]] {
            let packed = random(&[rows, classes], 1, dtype)?;
            let wide = random(&[rows, classes + 1], 1, dtype)?;
            let columns = random(&[classes, rows], 1, dtype)?;
            for options in [plain(), uniform(), everything(classes)?] {
                compare("few classes", &options, &packed, &target, |x| Ok(x.clone()))?;
                compare("few classes, with gaps", &options, &wide, &target, |x| x.narrow(1, 1, classes))?;
                compare("few classes, apart", &options, &columns, &target, |x| x.t())?;
            }
            // of log-softmax, and of probability targets
            let gradients = |device: &Device| -> Result<Vec<Tensor>> {
                let mut results = vec![];
                let soft = Var::from_tensor(&packed.abs()?.to_device(device)?)?;
                for x in [wide.to_device(device)?.narrow(1, 1, classes)?, columns.to_device(device)?.t()?] {
                    let leaf = Var::from_tensor(&x)?;
                    let y = crate::softmax::op::log_softmax("log_softmax", true, &x, 1)?;
                    let of_view = crate::softmax::op::log_softmax("log_softmax", true, leaf.as_tensor(), 1)?;
                    let grads = of_view.sqr()?.sum_all()?.backward()?;
                    results.extend([y, grads.get(&leaf).unwrap().clone()]);
                    let grads = plain().forward(&x, soft.as_tensor())?.backward()?;
                    results.push(grads.get(&soft).unwrap().clone());
                }
                Ok(results)
            };
            for (got, expected) in gradients(&Device::new_cuda(0)?)?.iter().zip(&gradients(&Device::Cpu)?) {
                assert_close(&format!("{classes} classes, {dtype:?}"), got, expected, 2.0 * tolerance(dtype));
            }
        }
    }
    Ok(())
}

/// A row longer than the shared memory for it is read a second time.
#[test]
fn rows_that_are_not_kept_match_the_cpu() -> Result<()> {
    for cluster_bytes in [0, 1 << 30] {
        THRESHOLDS.set(Thresholds {
            split_bytes: 1 << 30,
            shared_bytes: Some(256 * 16 * 4),
            cluster_bytes,
            ..Thresholds::default()
        });
        let classes = 70_003;
        let logits = random(&[1, classes], 1, DType::BF16)?;
        for options in [plain(), uniform(), capped(30.0)] {
            compare("not kept", &options, &logits, &indices(1, classes, 2)?, |x| Ok(x.clone()))?;
        }
        compare_log_softmax("not kept", DType::BF16, &[1, classes], 1, 0)?;
    }
    Ok(())
}

/// Compares log-softmax and its gradient on both devices, for logits and an upstream gradient that begin `offset` and
/// `offset + 1` elements behind where a tensor would on the last axis.
fn compare_log_softmax(what: &str, dtype: DType, dims: &[usize], axis: usize, offset: usize) -> Result<()> {
    let wide = |by: usize| -> Vec<usize> {
        let (last, others) = dims.split_last().unwrap();
        others.iter().copied().chain([last + by]).collect()
    };
    let last = dims.len() - 1;
    let on = |device: &Device| -> Result<(Tensor, Tensor)> {
        let x = Var::from_tensor(&random(&wide(offset), 1, dtype)?.to_device(device)?)?;
        let view = x.narrow(last, offset, dims[last])?;
        let y = crate::softmax::op::log_softmax("log_softmax", true, &view, axis)?;
        let upstream = random(&wide(offset + 1), 9, dtype)?.to_device(device)?;
        let upstream = Var::from_tensor(&upstream)?;
        let grads = (&y * upstream.narrow(last, offset + 1, dims[last])?)?.sum_all()?.backward()?;
        Ok((y, grads.get(&x).unwrap().clone()))
    };
    let (got, expected) = (on(&Device::new_cuda(0)?)?, on(&Device::Cpu)?);
    let what = format!("{what}: log_softmax {dtype:?} {dims:?} + {offset}");
    assert_close(&what, &got.0, &expected.0, tolerance(dtype));
    // computed from the rounded log-probabilities
    assert_close(&format!("{what}, its gradient"), &got.1, &expected.1, 2.0 * tolerance(dtype));
    Ok(())
}

#[test]
fn log_softmax_matches_the_cpu() -> Result<()> {
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            for (dims, axis) in [(vec![4, 77], 1), (vec![3, 13, 6], 1), (vec![3, 4, 19], 2), (vec![33], 0)] {
                compare_log_softmax(regime, dtype, &dims, axis, 0)?;
            }
        }
    }
    for (regime, thresholds) in strided_regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            // pairs of rows, and not
            for (pixels, offset) in [(6, 0), (6, 1), (5, 0), (5, 2)] {
                compare_log_softmax(regime, dtype, &[2, 25, pixels], 1, offset)?;
            }
        }
    }
    for (regime, thresholds) in regimes_of_apart_rows() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            for offset in 1..=16 / dtype.size_in_bytes() {
                compare_log_softmax(regime, dtype, &[3, 85], 1, offset)?;
            }
        }
    }
    Ok(())
}

/// log-softmax's backward reads an upstream gradient wherever it lies: 1 to 8 elements behind a word of 16 bytes, and
/// with classes apart.
#[test]
fn log_softmax_backward_reads_any_upstream_gradient() -> Result<()> {
    use crate::rows::layout::rows_of;
    use crate::softmax::problem::SoftmaxKernels;
    fn backward<S: SoftmaxKernels>(x: &Tensor, g: &Tensor) -> Result<Vec<f32>> {
        let rows = |t: &Tensor| rows_of("log_softmax", t.layout(), 1);
        let (x_rows, g_rows) = (rows(x)?, rows(g)?);
        let (x_storage, g_storage) = (x.storage_and_layout().0, g.storage_and_layout().0);
        let (x_storage, g_storage) = (S::of(&x_storage).unwrap(), S::of(&g_storage).unwrap());
        let statistics = S::log_softmax("log_softmax", x_storage, &x_rows, true)?.1.unwrap();
        let statistics = statistics.into_tensor((2, x_rows.count()));
        let grad = S::log_softmax_backward("log_softmax", (x_storage, &x_rows), &statistics, (g_storage, &g_rows))?;
        assert_eq!(grad.dtype(), x.dtype());
        grad.into_tensor(x.shape()).flatten_all()?.to_dtype(DType::F32)?.to_vec1()
    }
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes_of_apart_rows() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            let x = random(&[3, 85], 1, dtype)?;
            let wide = random(&[3, 96], 9, dtype)?;
            let mut upstreams: Vec<_> =
                (0..=16 / dtype.size_in_bytes()).map(|o| wide.narrow(1, o, 85)).collect::<Result<_>>()?;
            upstreams.push(random(&[85, 3], 9, dtype)?.t()?);
            for (i, g) in upstreams.iter().enumerate() {
                // a view of the same storage on the device
                let on_gpu = match i {
                    _ if i + 1 == upstreams.len() => random(&[85, 3], 9, dtype)?.to_device(&gpu)?.t()?,
                    _ => wide.to_device(&gpu)?.narrow(1, i, 85)?,
                };
                let expected = backward::<candle_core::CpuStorage>(&x, g)?;
                let got = backward::<candle_core::CudaStorage>(&x.to_device(&gpu)?, &on_gpu)?;
                let tensor = |values: Vec<f32>| Tensor::new(values, &Device::Cpu);
                assert_close(
                    &format!("{regime}: {dtype:?}, upstream gradient {i}"),
                    &tensor(got)?,
                    &tensor(expected)?,
                    2.0 * tolerance(dtype).max(tolerance(DType::F32)),
                );
            }
        }
    }
    Ok(())
}

#[test]
fn target_gradient_matches_the_cpu() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for (dtype, of_target, dims, offset) in [
            // written in the logits' dtype, or in the arithmetic one and converted
            (DType::BF16, DType::BF16, vec![3, 29], 0),
            (DType::BF16, DType::F32, vec![2, 29, 4], 0),
            (DType::F16, DType::F16, vec![2, 29, 4], 0),
            (DType::F16, DType::BF16, vec![3, 29], 5),
            (DType::BF16, DType::BF16, vec![3, 29], 5),
            (DType::F32, DType::F32, vec![3, 29], 1),
            (DType::F64, DType::F64, vec![3, 29], 1),
        ] {
            for options in [plain(), everything(29)?] {
                let on = |device: &Device| -> Result<Tensor> {
                    let options = with_weight_on(&options, device, dtype)?;
                    let mut wide = dims.clone();
                    wide[1] += offset;
                    let x = random(&wide, 1, dtype)?.to_device(device)?.narrow(1, offset, 29)?;
                    let target = Var::from_tensor(&random(&dims, 2, of_target)?.abs()?.to_device(device)?)?;
                    let grads = options.forward(&x, target.as_tensor())?.backward()?;
                    Ok(grads.get(&target).unwrap().clone())
                };
                let what = format!("{regime}: {dtype:?} {dims:?} + {offset}, targets {of_target:?}");
                assert_close(&what, &on(&gpu)?, &on(&Device::Cpu)?, tolerance(of_target).max(tolerance(DType::F32)));
            }
        }
    }
    Ok(())
}

/// The same call gives the same bits.
#[test]
fn results_are_reproducible() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        let logits = random(&[20, 200], 1, DType::F32)?.to_device(&gpu)?;
        let target = indices(20, 200, 2)?.to_device(&gpu)?;
        let one = || -> Result<_> {
            let (loss, grad) = plain().loss_and_grad(&logits, &target)?;
            Ok((loss.to_scalar::<f32>()?.to_bits(), grad.flatten_all()?.to_vec1::<f32>()?))
        };
        assert!(one()? == one()?, "{regime}");
    }
    Ok(())
}

/// Rows with gaps between them, in every regime that takes them: the gradient is where the logits were, and the gaps
/// keep what they hold.
#[test]
fn rows_with_gaps_are_replaced_where_they_are() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let (rows, classes, stride) = (5, 333, 352);
    for (regime, thresholds) in regimes() {
        THRESHOLDS.set(thresholds);
        for dtype in FLOATS {
            for options in [plain(), uniform(), everything(classes)?] {
                let what = format!("{regime}, {dtype:?}");
                let options = with_weight_on(&options, &gpu, dtype)?;
                let memory = random(&[rows, stride], 1, dtype)?.to_device(&gpu)?;
                let before = memory.copy()?;
                let (logits, target) = (memory.narrow(1, 8, classes)?, indices(rows, classes, 2)?.to_device(&gpu)?);
                let (loss, grad) = options.clone().loss_and_grad(&logits.force_contiguous()?, &target)?;
                let in_place = options.loss_and_grad_inplace(&logits, &target)?;
                // the rows begin elsewhere in their windows than those of the copy, so that sums differ in their order
                let arithmetic = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                assert_close(&format!("{what}: loss"), &in_place, &loss, tolerance(arithmetic));
                assert_close(&format!("{what}: gradient"), &logits, &grad, tolerance(dtype));
                for (start, len) in [(0, 8), (8 + classes, stride - classes - 8)] {
                    assert_close(
                        &format!("{what}: gap"),
                        &memory.narrow(1, start, len)?,
                        &before.narrow(1, start, len)?,
                        0.0,
                    );
                }
            }
        }
    }
    Ok(())
}

/// Launches whose instructions are to be counted on the software GPU, by `SOFTGPU_STATS=2`: a line for each of them, in
/// the order in which this prints what they are and the elements to divide by.
#[test]
#[ignore = "counts nothing by itself"]
fn launches_to_count() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    // as for many rows
    THRESHOLDS.set(Thresholds { row_threads: 0, strided_depth: 1, wave: Some(4), ..Thresholds::default() });
    let say = |what: String, call: &dyn Fn() -> Result<()>| -> Result<()> {
        println!("{} launches: {what}", work_of(call)?.launches);
        Ok(())
    };
    let sizes: [&[usize]; 6] = [&[8192, 10], &[2048, 64], &[512, 1000], &[16, 32000], &[16, 32001], &[1, 21, 128, 256]];
    for (dims, dtype) in
        sizes.into_iter().flat_map(|dims| [DType::BF16, DType::F32, DType::F64].map(|dtype| (dims, dtype)))
    {
        // rows of an odd number of classes are the last ones of longer rows: their gradients begin elsewhere in a word
        let behind = dims[1] % 2 * (dims.len() == 2) as usize;
        let wide: Vec<usize> = dims.iter().enumerate().map(|(i, n)| n + behind * (i == 1) as usize).collect();
        let x = random(&wide, 1, dtype)?.to_device(&gpu)?.narrow(1, behind, dims[1])?;
        let len: usize = dims.iter().product();
        let rows: Vec<usize> = dims.iter().enumerate().filter_map(|(i, &n)| (i != 1).then_some(n)).collect();
        let index = indices(len / dims[1], dims[1], 2)?.reshape(rows)?.to_device(&gpu)?;
        let soft = random(dims, 3, dtype)?.abs()?.to_device(&gpu)?;
        let smoothed = || with(plain(), |o| (o.label_smoothing, o.z_loss) = (0.1, 1e-4));
        let arithmetic = if dtype == DType::F64 { dtype } else { DType::F32 };
        let of_class = random(&[dims[1]], 4, arithmetic)?.abs()?.to_device(&gpu)?;
        for (options, problem, target) in [
            ("class indices", plain(), &index),
            ("smoothing, z-loss", smoothed(), &index),
            ("soft cap", with(plain(), |o| o.softcap = Some(30.0)), &index),
            ("probabilities", plain(), &soft),
            ("class weights, smoothing", with(smoothed(), |o| o.rows.weight = Some(of_class)), &index),
        ] {
            let problem = with(problem, |o| o.rows.reduction = Reduction::Sum);
            let what = |pass: &str| format!("{pass}, {options}, {dims:?} {dtype:?}, {len} elements");
            say(what("forward"), &|| problem.clone().forward(&x, target).map(drop))?;
            say(what("loss_and_grad"), &|| problem.clone().loss_and_grad(&x, target).map(drop))?;
            let (of_x, of_t) = (Var::from_tensor(&x)?, Var::from_tensor(&soft)?);
            let loss = problem.clone().forward(&of_x, target)?;
            say(what("backward"), &|| loss.backward().map(drop))?;
            say(what("statistics"), &|| problem.clone().forward_with_statistics(&x, target).map(drop))?;
            if options == "probabilities" {
                let loss = problem.clone().forward(&x, of_t.as_tensor())?;
                say(what("backward of the target"), &|| loss.backward().map(drop))?;
            }
        }
        let leaf = Var::from_tensor(&x)?;
        let log_softmax = |x: &Tensor| crate::softmax::op::log_softmax("log_softmax", true, x, 1);
        let what = |pass: &str| format!("{pass}, log-softmax, {dims:?} {dtype:?}, {len} elements");
        say(what("forward"), &|| log_softmax(&x).map(drop))?;
        let loss = (log_softmax(&leaf)? * &soft)?.sum_all()?;
        say(what("backward"), &|| loss.backward().map(drop))?;
    }
    Ok(())
}

/// Row weights with all that shares their kernels, by themselves and with row transforms, which take turns. The rows of
/// weight 0 hold NaN and have a target out of range.
#[test]
fn row_weights_and_transforms_match_the_cpu() -> Result<()> {
    let transforms = [
        RowTransform::Focal { gamma: 2.0 },
        RowTransform::Focal { gamma: 0.5 },
        RowTransform::Poly1 { epsilon: 1.5 },
        RowTransform::Dft,
        RowTransform::GeneralizedCe { q: 0.7 },
    ];
    let (classes, same) = (167, |x: &Tensor| Ok(x.clone()));
    let adjacent = regimes().into_iter().map(|regime| (regime, false));
    let apart = strided_regimes().into_iter().map(|regime| (regime, true));
    for (turn, ((regime, thresholds), apart)) in adjacent.chain(apart).enumerate() {
        THRESHOLDS.set(thresholds);
        let dtypes = [DType::F32, DType::U8, DType::F16, DType::BF16];
        for (i, (dtype, of_weights)) in FLOATS.into_iter().zip(dtypes).enumerate() {
            let mut values = numbers(6 * classes, 1);
            values[classes..3 * classes].fill(f32::NAN);
            let mut logits = Tensor::new(values, &Device::Cpu)?.reshape((6, classes))?.to_dtype(dtype)?;
            let mut target = Tensor::new(&[3i64, 4000, -7, -100, 166, 0], &Device::Cpu)?;
            let mut weights = Tensor::new(&[2f32, 0., 0., 3., 0.5, 1.], &Device::Cpu)?.to_dtype(of_weights)?;
            if apart {
                logits = logits.reshape((2, 3, classes))?.transpose(1, 2)?.contiguous()?;
                (target, weights) = (target.reshape((2, 3))?, weights.reshape((2, 3))?);
            }
            let weighing = |problem: CrossEntropy| with(problem, |o| o.rows.row_weight = Some(weights.clone()));
            let what = format!("{regime}, weights of {of_weights:?}");
            for problem in [plain(), uniform(), capped(2.5), everything(classes)?] {
                compare(&what, &weighing(problem), &logits, &target, same)?;
            }
            let each = with(weighing(uniform()), |o| o.rows.reduction = Reduction::None);
            compare(&what, &each, &logits, &target, same)?;
            let tokens = Tensor::new(7f64, &Device::Cpu)?;
            compare(&what, &divided_by(weighing(plain()), tokens), &logits, &target, same)?;
            let soft = random(logits.dims(), 3, dtype)?.abs()?;
            compare(&what, &weighing(everything(classes)?), &logits, &soft, same)?;
            for (k, problem) in [plain(), uniform(), everything(classes)?].into_iter().enumerate() {
                let transform = transforms[(turn + 2 * i + k) % transforms.len()];
                let problem = weighing(with(problem, |o| o.row_transform = Some(transform)));
                compare(&format!("{what}, {transform:?}"), &problem, &logits, &target, same)?;
            }
        }
    }
    Ok(())
}

/// Weights of rows and a normalizer on the device cost no launch, no allocation and no wait.
#[test]
fn row_weights_cost_no_launch() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    THRESHOLDS.set(Thresholds::default());
    for (rows, classes) in [(5, 10), (40, 1000), (3000, 7), (2, 100_000)] {
        let logits = random(&[rows, classes], 1, DType::BF16)?.to_device(&gpu)?;
        let target = indices(rows, classes, 2)?.to_device(&gpu)?;
        let mask = Tensor::ones(rows, DType::U8, &gpu)?;
        let weighing = |problem: CrossEntropy| with(problem, |o| o.rows.row_weight = Some(mask.clone()));
        let sum = with(plain(), |o| o.rows.reduction = Reduction::Sum);
        let tokens = Tensor::full(7f64, (), &gpu)?;
        let pairs = [(plain(), weighing(plain())), (sum.clone(), divided_by(sum, tokens))];
        for (without, problem) in pairs {
            let both = |problem: &CrossEntropy| -> Result<_> {
                let forward = work_of(|| problem.clone().forward(&logits, &target))?;
                Ok((forward, work_of(|| problem.clone().loss_and_grad(&logits, &target))?))
            };
            assert_eq!(both(&problem)?, both(&without)?, "{rows} x {classes}");
        }
        // weights of 1 change no bit
        let grad = |problem: CrossEntropy| -> Result<_> {
            let (loss, grad) = problem.loss_and_grad(&logits, &target)?;
            Ok((loss.to_scalar::<f32>()?.to_bits(), grad.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?))
        };
        assert_eq!(grad(weighing(plain()))?, grad(plain())?, "{rows} x {classes}");
        assert_eq!(grad(weighing(uniform()))?, grad(uniform())?, "{rows} x {classes}");
    }
    Ok(())
}
