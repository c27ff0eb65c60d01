//! What the losses promise at their edges, each by name: the reference points, inputs on which other implementations
//! break, and the rules for ignored rows, infinities, bad targets and graphs.

use super::losses::{
    ABSOLUTE, BceLoss, BceWithLogitsLoss, CrossEntropyLoss, FUSED, MultiLabelSoftMarginLoss, NllLoss, Reduction,
    SigmoidFocalLoss, binary_cross_entropy, binary_cross_entropy_with_logit, binary_cross_entropy_with_logits,
    cross_entropy, log_softmax, multi_label_soft_margin, nll, sigmoid_focal,
};
use crate::common::{
    FLOATS, INDICES, REDUCTIONS, Random, arithmetic, bits, everywhere, indices, scalar, tensor, values,
};
use candle_core::{D, DType, Result, Tensor, Var};

/// Elementwise `|got - want| <= relative |want|`, and what composed losses may be off beside it; NaN and infinities
/// must be themselves.
#[track_caller]
fn assert_near(what: &str, got: &[f64], want: &[f64], relative: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        let tolerance = relative * want.abs() + ABSOLUTE * f64::from(f32::EPSILON);
        assert!(same || (got - want).abs() <= tolerance, "{what}[{i}]: got {got:e}, expected {want:e}");
    }
}

/// A few roundings of f32 arithmetic.
const F32: f64 = 4e-7;

/// Loss and gradient with the reduction none.
type Fused<'a> = &'a dyn Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>;

/// The losses and the gradient through the graph and in one pass, which must agree within rounding; of the graph.
fn loss_and_grad(
    x: &Tensor,
    t: &Tensor,
    forward: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    one_pass: Fused,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let x = Var::from_tensor(x)?;
    let loss = forward(&x, t)?;
    let grads = loss.backward()?;
    let (loss, grad) = (values(&loss)?, values(grads.get(&x).expect("a gradient"))?);
    let (one_loss, one_grad) = one_pass(&x.detach(), t)?;
    // one ulp of the gradient's dtype
    let ulp = match x.dtype() {
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        _ => F32,
    };
    assert_near("loss_and_grad's loss", &values(&one_loss)?, &loss, F32);
    assert_near("loss_and_grad's gradient", &values(&one_grad)?, &grad, ulp);
    Ok((loss, grad))
}

fn ce_rows(x: &Tensor, t: &Tensor) -> Result<(Vec<f64>, Vec<f64>)> {
    let loss = CrossEntropyLoss::new().with_reduction(Reduction::None);
    loss_and_grad(x, t, |x, t| loss.forward(x, t), &|x, t| loss.loss_and_grad(x, t))
}

fn logits_elements(x: &Tensor, t: &Tensor) -> Result<(Vec<f64>, Vec<f64>)> {
    let loss = BceWithLogitsLoss::new().with_reduction(Reduction::None);
    loss_and_grad(x, t, |x, t| loss.forward(x, t), &|x, t| loss.loss_and_grad(x, t))
}

// ---- the reference points

#[test]
fn point_bce() -> Result<()> {
    everywhere(|device| {
        for dtype in [DType::F32, DType::F64] {
            let probs = candle_nn::ops::sigmoid(&tensor(&[0.7, 0.2, 0.9], &[3], dtype, device)?)?;
            let loss = binary_cross_entropy(&probs, &tensor(&[1.0, 0.0, 1.0], &[3], dtype, device)?)?;
            assert_near("loss", &values(&loss)?, &[0.514159619808197], F32);
        }
        Ok(())
    })
}

#[test]
fn point_bce_with_logits() -> Result<()> {
    everywhere(|device| {
        let logits = tensor(&[0.5, -1.0, 2.0], &[3], DType::F32, device)?;
        let target = tensor(&[1.0, 0.0, 1.0], &[3], DType::F32, device)?;
        // (log1p(e^-0.5) + log1p(e^-1) + log1p(e^-2)) / 3, 0.3048 in the notebook's four digits
        let want = [(-0.5f64).exp().ln_1p(), (-1f64).exp().ln_1p(), (-2f64).exp().ln_1p()].iter().sum::<f64>() / 3.0;
        assert!((want - 0.3048).abs() < 5e-5);
        assert_near("loss", &values(&binary_cross_entropy_with_logits(&logits, &target)?)?, &[want], F32);
        assert_near("candle's name", &values(&binary_cross_entropy_with_logit(&logits, &target)?)?, &[want], F32);
        Ok(())
    })
}

#[test]
fn point_cross_entropy() -> Result<()> {
    everywhere(|device| {
        let logits = tensor(&[1.0, 2.0, 3.0, 1.0, 2.0, 0.0, 0.0, 2.0, 1.0], &[3, 3], DType::F32, device)?;
        let loss = cross_entropy(&logits, &indices(&[2, 0, 1], &[3], DType::U32, device)?)?;
        // each row is {0, 1, 2} in some order: log(e^0 + e^1 + e^2) less the target's 2, 1 and 2
        let lse = (1.0 + 1f64.exp() + 2f64.exp()).ln();
        assert!((lse - 5.0 / 3.0 - 0.74).abs() < 5e-3);
        assert_near("loss", &values(&loss)?, &[lse - 5.0 / 3.0], F32);
        Ok(())
    })
}

#[test]
fn point_nll() -> Result<()> {
    everywhere(|device| {
        let logits = [0.1, 0.2, 0.7, 0.8, 0.1, 0.1, 0.3, 0.5, 0.2];
        let target = indices(&[2, 0, 1], &[3], DType::U32, device)?;
        let log_probs = log_softmax(&tensor(&logits, &[3, 3], DType::F32, device)?, 1)?;
        let lse = |row: &[f64]| row.iter().map(|v| v.exp()).sum::<f64>().ln();
        let want = (lse(&logits[..3]) + lse(&logits[3..6]) + lse(&logits[6..]) - 0.7 - 0.8 - 0.5) / 3.0;
        assert!((want - 0.80).abs() < 5e-3);
        assert_near("loss", &values(&nll(&log_probs, &target)?)?, &[want], F32);
        Ok(())
    })
}

#[test]
fn point_multi_label_soft_margin() -> Result<()> {
    everywhere(|device| {
        let logits = tensor(&[0.5, -1.0, 3.0, 1.5, -2.0, 0.0], &[2, 3], DType::F64, device)?;
        let target = tensor(&[1.0, 0.0, 1.0, 0.0, 1.0, 0.0], &[2, 3], DType::F64, device)?;
        let loss = MultiLabelSoftMarginLoss::new().with_weight(tensor(&[0.5, 2.0, 1.5], &[3], DType::F64, device)?);
        // the notebook's number is an f32
        assert_near("loss", &values(&loss.forward(&logits, &target)?)?, &[1.1801210641860962], F32);
        let unweighted = multi_label_soft_margin(&logits, &target)?;
        let bce = binary_cross_entropy_with_logits(&logits, &target)?;
        assert_near("without weights it is BCE", &values(&unweighted)?, &values(&bce)?, 1e-15);
        Ok(())
    })
}

/// What candle-nn's losses compute where they are right: the switch is one `use` line.
#[test]
fn candles_losses_have_the_same_values() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(50);
        let x = tensor(&random.normals(60, 1.0), &[12, 5], DType::F32, device)?;
        let t = indices(&random.classes(12, 5), &[12], DType::U32, device)?;
        let labels = random.labels(60).iter().map(|t| t.round()).collect::<Vec<_>>();
        let labels = tensor(&labels, &[12, 5], DType::F32, device)?;
        let y = log_softmax(&x, 1)?;
        let close = |what: &str, ours: Tensor, candles: Tensor| -> Result<()> {
            assert_eq!((ours.dims(), ours.dtype()), (candles.dims(), candles.dtype()), "{what}");
            // candle rounds after each op
            assert_near(what, &values(&ours)?, &values(&candles)?, 4.0 * F32);
            Ok(())
        };
        close("cross_entropy", cross_entropy(&x, &t)?, candle_nn::loss::cross_entropy(&x, &t)?)?;
        close("nll", nll(&y, &t)?, candle_nn::loss::nll(&y, &t)?)?;
        let candles = candle_nn::loss::binary_cross_entropy_with_logit(&x, &labels)?;
        close("binary_cross_entropy_with_logit", binary_cross_entropy_with_logit(&x, &labels)?, candles)?;
        close("mse", candle_fused_loss::mse(&x, &labels)?, candle_nn::loss::mse(&x, &labels)?)?;
        close("huber", candle_fused_loss::huber(&x, &labels, 1.0)?, candle_nn::loss::huber(&x, &labels, 1.0)?)
    })
}

// ---- rows that break someone today

#[test]
fn bce_with_logits_is_finite_at_large_logits() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = [8.0, 17.0, -89.0, 1e4, -1e4];
            for t in [0.0, 1.0] {
                let logits = tensor(&x, &[5], dtype, device)?;
                let x = values(&logits)?;
                let (loss, grad) = logits_elements(&logits, &tensor(&[t; 5], &[5], dtype, device)?)?;
                let softplus = |v: f64| v.max(0.0) + (-v.abs()).exp().ln_1p();
                let want: Vec<_> = x.iter().map(|&x| softplus(if t == 0.0 { x } else { -x })).collect();
                let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
                let slope: Vec<_> = x.iter().map(|&x| if t == 0.0 { sigmoid(x) } else { -sigmoid(-x) }).collect();
                for i in 0..5 {
                    assert!((loss[i] - want[i]).abs() <= F32 * want[i] + 1e-37, "{dtype:?} {}: {}", x[i], loss[i]);
                    let rounding = crate::common::half_ulp(dtype, slope[i]) + F32 * slope[i].abs() + 1e-37;
                    assert!((grad[i] - slope[i]).abs() <= rounding, "{dtype:?} gradient at {}: {}", x[i], grad[i]);
                }
            }
        }
        Ok(())
    })
}

#[test]
fn bce_with_logits_at_infinities_and_nan() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[INF, -INF, INF, -INF, f64::NAN], &[5], dtype, device)?;
            let t = tensor(&[1.0, 0.0, 0.0, 1.0, 1.0], &[5], dtype, device)?;
            let (loss, grad) = logits_elements(&x, &t)?;
            assert_near("loss", &loss, &[0.0, 0.0, INF, INF, f64::NAN], 0.0);
            assert_near("gradient", &grad, &[0.0, 0.0, 1.0, -1.0, f64::NAN], 0.0);
        }
        Ok(())
    })
}

#[test]
fn bce_with_logits_keeps_small_losses() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[-20.0, 20.0], &[2], DType::F32, device)?;
        let (loss, grad) = logits_elements(&x, &tensor(&[0.0, 1.0], &[2], DType::F32, device)?)?;
        assert_near("loss", &loss, &[2.06115362e-9; 2], F32);
        assert_near("gradient", &grad, &[2.0611536181902037e-9, -2.0611536181902037e-9], F32);
        Ok(())
    })
}

/// candle computes 0.135 for this. 16384 rows of standard normal logits.
#[test]
fn cross_entropy_of_many_bf16_rows() -> Result<()> {
    everywhere(|device| {
        // a device in software takes too long for all of it
        let n = if device.is_cuda() { 512 } else { 16384 };
        let mut random = Random::new(51);
        let logits = tensor(&random.normals(n * 64, 1.0), &[n, 64], DType::BF16, device)?;
        let target = random.classes(n, 64);
        let x = values(&logits)?;
        let row = |(row, &t): (usize, &i64)| {
            let x = &x[row * 64..][..64];
            x.iter().map(|x| x.exp()).sum::<f64>().ln() - x[t as usize]
        };
        let want = target.iter().enumerate().map(row).sum::<f64>() / n as f64;
        assert!((want - 4.65).abs() < 0.1, "{want}");
        let target = indices(&target, &[n], DType::U32, device)?;
        assert_near("loss", &values(&cross_entropy(&logits, &target)?)?, &[want], F32);
        Ok(())
    })
}

#[test]
fn cross_entropy_with_a_common_offset() -> Result<()> {
    everywhere(|device| {
        for offset in [1e8, -1e8, 3e38] {
            let x = tensor(&[offset; 2], &[1, 2], DType::F32, device)?;
            let (loss, grad) = ce_rows(&x, &indices(&[1], &[1], DType::U32, device)?)?;
            assert_near("loss", &loss, &[2f64.ln()], F32);
            assert_near("gradient", &grad, &[0.5, -0.5], 0.0);
        }
        Ok(())
    })
}

/// PyTorch and candle give 0 for this loss.
#[test]
fn cross_entropy_of_a_confident_row() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[20.0, 0.0, 0.0], &[1, 3], dtype, device)?;
            let rest = 2.0 * (-20f64).exp();
            let p = (-20f64).exp() / (1.0 + rest);
            assert_near("the definition", &[rest.ln_1p()], &[4.122307e-9], 1e-6);
            let (one_hot, zero) =
                (tensor(&[1.0, 0.0, 0.0], &[1, 3], dtype, device)?, indices(&[0], &[1], DType::I64, device)?);
            for target in [zero, one_hot] {
                let (loss, grad) = ce_rows(&x, &target)?;
                assert_near("loss", &loss, &[rest.ln_1p()], F32);
                if dtype == DType::F16 {
                    // 4e-9 is below half of f16's smallest number
                    assert_eq!(grad, [0.0; 3]);
                    continue;
                }
                let ulp = if dtype == DType::BF16 { 4e-3 } else { F32 };
                assert_near("gradient", &grad, &[-rest / (1.0 + rest), p, p], ulp);
            }
        }
        Ok(())
    })
}

#[test]
fn cross_entropy_of_100_000_classes_all_but_one_at_minus_infinity() -> Result<()> {
    everywhere(|device| {
        // a device in software takes too long for all of it
        let classes = if device.is_cuda() { 5000 } else { 100_000 };
        for at in [0, classes / 2, classes - 1] {
            for n in [1, 20] {
                let n = if device.is_cuda() { 1 } else { n };
                let mut x = vec![f64::NEG_INFINITY; classes];
                x[at] = 1.5;
                let x = tensor(&x.repeat(n), &[n, classes], DType::F32, device)?;
                let (loss, grad) = ce_rows(&x, &indices(&vec![at as i64; n], &[n], DType::U32, device)?)?;
                assert_eq!(loss, vec![0.0; n]);
                assert!(grad.iter().all(|&g| g == 0.0), "class {at}");
                let other = if at == 0 { 1 } else { 0 };
                let (loss, grad) = ce_rows(&x, &indices(&vec![other; n], &[n], DType::U32, device)?)?;
                assert_eq!(loss, vec![f64::INFINITY; n]);
                assert_eq!((grad[other as usize], grad[at], grad.iter().sum::<f64>()), (-1.0, 1.0, 0.0));
            }
        }
        Ok(())
    })
}

#[test]
fn classes_at_minus_infinity_have_no_probability() -> Result<()> {
    const OUT: f64 = f64::NEG_INFINITY;
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[OUT, 1.0, OUT, 1.0, OUT], &[1, 5], dtype, device)?;
            let (loss, grad) = ce_rows(&x, &indices(&[1], &[1], DType::U8, device)?)?;
            assert_near("loss", &loss, &[2f64.ln()], F32);
            assert_eq!(grad, [0.0, -0.5, 0.0, 0.5, 0.0]);
            // 0 log 0 = 0 with probability targets
            let t = tensor(&[0.0, 0.5, 0.0, 0.5, 0.0], &[1, 5], dtype, device)?;
            let (loss, grad) = ce_rows(&x, &t)?;
            assert_near("loss", &loss, &[2f64.ln()], F32);
            assert_eq!(grad, [0.0; 5]);
            let y = values(&log_softmax(&x, 1)?)?;
            assert_eq!((y[0], y[2], y[4]), (OUT, OUT, OUT));
        }
        Ok(())
    })
}

#[test]
fn bad_rows_are_nan_in_themselves_alone() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    everywhere(|device| {
        let mut random = Random::new(52);
        for (classes, dtype) in [5, 100].into_iter().flat_map(|c| FLOATS.map(|d| (c, d))) {
            let mut x = random.normals(20 * classes, 1.0);
            x[classes..2 * classes].fill(-INF);
            x[3 * classes] = INF;
            x[6 * classes - 1] = f64::NAN;
            x[7 * classes..8 * classes].fill(INF);
            let bad = |row: usize| [1, 3, 5, 7].contains(&row);
            let x = tensor(&x, &[20, classes], dtype, device)?;
            let soft = tensor(&random.labels(20 * classes), &[20, classes], dtype, device)?;
            // among them targets at the bad logit
            let hard = indices(&[0; 20], &[20], DType::U32, device)?;
            for target in [hard, soft] {
                let (loss, grad) = ce_rows(&x, &target)?;
                for row in 0..20 {
                    assert_eq!(loss[row].is_nan(), bad(row), "loss of row {row} of {classes} {dtype:?}");
                    let grad = &grad[row * classes..][..classes];
                    assert!(grad.iter().all(|g| g.is_nan() == bad(row)), "gradient of row {row}: {grad:?}");
                }
            }
            let y = values(&log_softmax(&x, 1)?)?;
            assert!((0..20).all(|row| y[row * classes..][..classes].iter().all(|y| y.is_nan() == bad(row))));
        }
        Ok(())
    })
}

#[test]
fn ignored_rows_full_of_nan_are_zeros() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            for classes in [3, 64, 65, 300] {
                let mut x = vec![0.0; 3 * classes];
                x[classes..2 * classes].fill(f64::NAN);
                x[2 * classes..].fill(f64::INFINITY);
                let x = Var::from_tensor(&tensor(&x, &[3, classes], dtype, device)?)?;
                let t = indices(&[1, -100, -100], &[3], DType::I64, device)?;
                for reduction in REDUCTIONS {
                    let weight = tensor(&vec![2.0; classes], &[classes], DType::F32, device)?;
                    let plain = CrossEntropyLoss::new().with_reduction(reduction);
                    let full = plain.clone().with_weight(weight).with_label_smoothing(0.1).with_z_loss(0.1);
                    for loss in [plain, full] {
                        let value = loss.forward(&x, &t)?;
                        let grads = value.backward()?;
                        let (value, grad) = (values(&value)?, values(grads.get(&x).expect("a gradient"))?);
                        assert!(value.iter().all(|v| v.is_finite()), "{value:?}");
                        assert!(grad[classes..].iter().all(|&g| g == 0.0), "{dtype:?} {classes} {reduction:?}");
                        assert!(grad[..classes].iter().any(|&g| g != 0.0));
                        let one = loss.loss_and_grad(&x.detach(), &t)?;
                        assert!(values(&one.1)?[classes..].iter().all(|&g| g == 0.0));
                    }
                }
                let rows = CrossEntropyLoss::new().statistics(&x.detach(), &t)?;
                for ignored in [rows.loss, rows.lse, rows.z_loss, rows.entropy, rows.correct] {
                    assert_eq!(values(&ignored)?[1..], [0.0, 0.0]);
                }
                let log_probs = NllLoss::new().with_reduction(Reduction::Sum).loss_and_grad(&x.detach(), &t)?;
                assert_eq!(values(&log_probs.0)?, [0.0]);
                assert!(values(&log_probs.1)?[classes..].iter().all(|&g| g == 0.0));
            }
        }
        Ok(())
    })
}

#[test]
fn all_rows_ignored() -> Result<()> {
    everywhere(|device| {
        let x = Var::from_tensor(&tensor(&[1.0, 2.0, 3.0, f64::NAN], &[2, 2], DType::F32, device)?)?;
        let t = indices(&[1, 1], &[2], DType::U32, device)?;
        for (reduction, want) in
            [(Reduction::Mean, vec![f64::NAN]), (Reduction::Sum, vec![0.0]), (Reduction::None, vec![0.0; 2])]
        {
            let ce = CrossEntropyLoss::new().with_ignore_index(1).with_reduction(reduction);
            let nll = NllLoss::new().with_ignore_index(1).with_reduction(reduction);
            for (loss, one) in [
                (ce.forward(&x, &t)?, ce.loss_and_grad(&x.detach(), &t)?),
                (nll.forward(&x, &t)?, nll.loss_and_grad(&x.detach(), &t)?),
            ] {
                assert_near("loss", &values(&loss)?, &want, 0.0);
                assert_near("loss_and_grad's loss", &values(&one.0)?, &want, 0.0);
                assert_eq!(values(loss.backward()?.get(&x).expect("a gradient"))?, [0.0; 4]);
                assert_eq!(values(&one.1)?, [0.0; 4]);
            }
        }
        // with a normalizer the mean is a plain quotient
        let ce = CrossEntropyLoss::new().with_ignore_index(1).with_normalizer(4.0);
        assert_eq!(values(&ce.forward(&x, &t)?)?, [0.0]);
        Ok(())
    })
}

/// -100 is ignored by default; C and 2^32 + 1 are out of range, whatever they look like when narrowed.
#[test]
fn targets_out_of_range() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.5, 1.0, 2.0, 0.0, 1.0, 0.0, 3.0, 1.0, 2.0], &[3, 3], DType::F32, device)?;
        let good = indices(&[1, -100, 2], &[3], DType::I64, device)?;
        let clean = ce_rows(&x, &good)?;
        assert_eq!(clean.0[1], 0.0);
        let two_to_the_32 = 1i64 << 32;
        for (bad, dtype) in [
            (3, DType::I64),
            (3, DType::I32),
            (3, DType::U32),
            (3, DType::U8),
            (-1, DType::I64),
            (-1, DType::I32),
            (-101, DType::I64),
            (two_to_the_32 + 1, DType::I64),
            (two_to_the_32, DType::I64),
            (i64::MAX, DType::I64),
            (i64::MIN, DType::I64),
        ] {
            let t = indices(&[1, bad, 2], &[3], dtype, device)?;
            let ce = CrossEntropyLoss::new().with_reduction(Reduction::None);
            let nll = NllLoss::new().with_reduction(Reduction::None);
            let checked = (ce.clone().with_target_check(true), nll.clone().with_target_check(true));
            let results = |ce: &candle_fused_loss::CrossEntropyLoss, nll: &candle_fused_loss::NllLoss| {
                let in_place = x.copy()?;
                let before = bits(&in_place)?;
                let results = [
                    ("cross_entropy", ce.forward(&x, &t)),
                    ("cross_entropy", ce.loss_and_grad(&x, &t).map(|v| v.0)),
                    ("cross_entropy", ce.loss_and_grad_inplace(&in_place, &t)),
                    ("cross_entropy", ce.statistics(&x, &t).map(|v| v.loss)),
                    ("nll", nll.forward(&x, &t)),
                    ("nll", nll.loss_and_grad(&x, &t).map(|v| v.0)),
                ];
                if results[2].1.is_err() {
                    assert_eq!(bits(&in_place)?, before, "the logits after an error");
                }
                Ok::<_, candle_core::Error>(results)
            };
            let must_fail = |results: [(&str, Result<Tensor>); 6]| {
                for (i, (name, result)) in results.into_iter().enumerate() {
                    let message = result.err().unwrap_or_else(|| panic!("{i}: target {bad} passed")).to_string();
                    for part in [name, &bad.to_string(), "row 1", "0..3"] {
                        assert!(message.contains(part), "{i}: no {part:?} in {message:?}");
                    }
                }
            };
            must_fail(results(&checked.0, &checked.1)?);
            if device.is_cpu() {
                must_fail(results(&ce, &nll)?);
                continue;
            }
            // not checked: the row is NaN, no other changes
            for (i, (_, result)) in results(&ce, &nll)?.into_iter().enumerate() {
                let loss = values(&result?)?;
                assert!(loss[1].is_nan() && loss[0].is_finite() && loss[2].is_finite(), "{i}: target {bad}: {loss:?}");
            }
            let (loss, grad) = ce_rows(&x, &t)?;
            assert_near("other rows", &[loss[0], loss[2]], &[clean.0[0], clean.0[2]], 0.0);
            assert!(grad[3..6].iter().all(|g| g.is_nan()), "{grad:?}");
            assert_near("other rows' gradients", &grad[..3], &clean.1[..3], 0.0);
            assert_near("other rows' gradients", &grad[6..], &clean.1[6..], 0.0);
        }
        Ok(())
    })
}

/// The ignore index is compared before anything else: any value is legal, out of range or a class.
#[test]
fn ignore_index_of_any_value() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0; 8], &[4, 2], DType::F32, device)?;
        for ignored in [-100, -1, 0, 1, 2, 255, i32::MAX as i64, (1 << 32) + 1, i64::MIN, i64::MAX] {
            let other = if ignored == 0 { 1 } else { 0 };
            let t = indices(&[other, ignored, other, ignored], &[4], DType::I64, device)?;
            let loss = CrossEntropyLoss::new().with_ignore_index(ignored);
            assert_near("mean", &values(&loss.forward(&x, &t)?)?, &[2f64.ln()], F32);
            let rows = values(&loss.with_reduction(Reduction::None).forward(&x, &t)?)?;
            assert_near("rows", &rows, &[2f64.ln(), 0.0, 2f64.ln(), 0.0], F32);
        }
        Ok(())
    })
}

#[test]
fn index_targets_of_every_dtype() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(53);
        let x = tensor(&random.normals(30, 1.0), &[6, 5], DType::F32, device)?;
        let classes = random.classes(6, 5);
        let want = bits(&cross_entropy(&x, &indices(&classes, &[6], DType::I64, device)?)?)?;
        for dtype in INDICES {
            let target = indices(&classes, &[6], dtype, device)?;
            assert_eq!(bits(&cross_entropy(&x, &target)?)?, want, "{dtype:?}");
            assert_eq!(bits(&nll(&log_softmax(&x, 1)?, &target)?)?.len(), 1);
        }
        Ok(())
    })
}

#[test]
fn weight_smoothing_and_ignore_together() -> Result<()> {
    everywhere(|device| {
        let x = [1.0, 2.0, 3.0, 1.0, 0.0, -1.0, 5.0, 5.0, 5.0];
        let (w, e) = ([0.5, 2.0, 1.5], 0.3);
        let lse = |row: &[f64]| row.iter().map(|v| v.exp()).sum::<f64>().ln();
        let row = |x: &[f64], t: usize| {
            let smooth: f64 = (0..3).map(|c| w[c] * (lse(x) - x[c])).sum();
            (1.0 - e) * w[t] * (lse(x) - x[t]) + e / 3.0 * smooth
        };
        let rows = [row(&x[..3], 2), row(&x[3..6], 1), 0.0];
        let loss = CrossEntropyLoss::new()
            .with_weight(tensor(&w, &[3], DType::F32, device)?)
            .with_label_smoothing(e)
            .with_ignore_index(0);
        let (x, t) = (tensor(&x, &[3, 3], DType::F32, device)?, indices(&[2, 1, 0], &[3], DType::I32, device)?);
        // the denominator has the weights of the targets that count
        assert_near("mean", &values(&loss.forward(&x, &t)?)?, &[(rows[0] + rows[1]) / (1.5 + 2.0)], 2.0 * F32);
        assert_near("rows", &values(&loss.with_reduction(Reduction::None).forward(&x, &t)?)?, &rows, 2.0 * F32);
        Ok(())
    })
}

#[test]
fn probabilities_that_do_not_sum_to_one() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0, 0.0], &[1, 2], DType::F32, device)?;
        let (loss, grad) = ce_rows(&x, &tensor(&[3.0, 1.0], &[1, 2], DType::F32, device)?)?;
        assert_near("loss", &loss, &[4.0 * 2f64.ln()], F32);
        // softmax * 4 - t
        assert_near("gradient", &grad, &[-1.0, 1.0], F32);
        let (loss, grad) = ce_rows(&x, &tensor(&[0.0, 0.0], &[1, 2], DType::F32, device)?)?;
        assert_eq!((loss, grad), (vec![0.0], vec![0.0, 0.0]));
        Ok(())
    })
}

#[test]
fn probabilities_refuse_an_ignore_index_that_is_a_class() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0; 4], &[2, 2], DType::F32, device)?;
        let message = CrossEntropyLoss::new().with_ignore_index(0).forward(&x, &x).unwrap_err().to_string();
        assert!(message.contains("cross_entropy") && message.contains("ignore_index 0"), "{message}");
        // a negative one is harmless
        CrossEntropyLoss::new().with_ignore_index(-1).forward(&x, &x)?;
        Ok(())
    })
}

#[test]
fn mean_over_probabilities_divides_by_rows() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0; 12], &[2, 2, 3], DType::F32, device)?;
        let t = tensor(&[0.5; 12], &[2, 2, 3], DType::F32, device)?;
        let loss = CrossEntropyLoss::new().with_weight(tensor(&[3.0, 5.0], &[2], DType::F32, device)?);
        assert_near("loss", &values(&loss.forward(&x, &t)?)?, &[4.0 * 2f64.ln()], F32);
        Ok(())
    })
}

#[test]
fn none_with_a_random_upstream_gradient() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(54);
        let x = Var::from_tensor(&tensor(&random.normals(40, 1.0), &[8, 5], DType::F32, device)?)?;
        let t = indices(&random.classes(8, 5), &[8], DType::I64, device)?;
        let upstream = random.normals(8, 1.0);
        let loss = CrossEntropyLoss::new().with_reduction(Reduction::None);
        let rows = (loss.forward(&x, &t)? * tensor(&upstream, &[8], DType::F32, device)?)?;
        let grad = values(rows.sum_all()?.backward()?.get(&x).expect("a gradient"))?;
        let own = values(&loss.loss_and_grad(&x.detach(), &t)?.1)?;
        let want: Vec<_> = own.iter().enumerate().map(|(i, g)| g * upstream[i / 5]).collect();
        assert_near("gradient", &grad, &want, F32);
        Ok(())
    })
}

/// The upstream gradient of a transposed or repeated loss arrives with strides.
#[test]
fn upstream_gradients_with_strides() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(55);
        let x = Var::from_tensor(&tensor(&random.normals(60, 1.0), &[3, 4, 5], DType::F32, device)?)?;
        let t = indices(&random.classes(15, 4), &[3, 5], DType::I64, device)?;
        let g = tensor(&random.normals(15, 1.0), &[3, 5], DType::F32, device)?;
        let loss = CrossEntropyLoss::new().with_reduction(Reduction::None);
        let gradient = |loss: Tensor| values(loss.sum_all()?.backward()?.get(&x).expect("a gradient"));
        let want = gradient((loss.forward(&x, &t)? * &g)?)?;
        assert_eq!(gradient((loss.forward(&x, &t)?.t()? * g.t()?)?)?, want, "transposed");
        let repeated = loss.forward(&x, &t)?.unsqueeze(0)?.broadcast_as((1, 3, 5))?;
        assert_eq!(gradient((repeated * g.unsqueeze(0)?)?)?, want, "broadcast");
        // the gradient of a sum: one number with a stride of 0
        let ones = values(&loss.loss_and_grad(&x.detach(), &t)?.1)?;
        assert_near("sum", &gradient(loss.forward(&x, &t)?)?, &ones, 0.0);
        let bce = BceWithLogitsLoss::new().with_reduction(Reduction::None);
        let target = tensor(&random.labels(60), &[3, 4, 5], DType::F32, device)?;
        let ones = values(&bce.loss_and_grad(&x.detach(), &target)?.1)?;
        assert_near("sum of BCE", &gradient(bce.forward(&x, &target)?)?, &ones, 0.0);
        assert_near("transposed BCE", &gradient(bce.forward(&x, &target)?.transpose(0, 2)?)?, &ones, 0.0);
        Ok(())
    })
}

#[test]
fn backward_twice_gives_the_same() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(56);
        let x = Var::from_tensor(&tensor(&random.uniforms(3000), &[3, 1000], DType::F32, device)?)?;
        let soft = tensor(&random.uniforms(3000), &[3, 1000], DType::F32, device)?;
        let hard = indices(&random.classes(3, 1000), &[3], DType::U32, device)?;
        let losses = [
            ("cross_entropy", cross_entropy(&x, &hard)?),
            ("cross_entropy of probabilities", cross_entropy(&x, &soft)?),
            ("nll", nll(&x, &hard)?),
            ("log_softmax", (log_softmax(&x, 1)? * &soft)?.sum_all()?),
            ("binary_cross_entropy", binary_cross_entropy(&x, &soft)?),
            ("binary_cross_entropy_with_logits", binary_cross_entropy_with_logits(&x, &soft)?),
            ("multi_label_soft_margin", multi_label_soft_margin(&x, &soft)?),
            ("sigmoid_focal", sigmoid_focal(&x, &soft)?),
        ];
        for (name, loss) in losses {
            let gradient = || bits(loss.backward()?.get(&x).expect("a gradient"));
            assert_eq!(gradient()?, gradient()?, "{name}");
        }
        Ok(())
    })
}

/// The losses whose target may be a float, as closures over (input, target).
type Loss = fn(&Tensor, &Tensor) -> Result<Tensor>;

fn float_target_losses() -> [(&'static str, Loss); 5] {
    [
        ("cross_entropy", cross_entropy),
        ("binary_cross_entropy", binary_cross_entropy),
        ("binary_cross_entropy_with_logits", binary_cross_entropy_with_logits),
        ("multi_label_soft_margin", multi_label_soft_margin),
        ("sigmoid_focal", sigmoid_focal),
    ]
}

#[test]
fn targets_computed_from_a_variable() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(57);
        for dtype in FLOATS {
            let x = tensor(&random.uniforms(12), &[3, 4], dtype, device)?;
            let source = Var::from_tensor(&tensor(&random.uniforms(12), &[3, 4], dtype, device)?)?;
            for (name, loss) in float_target_losses() {
                let grads = loss(&x, &source.affine(0.5, 0.25)?)?.backward()?;
                let grad = grads.get(&source).unwrap_or_else(|| panic!("{name}: no gradient through the target"));
                assert_eq!((grad.dims(), grad.dtype()), (&[3, 4][..], dtype), "{name}");
                assert!(values(grad)?.iter().all(|g| g.is_finite()), "{name} {dtype:?}");
                // and both at once from one source
                let grads = loss(&source.affine(0.5, 0.1)?, &source.affine(0.5, 0.25)?)?.backward()?;
                assert!(values(grads.get(&source).expect("a gradient"))?.iter().all(|g| g.is_finite()), "{name}");
            }
            // indices of a tracked tensor have no gradient, and that of the logits arrives
            let logits = Var::from_tensor(&x)?;
            let index = source.argmax(D::Minus1)?;
            let grads = cross_entropy(&logits, &index)?.backward()?;
            assert!(grads.get(&source).is_none() && grads.get(&logits).is_some());
        }
        Ok(())
    })
}

#[test]
fn weights_computed_from_a_variable() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = Var::from_tensor(&tensor(&[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], &[2, 3], dtype, device)?)?;
            let source = Var::from_tensor(&tensor(&[0.5, 1.0, 2.0], &[3], dtype, device)?)?;
            let weight = source.affine(2.0, 0.0)?;
            let target = tensor(&[1.0, 0.0, 1.0, 0.0, 1.0, 0.5], &[2, 3], dtype, device)?;
            let index = indices(&[1, 2], &[2], DType::U32, device)?;
            let logits = BceWithLogitsLoss::new();
            let losses = [
                CrossEntropyLoss::new().with_weight(weight.clone()).forward(&x, &index)?,
                CrossEntropyLoss::new().with_weight(weight.clone()).forward(&x, &target)?,
                NllLoss::new().with_weight(weight.clone()).forward(&x, &index)?,
                BceLoss::new().with_weight(weight.clone()).forward(&x, &target)?,
                logits.clone().with_weight(weight.clone()).forward(&x, &target)?,
                logits.clone().with_pos_weight(weight.clone()).forward(&x, &target)?,
                logits.with_mask(weight.clone()).forward(&x, &target)?,
                MultiLabelSoftMarginLoss::new().with_weight(weight.clone()).forward(&x, &target)?,
            ];
            for (i, loss) in losses.iter().enumerate() {
                let grads = loss.backward()?;
                assert!(grads.get(&x).is_some() && grads.get(&source).is_none(), "loss {i}");
            }
        }
        Ok(())
    })
}

#[test]
fn logits_of_another_axis_order() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(58);
        for classes in [5, 70] {
            let rows = tensor(&random.normals(2 * 7 * classes, 1.0), &[2, 7, classes], DType::F32, device)?;
            let t = indices(&random.classes(14, classes), &[2, 7], DType::I64, device)?;
            let (loss, grad) = ce_rows(&rows.transpose(1, 2)?, &t)?;
            let (flat, flat_grad) = ce_rows(&rows.reshape((14, classes))?, &t.flatten_all()?)?;
            assert_near("loss", &loss, &flat, F32);
            // the graph's gradient is of a contiguous variable in the other order
            let back = tensor(&grad, &[2, classes, 7], DType::F32, device)?.transpose(1, 2)?;
            for (got, want) in values(&back)?.iter().zip(&flat_grad) {
                assert!((got - want).abs() <= F32 * want.abs() + 1e-7, "{got} {want}");
            }
        }
        Ok(())
    })
}

#[test]
fn no_rows() -> Result<()> {
    everywhere(|device| {
        for (dtype, reduction) in FLOATS.iter().flat_map(|&d| REDUCTIONS.map(|r| (d, r))) {
            let want = match reduction {
                Reduction::None => vec![],
                Reduction::Mean | Reduction::BatchMean => vec![f64::NAN],
                Reduction::Sum => vec![0.0],
            };
            let ce = CrossEntropyLoss::new().with_reduction(reduction);
            let smooth = ce.clone().with_label_smoothing(0.1).with_z_loss(0.1);
            let nll = NllLoss::new().with_reduction(reduction);
            let bce = BceLoss::new().with_reduction(reduction);
            let logits = BceWithLogitsLoss::new().with_reduction(reduction);
            let margin = MultiLabelSoftMarginLoss::new().with_reduction(reduction);
            let focal = SigmoidFocalLoss::new().with_reduction(reduction);
            for dims in [&[0, 3][..], &[0, 3, 2], &[2, 3, 0]] {
                let x = Var::from_tensor(&Tensor::zeros(dims, dtype, device)?)?;
                let mut rows = dims.to_vec();
                rows.remove(1);
                let index = Tensor::zeros(rows.as_slice(), DType::U32, device)?;
                let soft = Tensor::zeros(dims, dtype, device)?;
                let mut losses = vec![
                    ("cross_entropy", ce.forward(&x, &index)?, ce.loss_and_grad(&x.detach(), &index)?),
                    ("of probabilities", ce.forward(&x, &soft)?, ce.loss_and_grad(&x.detach(), &soft)?),
                    ("with options", smooth.forward(&x, &index)?, smooth.loss_and_grad(&x.detach(), &index)?),
                    ("nll", nll.forward(&x, &index)?, nll.loss_and_grad(&x.detach(), &index)?),
                    ("bce", bce.forward(&x, &soft)?, bce.loss_and_grad(&x.detach(), &soft)?),
                    ("logits", logits.forward(&x, &soft)?, logits.loss_and_grad(&x.detach(), &soft)?),
                    ("focal", focal.forward(&x, &soft)?, focal.loss_and_grad(&x.detach(), &soft)?),
                ];
                if dims != [2, 3, 0] {
                    let loss = margin.forward(&x, &soft)?;
                    losses.push(("margin", loss, margin.loss_and_grad(&x.detach(), &soft)?));
                }
                for (name, loss, (one_loss, one_grad)) in losses {
                    let what = format!("{name} {dims:?} {reduction:?}");
                    assert_near(&what, &values(&loss)?, &want, 0.0);
                    assert_near(&what, &values(&one_loss)?, &want, 0.0);
                    assert_eq!((loss.dtype(), one_grad.dims()), (arithmetic(dtype), dims), "{what}");
                    let grads = loss.sum_all()?.backward()?;
                    assert_eq!(grads.get(&x).unwrap_or_else(|| panic!("{what}: no gradient")).dims(), dims, "{what}");
                }
                assert_eq!(ce.loss_and_grad_inplace(&soft, &index)?.elem_count(), want.len());
                let rows = ce.statistics(&soft, &index)?;
                assert_eq!((rows.loss.elem_count(), rows.argmax.elem_count(), rows.correct.elem_count()), (0, 0, 0));
                assert_eq!(log_softmax(&x, 1)?.dims(), dims);
            }
        }
        Ok(())
    })
}

/// A window that begins at an odd element: no row is aligned.
#[test]
fn windows_at_odd_offsets() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(59);
        for (classes, dtype) in [7, 65, 1001].into_iter().flat_map(|c| FLOATS.map(|d| (c, d))) {
            let flat = tensor(&random.normals(3 * classes + 5, 1.0), &[3 * classes + 5], dtype, device)?;
            let t = indices(&random.classes(3, classes), &[3], DType::U32, device)?;
            let window = flat.narrow(0, 1, 3 * classes)?.reshape((3, classes))?;
            let copy = tensor(&values(&window)?, &[3, classes], dtype, device)?;
            let ce = CrossEntropyLoss::new();
            let (got, want) = (ce.loss_and_grad(&window, &t)?, ce.loss_and_grad(&copy, &t)?);
            assert_near("loss", &values(&got.0)?, &values(&want.0)?, F32);
            let largest = 2.0 / 3.0 * if dtype == DType::BF16 { 8e-3 } else { 1e-3 };
            let near = |got: &[f64]| -> Result<()> {
                for (got, want) in got.iter().zip(values(&want.1)?) {
                    assert!((got - want).abs() <= largest * want.abs().max(1e-3), "{got} {want}");
                }
                Ok(())
            };
            near(&values(&got.1)?)?;
            // in place only the window changes, and always to the same bits
            let before = values(&flat)?;
            let again = flat.copy()?;
            ce.loss_and_grad_inplace(&window, &t)?;
            ce.loss_and_grad_inplace(&again.narrow(0, 1, 3 * classes)?.reshape((3, classes))?, &t)?;
            let after = values(&flat)?;
            assert_eq!(after, values(&again)?);
            assert_eq!((after[0], &after[3 * classes + 1..]), (before[0], &before[3 * classes + 1..]));
            let replaced = &after[1..3 * classes + 1];
            near(replaced)?;
            // on CUDA, a row's sum is taken in an order that depends on where in a word its gradient begins
            if !device.is_cuda() {
                assert_eq!(replaced, values(&got.1)?);
            }
        }
        Ok(())
    })
}

#[test]
fn in_place_refuses_what_it_can_not_replace() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0; 6], &[2, 3], DType::F32, device)?;
        let t = indices(&[0, 1], &[2], DType::U32, device)?;
        let tracked = Var::from_tensor(&x)?;
        let ce = CrossEntropyLoss::new();
        let message = ce.loss_and_grad_inplace(&tracked, &t).unwrap_err().to_string();
        assert!(message.contains("cross_entropy") && message.contains("tracked"), "{message}");
        let derived = tracked.affine(2.0, 0.0)?;
        assert!(ce.loss_and_grad_inplace(&derived, &t).is_err());
        let message = ce.loss_and_grad_inplace(&x.t()?, &indices(&[0, 1, 1], &[3], DType::U32, device)?).unwrap_err();
        assert!(message.to_string().contains("contiguous"), "{message}");
        let repeated = x.narrow(0, 0, 1)?.broadcast_as((2, 3))?;
        assert!(ce.loss_and_grad_inplace(&repeated, &t).is_err());
        assert_eq!(values(&x)?, [0.0; 6]);
        // a target in the same memory is an error, weights there are read before they are replaced
        assert!(ce.loss_and_grad_inplace(&x, &x).is_err());
        let x = tensor(&[1.0, 2.0, 3.0, 0.5, 1.0, 0.0], &[2, 3], DType::F32, device)?;
        let weighted = ce.clone().with_weight(x.get(0)?);
        let (loss, grad) = weighted.loss_and_grad(&x, &t)?;
        assert_eq!(values(&weighted.loss_and_grad_inplace(&x, &t)?)?, values(&loss)?);
        assert_eq!(values(&x)?, values(&grad)?);
        Ok(())
    })
}

#[test]
fn z_loss_and_normalizer() -> Result<()> {
    everywhere(|device| {
        // lse = ln 2 in each row; the ignored row has none
        let x = tensor(&[0.0; 6], &[3, 2], DType::F32, device)?;
        let t = indices(&[0, 1, -100], &[3], DType::I64, device)?;
        let ln2 = 2f64.ln();
        let loss = CrossEntropyLoss::new().with_z_loss(0.5);
        assert_near("mean", &values(&loss.forward(&x, &t)?)?, &[ln2 + 0.5 * ln2 * ln2], F32);
        let weighted = loss.clone().with_weight(tensor(&[3.0, 1.0], &[2], DType::F32, device)?);
        // unweighted z-loss, weighted denominator
        assert_near("weights", &values(&weighted.forward(&x, &t)?)?, &[ln2 + ln2 * ln2 / 4.0], F32);
        let normalized = weighted.with_normalizer(8.0);
        assert_near("normalizer", &values(&normalized.forward(&x, &t)?)?, &[(4.0 * ln2 + ln2 * ln2) / 8.0], F32);
        assert!(normalized.with_reduction(Reduction::Sum).forward(&x, &t).is_err(), "a sum has no normalizer");
        Ok(())
    })
}

#[test]
fn statistics_take_the_first_of_equals() -> Result<()> {
    everywhere(|device| {
        for classes in [4, 64, 200, 5000] {
            let mut x = vec![0.0; 2 * classes];
            x[classes - 2..classes].fill(3.0);
            let x = tensor(&x, &[2, classes], DType::F32, device)?;
            let rows = CrossEntropyLoss::new().statistics(&x, &indices(&[2, 0], &[2], DType::U32, device)?)?;
            assert_eq!((rows.argmax.dtype(), rows.correct.dtype()), (DType::U32, DType::F32));
            assert_eq!(values(&rows.argmax)?, [classes as f64 - 2.0, 0.0]);
            assert_eq!(values(&rows.correct)?, [(classes == 4) as u8 as f64, 1.0]);
        }
        Ok(())
    })
}

// ---- probabilities

#[test]
fn bce_at_the_ends() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[0.0, 1.0, 0.0, 1.0, 0.5], &[5], dtype, device)?;
            let t = Var::from_tensor(&tensor(&[0.0, 1.0, 1.0, 0.0, 0.5], &[5], dtype, device)?)?;
            let bce = BceLoss::new().with_reduction(Reduction::None);
            let (loss, grad) =
                loss_and_grad(&x, &t.detach(), |x, t| bce.forward(x, t), &|x, t| bce.loss_and_grad(x, t))?;
            assert_near("loss", &loss, &[0.0, 0.0, 100.0, 100.0, 2f64.ln()], F32);
            // 1e12 is beyond f16
            let steep = if dtype == DType::F16 { f64::INFINITY } else { 1e12 };
            assert_near("gradient", &grad, &[0.0, 0.0, -steep, steep, 0.0], 8e-3);
            let target_grad = bce.forward(&x, &t)?.backward()?;
            let target_grad = values(target_grad.get(&t).expect("a gradient"))?;
            assert_near("target gradient", &target_grad, &[100.0, -100.0, 100.0, -100.0, 0.0], F32);
        }
        Ok(())
    })
}

#[test]
fn bce_refuses_what_is_no_probability() -> Result<()> {
    everywhere(|device| {
        for (x, t, what, value) in [
            (1.5, 0.5, "probability", "1.5"),
            (-0.25, 0.5, "probability", "-0.25"),
            (f64::NAN, 0.5, "probability", "NaN"),
            (f64::INFINITY, 0.5, "probability", "inf"),
            (0.5, 1.5, "target", "1.5"),
            (0.5, -1.0, "target", "-1"),
            (0.5, f64::NAN, "target", "NaN"),
        ] {
            let x = tensor(&[0.5, 0.5, x, 0.5], &[2, 2], DType::F32, device)?;
            let t = tensor(&[0.5, 0.5, t, 0.5], &[2, 2], DType::F32, device)?;
            let bce = BceLoss::new().with_reduction(Reduction::None);
            let must_fail = |bce: &candle_fused_loss::BceLoss| {
                for result in [bce.forward(&x, &t), bce.loss_and_grad(&x, &t).map(|v| v.0)] {
                    let message = result.expect_err("a number outside of [0, 1]").to_string();
                    for part in ["binary_cross_entropy", what, value, "element 2", "[0, 1]"] {
                        assert!(message.contains(part), "no {part:?} in {message:?}");
                    }
                }
            };
            must_fail(&bce.clone().with_target_check(true));
            if device.is_cpu() || !FUSED {
                must_fail(&bce);
                continue;
            }
            let (loss, grad) = bce.loss_and_grad(&x, &t)?;
            for (i, (loss, grad)) in values(&loss)?.iter().zip(values(&grad)?).enumerate() {
                assert_eq!((loss.is_nan(), grad.is_nan()), (i == 2, i == 2), "element {i}");
            }
        }
        Ok(())
    })
}

#[test]
fn bce_divides_by_elements_also_with_weights() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.5; 4], &[2, 2], DType::F32, device)?;
        let weight = tensor(&[3.0, 5.0], &[2], DType::F32, device)?;
        let bce = BceLoss::new().with_weight(weight.clone()).forward(&x, &x)?;
        assert_near("probabilities", &values(&bce)?, &[4.0 * 2f64.ln()], F32);
        let zeros = x.zeros_like()?;
        let logits = BceWithLogitsLoss::new().with_weight(weight).forward(&zeros, &zeros)?;
        assert_near("logits", &values(&logits)?, &[4.0 * 2f64.ln()], F32);
        Ok(())
    })
}

// ---- logits of single elements

#[test]
fn masked_elements_are_zeros_whatever_they_hold() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[0.0, f64::NAN, f64::INFINITY, 0.0], &[2, 2], dtype, device)?;
            let t = tensor(&[1.0, 1.0, 0.0, f64::NAN], &[2, 2], dtype, device)?;
            for mask in [DType::U8, DType::F32, DType::I64] {
                let mask = tensor(&[1.0, 0.0, 0.0, 0.0], &[2, 2], mask, device)?;
                for (reduction, want) in [
                    (Reduction::None, vec![1.0, 0.0, 0.0, 0.0]),
                    (Reduction::Mean, vec![1.0]),
                    (Reduction::Sum, vec![1.0]),
                ] {
                    let loss = BceWithLogitsLoss::new().with_mask(mask.clone()).with_reduction(reduction);
                    let (loss, grad) =
                        loss_and_grad(&x, &t, |x, t| loss.forward(x, t), &|x, t| loss.loss_and_grad(x, t))?;
                    let want: Vec<_> = want.iter().map(|v| v * 2f64.ln()).collect();
                    assert_near("loss", &loss, &want, F32);
                    assert_eq!(grad, [-0.5, 0.0, 0.0, 0.0]);
                }
            }
            let none = BceWithLogitsLoss::new().with_mask(tensor(&[0.0], &[1], DType::U8, device)?);
            let (loss, grad) = none.loss_and_grad(&x, &t)?;
            assert!(scalar(&loss)?.is_nan(), "all masked: the mean of nothing");
            assert_eq!(values(&grad)?, [0.0; 4]);
        }
        Ok(())
    })
}

#[test]
fn label_smoothing_of_bce() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[2.0], &[1], DType::F32, device)?;
        let loss = BceWithLogitsLoss::new().with_label_smoothing(0.2);
        let smooth = values(&loss.forward(&x, &tensor(&[1.0], &[1], DType::U8, device)?)?)?;
        let plain = binary_cross_entropy_with_logits(&x, &tensor(&[0.9], &[1], DType::F32, device)?)?;
        assert_near("1 becomes 0.9", &smooth, &values(&plain)?, F32);
        Ok(())
    })
}

#[test]
fn focal_at_its_edges() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    everywhere(|device| {
        for (dtype, gamma) in FLOATS.iter().flat_map(|&d| [0.0, 0.25, 0.5, 1.0, 2.0, 5.0].map(|g| (d, g))) {
            // p = 0 and p = 1 in every dtype, with both labels; and the middle
            let x = tensor(&[-200.0, 200.0, -200.0, 200.0, -1e4, 1e4, 0.0], &[7], dtype, device)?;
            let t = tensor(&[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], &[7], dtype, device)?;
            let focal = SigmoidFocalLoss::new().with_gamma(gamma).with_alpha(-1.0).with_reduction(Reduction::None);
            let (loss, grad) = loss_and_grad(&x, &t, |x, t| focal.forward(x, t), &|x, t| focal.loss_and_grad(x, t))?;
            let x = values(&x)?;
            let middle = 0.5f64.powf(gamma);
            let want = [0.0, 0.0, -x[2], x[3], -x[4], x[5], middle * 2f64.ln()];
            for (i, (got, want)) in loss.iter().zip(want).enumerate() {
                // with a small gamma e^-200 to its power is still a number
                assert!(
                    (got - want).abs() <= 1e-6 * want + 200.0 * (-200.0 * (1.0 + gamma)).exp(),
                    "{i}: {got} {want}"
                );
            }
            let slope = -middle * (0.5 + gamma * 0.5 * 2f64.ln());
            assert!(grad.iter().all(|g| g.is_finite()), "{dtype:?} gamma {gamma}: {grad:?}");
            let ulp = if dtype == DType::BF16 { 4e-3 } else { 1e-3 };
            assert_near("steep and middle", &grad[2..], &[-1.0, 1.0, -1.0, 1.0, slope], ulp);
            assert!(grad[..2].iter().all(|g| g.abs() < 1e-30), "{grad:?}");
            // soft labels too
            let soft = tensor(&[0.5; 7], &[7], dtype, device)?;
            let (loss, grad) = focal.loss_and_grad(&tensor(&x, &[7], dtype, device)?, &soft)?;
            assert!(values(&loss)?.iter().chain(&values(&grad)?).all(|v| v.is_finite()), "gamma {gamma}");
        }
        // gamma 0 without alpha is BCE
        let mut random = Random::new(60);
        let x = tensor(&random.normals(50, 4.0), &[50], DType::F64, device)?;
        let t = tensor(&random.labels(50), &[50], DType::F64, device)?;
        let focal = SigmoidFocalLoss::new().with_gamma(0.0).with_alpha(-1.0).loss_and_grad(&x, &t)?;
        let bce = BceWithLogitsLoss::new().loss_and_grad(&x, &t)?;
        assert_near("gamma 0", &values(&focal.0)?, &values(&bce.0)?, 1e-15);
        // infinite logits that agree with their label
        let x = tensor(&[INF, -INF], &[2], DType::F32, device)?;
        let t = tensor(&[1.0, 0.0], &[2], DType::F32, device)?;
        let (loss, grad) = SigmoidFocalLoss::new().with_reduction(Reduction::None).loss_and_grad(&x, &t)?;
        assert_eq!((values(&loss)?, values(&grad)?), (vec![0.0; 2], vec![0.0; 2]));
        Ok(())
    })
}

#[test]
fn default_focal_is_torchvisions() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[0.0], &[1], DType::F32, device)?;
        // alpha 0.25, gamma 2: 0.25 * 0.5^2 * ln 2
        let loss = sigmoid_focal(&x, &tensor(&[1.0], &[1], DType::F32, device)?)?;
        assert_near("loss", &values(&loss)?, &[0.25 * 0.25 * 2f64.ln()], F32);
        Ok(())
    })
}
