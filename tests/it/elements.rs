//! What the losses of elements promise at their edges, each by name: labels that can't be meant, masks, products of 0
//! and infinity, the ends of a range, gradients that are scaled.

use super::losses::{BceLoss, BceWithLogitsLoss, FUSED, L1Loss, MultiLabelSoftMarginLoss, Reduction, SigmoidFocalLoss};
use crate::common::{FLOATS, INDICES, REDUCTIONS, Random, arithmetic, bits, devices, epsilon, tensor, values};
use candle_core::{DType, Device, Result, Tensor, Var};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

/// A few roundings of f32 arithmetic.
const F32: f64 = 4e-7;

type Pass<'a, T> = Box<dyn Fn(&Tensor, &Tensor) -> Result<T> + 'a>;

/// A loss with its options, whichever it is.
struct Loss<'a> {
    name: &'static str,
    forward: Pass<'a, Tensor>,
    loss_and_grad: Pass<'a, (Tensor, Tensor)>,
}

macro_rules! loss {
    ($name:literal, $loss:expr) => {{
        let (one, other) = ($loss, $loss);
        Loss {
            name: $name,
            forward: Box::new(move |x, t| one.forward(x, t)),
            loss_and_grad: Box::new(move |x, t| other.loss_and_grad(x, t)),
        }
    }};
}

/// What a call computes: the loss, the gradient and the target's, and both of one pass.
struct Results {
    loss: Vec<f64>,
    grad: Vec<f64>,
    /// Of a float target.
    target_grad: Vec<f64>,
    one_pass: (Vec<f64>, Vec<f64>),
}

impl Loss<'_> {
    fn results(&self, x: &Tensor, t: &Tensor) -> Result<Results> {
        let x = Var::from_tensor(x)?;
        let t_var = if t.dtype().is_float() { Some(Var::from_tensor(t)?) } else { None };
        let t = t_var.as_ref().map_or(t, |t| t.as_tensor());
        let loss = (self.forward)(&x, t)?;
        let grads = loss.sum_all()?.backward()?;
        let target_grad = t_var.as_ref().map(|t| values(grads.get(t).expect("a target's gradient"))).transpose()?;
        let (one_loss, one_grad) = (self.loss_and_grad)(&x.detach(), &t.detach())?;
        Ok(Results {
            loss: values(&loss)?,
            grad: values(grads.get(&x).unwrap_or_else(|| panic!("{}: no gradient of {x}", self.name)))?,
            target_grad: target_grad.unwrap_or_default(),
            one_pass: (values(&one_loss)?, values(&one_grad)?),
        })
    }

    /// Loss, gradient and, if there is one, the target's, within a relative error.
    #[track_caller]
    fn assert(&self, x: &Tensor, t: &Tensor, [loss, grad, target_grad]: [&[f64]; 3], relative: f64) -> Result<()> {
        let name = self.name;
        let got = self.results(x, t)?;
        assert_near(&format!("{name}: loss"), &got.loss, loss, relative);
        assert_near(&format!("{name}: gradient"), &got.grad, grad, relative);
        assert_near(&format!("{name}: one pass's loss"), &got.one_pass.0, loss, relative);
        assert_near(&format!("{name}: one pass's gradient"), &got.one_pass.1, grad, relative);
        if t.dtype().is_float() {
            assert_near(&format!("{name}: target's gradient"), &got.target_grad, target_grad, relative);
        }
        Ok(())
    }

    #[track_caller]
    fn assert_fails(&self, x: &Tensor, t: &Tensor, parts: &[&str]) {
        for result in [(self.forward)(x, t), (self.loss_and_grad)(x, t).map(|(loss, _)| loss)] {
            let message = result.expect_err(self.name).to_string();
            for part in parts {
                assert!(message.contains(part), "{}: no {part:?} in {message:?}", self.name);
            }
        }
    }
}

/// Elementwise `|got - want| <= relative |want|`; NaN and infinities must be themselves.
#[track_caller]
fn assert_near(what: &str, got: &[f64], want: &[f64], relative: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(same || (got - want).abs() <= relative * want.abs(), "{what}[{i}]: got {got:e}, expected {want:e}");
    }
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn f32s(values: &[f64], device: &Device) -> Result<Tensor> {
    tensor(values, &[values.len()], DType::F32, device)
}

/// The losses with binary targets, without a reduction.
fn binary_losses(target_check: bool) -> Vec<Loss<'static>> {
    let none = Reduction::None;
    vec![
        loss!("binary_cross_entropy", BceLoss::new().with_reduction(none).with_target_check(target_check)),
        loss!(
            "binary_cross_entropy_with_logits",
            BceWithLogitsLoss::new().with_reduction(none).with_target_check(target_check)
        ),
        loss!(
            "multi_label_soft_margin",
            MultiLabelSoftMarginLoss::new().with_reduction(none).with_target_check(target_check)
        ),
        loss!("sigmoid_focal", SigmoidFocalLoss::new().with_reduction(none).with_target_check(target_check)),
        loss!(
            "sigmoid_focal",
            SigmoidFocalLoss::new().with_gamma(0.5).with_reduction(none).with_target_check(target_check)
        ),
    ]
}

// ---- labels

/// The labels of a 0/255 image, of -1 and 1, and of classes: an error that names the loss, the label, its place and a
/// remedy; on CUDA without the check NaN in that element alone, of the loss and of the gradient.
#[test]
fn integer_targets_are_0_or_1() -> Result<()> {
    for (device, dtype) in devices().iter().flat_map(|d| INDICES.map(|i| (d, i))) {
        let labels = if matches!(dtype, DType::U8 | DType::U32) { [255.0, 2.0, 254.0] } else { [-1.0, 2.0, -300.0] };
        for (label, float) in labels.into_iter().zip([DType::F32, DType::F64, DType::BF16]) {
            // rows of one class for multi-label
            let x = tensor(&[0.5, 0.25, 0.75, 0.5], &[4, 1], float, device)?;
            let t = tensor(&[0.0, label, 1.0, 1.0], &[4, 1], dtype, device)?;
            let named = format!("target {label} at element 1, expected 0 or 1");
            for loss in binary_losses(true) {
                loss.assert_fails(&x, &t, &[loss.name, &named, "`target.ne(0)?`", "`target.gt(0)?`"]);
            }
            for loss in binary_losses(false) {
                if device.is_cpu() || !FUSED {
                    loss.assert_fails(&x, &t, &[loss.name, &named]);
                    continue;
                }
                let Results { loss: losses, grad, one_pass, .. } = loss.results(&x, &t)?;
                for (what, got) in [("loss", losses), ("gradient", grad), ("loss", one_pass.0), ("", one_pass.1)] {
                    let nan: Vec<_> = got.iter().map(|v| v.is_nan()).collect();
                    assert_eq!(nan, [false, true, false, false], "{}, {dtype:?} {label}: {what}", loss.name);
                }
            }
        }
    }
    Ok(())
}

/// The first of several, wherever it is, in whichever block of a long tensor and whatever its strides.
#[test]
fn the_first_wrong_label_is_named() -> Result<()> {
    for device in devices() {
        for at in [0, 1023, 1024, 2999] {
            let mut t = vec![0u8; 3000];
            t[at..].fill(7);
            let x = Tensor::zeros((3000, 2), DType::F32, &device)?;
            let t = Tensor::from_vec(t, 3000, &device)?.unsqueeze(1)?.broadcast_as((3000, 2))?;
            let loss = loss!("binary_cross_entropy_with_logits", BceWithLogitsLoss::new().with_target_check(true));
            loss.assert_fails(&x, &t, &[&format!("target 7 at element {}", 2 * at)]);
        }
    }
    Ok(())
}

/// What is no label of a loss is one of another: L1 is a regression, and floats are what they are.
#[test]
fn other_targets_are_any_numbers() -> Result<()> {
    for device in devices() {
        let x = f32s(&[2.0, -1.0], &device)?;
        let t = Tensor::new(&[255u8, 3], &device)?;
        loss!("l1", L1Loss::new()).assert(&x, &t, [&[128.5], &[-0.5, -0.5], &[]], F32)?;
        let t = f32s(&[2.5, -1.0], &device)?;
        let logits = BceWithLogitsLoss::new().with_target_check(true).with_reduction(Reduction::None);
        let loss = |x: f64, t: f64| t * softplus(-x) + (1.0 - t) * softplus(x);
        let want = [[loss(2.0, 2.5), loss(-1.0, -1.0)], [sigmoid(2.0) - 2.5, sigmoid(-1.0) + 1.0], [-2.0, 1.0]];
        loss!("logits", logits.clone()).assert(&x, &t, want.each_ref().map(|w| &w[..]), F32)?;
    }
    Ok(())
}

/// Labels are smoothed once they were found to be 0 or 1.
#[test]
fn labels_are_checked_before_they_are_smoothed() -> Result<()> {
    for device in devices() {
        for smoothing in [0.1, 1.0] {
            let logits = || BceWithLogitsLoss::new().with_label_smoothing(smoothing).with_reduction(Reduction::None);
            let x = f32s(&[2.0, -1.0], &device)?;
            let checked = loss!("logits", logits().with_target_check(true));
            checked.assert_fails(&x, &Tensor::new(&[0u8, 255], &device)?, &["target 255 at element 1"]);
            let whole = loss!("logits", logits()).results(&x, &Tensor::new(&[0i64, 1], &device)?)?;
            let soft = loss!("logits", logits()).results(&x, &f32s(&[0.0, 1.0], &device)?)?;
            assert_eq!((whole.loss, whole.grad), (soft.loss, soft.grad));
        }
    }
    Ok(())
}

/// `target.ne(255)?` leaves out the elements of a void label, whose target nobody looks at.
#[test]
fn a_mask_of_1_counts() -> Result<()> {
    for device in devices() {
        let x = f32s(&[2.0, -1.0, 0.5], &device)?;
        let t = Tensor::new(&[1u8, 255, 0], &device)?;
        let want = (softplus(-2.0) + softplus(0.5)) / 2.0;
        assert!((want - 0.5505).abs() < 1e-4);
        for check in [false, true] {
            let loss = loss!("logits", BceWithLogitsLoss::new().with_mask(t.ne(255u8)?).with_target_check(check));
            loss.assert(&x, &t, [&[want], &[-sigmoid(-2.0) / 2.0, 0.0, sigmoid(0.5) / 2.0], &[]], F32)?;
            // the label that is left in is refused
            let wrong = loss!("logits", BceWithLogitsLoss::new().with_mask(t.eq(255u8)?).with_target_check(true));
            wrong.assert_fails(&x, &t, &["target 255 at element 1"]);
        }
    }
    Ok(())
}

/// A masked element does no harm, whatever it and its weights hold: not to its own gradients either.
#[test]
fn masked_elements_are_zeros_in_every_gradient() -> Result<()> {
    for (device, dtype) in devices().iter().flat_map(|d| FLOATS.map(|f| (d, f))) {
        // masked: a NaN and infinities in each operand, and one that would be refused if it were of integers
        let x = tensor(&[0.0, NAN, 0.5, INF, 0.5, 0.5, -INF], &[7], dtype, device)?;
        let t = tensor(&[1.0, 0.5, NAN, 0.0, 255.0, 0.5, 1.0], &[7], dtype, device)?;
        let weight = tensor(&[2.0, 1.0, 1.0, INF, 1.0, NAN, 1.0], &[7], dtype, device)?;
        let pos_weight = tensor(&[3.0, 1.0, 1.0, 1.0, NAN, INF, 1.0], &[7], dtype, device)?;
        let mask = tensor(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], &[7], DType::U8, device)?;
        let logits = || {
            let loss = BceWithLogitsLoss::new().with_weight(weight.clone()).with_pos_weight(pos_weight.clone());
            loss.with_mask(mask.clone())
        };
        let l1 = || L1Loss::new().with_weight(weight.clone()).with_mask(mask.clone());
        let with_zeros = |first: f64| [first, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        for reduction in REDUCTIONS {
            let each = |first: f64| if reduction == Reduction::None { with_zeros(first).to_vec() } else { vec![first] };
            let want = [each(6.0 * 2f64.ln()), with_zeros(-3.0).to_vec(), with_zeros(2.0 * 2.0 * 2f64.ln()).to_vec()];
            let relative = if arithmetic(dtype) == dtype { F32 } else { epsilon(dtype) };
            let loss = loss!("logits", logits().with_reduction(reduction));
            loss.assert(&x, &t, want.each_ref().map(|w| &w[..]), relative)?;
            let loss = loss!("l1", l1().with_reduction(reduction));
            loss.assert(&x, &t, [&each(2.0), &with_zeros(-2.0), &with_zeros(2.0)], relative)?;
        }
        // the mean of nothing
        let none = || mask.zeros_like();
        for loss in [loss!("logits", logits().with_mask(none()?)), loss!("l1", l1().with_mask(none()?))] {
            loss.assert(&x, &t, [&[NAN], &[0.0; 7], &[0.0; 7]], 0.0)?;
        }
    }
    Ok(())
}

// ---- 0 times infinity

/// Weights of 0 and infinity: a class without positives may weigh infinitely much, and what weighs nothing may be
/// infinitely wrong.
#[test]
fn nothing_times_infinity_is_nothing() -> Result<()> {
    for device in devices() {
        let none = Reduction::None;
        let x = f32s(&[1.0, -2.0, 0.0], &device)?;
        let t = Tensor::zeros(3, DType::U8, &device)?;
        let infinite = f32s(&[INF], &device)?;
        let want: Vec<_> = [1.0, -2.0, 0.0].iter().map(|&x| sigmoid(x) / 3.0).collect();
        let mean = [1.0, -2.0, 0.0].map(softplus).iter().sum::<f64>() / 3.0;
        assert!((mean - 0.7111).abs() < 1e-4);
        let logits = BceWithLogitsLoss::new;
        loss!("pos_weight", logits().with_pos_weight(infinite.clone())).assert(&x, &t, [&[mean], &want, &[]], F32)?;

        // right and wrong by infinity, and weights of 0; the target's gradient is the weight's too
        let zero = f32s(&[0.0], &device)?;
        let x = f32s(&[INF, -INF, INF], &device)?;
        let t = f32s(&[0.0, 1.0, 1.0], &device)?;
        let zeros = [[0.0; 3]; 3];
        let zeros = zeros.each_ref().map(|w| &w[..]);
        loss!("weight", logits().with_weight(zero.clone()).with_reduction(none)).assert(&x, &t, zeros, 0.0)?;
        loss!("mean", logits().with_weight(zero.clone())).assert(&x, &t, [&[0.0], zeros[1], zeros[2]], 0.0)?;
        let margin = MultiLabelSoftMarginLoss::new().with_weight(f32s(&[0.0; 3], &device)?);
        loss!("margin", margin.clone()).assert(&x, &t, [&[0.0], zeros[1], zeros[2]], 0.0)?;

        // the class of which alpha leaves nothing
        for gamma in [0.0, 0.5, 2.0] {
            let focal = |alpha| SigmoidFocalLoss::new().with_alpha(alpha).with_gamma(gamma).with_reduction(none);
            let (x, t) = (f32s(&[INF, -INF], &device)?, Tensor::new(&[0u8, 0], &device)?);
            loss!("alpha 1", focal(1.0)).assert(&x, &t, [&[0.0; 2], &[0.0; 2], &[]], 0.0)?;
            let (x, t) = (f32s(&[-INF, INF], &device)?, Tensor::new(&[1u8, 1], &device)?);
            loss!("alpha 0", focal(0.0)).assert(&x, &t, [&[0.0; 2], &[0.0; 2], &[]], 0.0)?;
        }

        // of a weight that is infinite and a loss that is 0
        let (x, t) = (f32s(&[-INF], &device)?, Tensor::new(&[0u8], &device)?);
        loss!("weight", logits().with_weight(infinite.clone())).assert(&x, &t, [&[0.0], &[0.0], &[]], 0.0)?;

        // nor is anything else where the weight is 0
        let (x, t) = (f32s(&[NAN, 1.0, INF], &device)?, f32s(&[0.0, NAN, -INF], &device)?);
        loss!("weight", logits().with_weight(zero.clone()).with_reduction(none)).assert(&x, &t, zeros, 0.0)?;

        // NaN is none of this
        let x = f32s(&[NAN, 1.0, 1.0], &device)?;
        let t = f32s(&[0.0, NAN, 0.0], &device)?;
        let weight = f32s(&[INF, 1.0, NAN], &device)?;
        let Results { loss, grad, .. } =
            loss!("NaN", logits().with_weight(weight.clone()).with_reduction(none)).results(&x, &t)?;
        assert!(loss.iter().chain(&grad).all(|v| v.is_nan()), "{loss:?} {grad:?}");
    }
    Ok(())
}

// ---- ends

/// `(x - t) / max(x (1 - x), 1e-12)` at the ends and next to them, and in the target the difference of the logarithms.
#[test]
fn bce_next_to_the_ends() -> Result<()> {
    for device in devices() {
        let points =
            [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1e-30, 0.0), (1e-30, 1.0), (1e-13, 0.25), (1e-6, 1.0)];
        let grad = |&(x, t): &(f64, f64)| (x - t) / (x * (1.0 - x)).max(1e-12);
        let logs = |x: f64| (x.ln().max(-100.0), (-x).ln_1p().max(-100.0));
        let loss = |&(x, t): &(f64, f64)| -(t * logs(x).0 + (1.0 - t) * logs(x).1);
        let target_grad = |&(x, _): &(f64, f64)| logs(x).1 - logs(x).0;
        for dtype in [DType::F32, DType::F64] {
            let x = tensor(&points.map(|p| p.0), &[points.len()], dtype, &device)?;
            let t = tensor(&points.map(|p| p.1), &[points.len()], dtype, &device)?;
            let bce = loss!("bce", BceLoss::new().with_reduction(Reduction::None));
            let want = [points.each_ref().map(loss), points.each_ref().map(grad), points.each_ref().map(target_grad)];
            // of an input that f32 holds with 24 bits
            bce.assert(&x, &t, want.each_ref().map(|w| &w[..]), 2.0 * F32)?;
            let sum = loss!("bce", BceLoss::new().with_reduction(Reduction::Sum));
            let t = Tensor::new(&[0u8, 1, 1, 0], &device)?;
            sum.assert(&x.narrow(0, 0, 4)?, &t, [&[200.0], &[0.0, 0.0, -1e12, 1e12], &[]], F32)?;
        }
    }
    Ok(())
}

/// An infinite logit's loss may be infinite; its gradient is not.
#[test]
fn focal_gradients_at_infinity_are_finite() -> Result<()> {
    for (device, dtype) in devices().iter().flat_map(|d| FLOATS.map(|f| (d, f))) {
        let x = tensor(&[INF, -INF, INF, -INF], &[4], dtype, device)?;
        let t = tensor(&[0.0, 1.0, 1.0, 0.0], &[4], DType::U8, device)?;
        for gamma in [0.0, 0.5, 1.0, 2.0, 3.0] {
            let focal = || SigmoidFocalLoss::new().with_gamma(gamma);
            let loss = loss!("focal", focal().with_reduction(Reduction::None));
            loss.assert(&x, &t, [&[INF, INF, 0.0, 0.0], &[0.75, -0.25, 0.0, 0.0], &[]], 0.0)?;
            let loss = loss!("focal", focal().with_reduction(Reduction::Sum));
            loss.assert(&x, &t, [&[INF], &[0.75, -0.25, 0.0, 0.0], &[]], 0.0)?;
        }
    }
    Ok(())
}

/// A float target of exactly 0 or 1 has the gradient of all others.
#[test]
fn target_gradients_of_hard_labels() -> Result<()> {
    for device in devices() {
        let (x, t) = ([2.0, -1.0, 0.5], [0.0, 1.0, 0.0]);
        let (logits, labels) = (f32s(&x, &device)?, f32s(&t, &device)?);
        let got = loss!("logits", BceWithLogitsLoss::new()).results(&logits, &labels)?;
        assert_near("logits", &got.target_grad, &x.map(|x| -x / 3.0), F32);
        let got = loss!("margin", MultiLabelSoftMarginLoss::new()).results(&logits, &labels)?;
        assert_near("margin", &got.target_grad, &x.map(|x| -x / 3.0), F32);
        // focal: of a u^gamma ce, ce' = -x, u' = 1 - 2 sigmoid(x), a' = 2 alpha - 1
        for gamma in [0.0, 0.5, 1.0, 2.0, 2.5] {
            let got = loss!("focal", SigmoidFocalLoss::new().with_gamma(gamma)).results(&logits, &labels)?.target_grad;
            assert_eq!(got.len(), x.len());
            for (i, got) in got.into_iter().enumerate() {
                let (x, t) = (x[i], t[i]);
                let u = t * sigmoid(-x) + (1.0 - t) * sigmoid(x);
                let ce = t * softplus(-x) + (1.0 - t) * softplus(x);
                let a = 0.25 * t + 0.75 * (1.0 - t);
                let terms = [-0.5 * ce, -a * x, a * gamma / u * (1.0 - 2.0 * sigmoid(x)) * ce];
                let terms = terms.map(|term| u.powf(gamma) * term / 3.0);
                // they cancel, at gamma 2 and -1 to a 150th, and each of them has its own error and the power's,
                // which the CPU keeps small
                let sizes = terms.iter().map(|term| term.abs()).sum::<f64>();
                let want = terms.iter().sum::<f64>();
                let most = if device.is_cpu() { 8.0 * F32 * want.abs() } else { f64::INFINITY };
                let bound = most.min(2.0 * F32 * sizes);
                assert!((got - want).abs() <= bound, "focal, gamma {gamma}[{i}]: got {got:e}, expected {want:e}");
            }
        }
        let (x, labels) = ([0.25, 0.75, 0.5], f32s(&[0.0, 1.0, 1.0], &device)?);
        let got = loss!("bce", BceLoss::new()).results(&f32s(&x, &device)?, &labels)?;
        assert_near("bce", &got.target_grad, &x.map(|x: f64| ((1.0 - x).ln() - x.ln()) / 3.0), F32);
    }
    Ok(())
}

/// Of no elements the mean is NaN, the sum 0, and the gradient has the input's shape.
#[test]
fn no_elements() -> Result<()> {
    for (device, reduction) in devices().iter().flat_map(|d| REDUCTIONS.map(|r| (d, r))) {
        let want = match reduction {
            Reduction::None => vec![],
            Reduction::Mean => vec![NAN],
            Reduction::Sum | Reduction::BatchMean => vec![0.0],
        };
        for (dtype, target) in [(DType::F32, DType::F32), (DType::F64, DType::U8), (DType::BF16, DType::F32)] {
            let empty = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, device);
            let mask = empty(&[1], DType::U8)?;
            let mut losses = vec![
                loss!("bce", BceLoss::new().with_reduction(reduction)),
                loss!("logits", BceWithLogitsLoss::new().with_mask(mask.clone()).with_reduction(reduction)),
                loss!("focal", SigmoidFocalLoss::new().with_reduction(reduction)),
                loss!("l1", L1Loss::new().with_reduction(reduction)),
            ];
            for dims in [&[0, 3][..], &[2, 3, 0]] {
                if dims == [0, 3] {
                    losses.push(loss!("margin", MultiLabelSoftMarginLoss::new().with_reduction(reduction)));
                } else {
                    losses.pop(); // it has to have classes
                }
                let (x, t) = (empty(dims, dtype)?, empty(dims, target)?);
                for loss in &losses {
                    let got = loss.results(&x, &t)?;
                    assert_near(loss.name, &got.loss, &want, 0.0);
                    assert_near(loss.name, &got.one_pass.0, &want, 0.0);
                    let gradients = [got.grad, got.target_grad, got.one_pass.1];
                    assert!(gradients.iter().all(|grad| grad.is_empty()), "{}", loss.name);
                    assert_eq!((loss.loss_and_grad)(&x, &t)?.1.dims(), dims, "{}", loss.name);
                }
            }
        }
    }
    Ok(())
}

// ---- gradients that are scaled

/// A scale multiplies the gradient of one pass before it is rounded, and nothing else.
#[test]
fn grad_scales() -> Result<()> {
    let scaled = |scale: f64, reduction: Reduction| {
        vec![
            loss!("bce", BceLoss::new().with_grad_scale(scale).with_reduction(reduction)),
            loss!("logits", BceWithLogitsLoss::new().with_grad_scale(scale).with_reduction(reduction)),
            loss!("margin", MultiLabelSoftMarginLoss::new().with_grad_scale(scale).with_reduction(reduction)),
            loss!("focal", SigmoidFocalLoss::new().with_grad_scale(scale).with_reduction(reduction)),
            loss!("l1", L1Loss::new().with_grad_scale(scale).with_reduction(reduction)),
        ]
    };
    for (device, dtype) in devices().iter().flat_map(|d| FLOATS.map(|f| (d, f))) {
        let mut random = Random::new(61);
        let x = tensor(&random.uniforms(60), &[6, 10], dtype, device)?.affine(0.9, 0.05)?;
        // of the input's dtype, and of another: dense kernels and the other ones
        for target in [dtype, DType::U8] {
            let t = tensor(&random.labels(60).iter().map(|t| t.round()).collect::<Vec<_>>(), &[6, 10], target, device)?;
            for reduction in REDUCTIONS {
                for (plain, scaled) in scaled(1.0, reduction).iter().zip(scaled(1024.0, reduction)) {
                    let (plain, scaled) = (plain.results(&x, &t)?, scaled.results(&x, &t)?);
                    assert_eq!((&plain.loss, &plain.one_pass.0), (&scaled.loss, &scaled.one_pass.0));
                    assert_eq!((&plain.grad, &plain.target_grad), (&scaled.grad, &scaled.target_grad));
                    // a power of two is exact, but for what underflows without it
                    let want: Vec<_> = plain.one_pass.1.iter().map(|g| 1024.0 * g).collect();
                    let relative = if dtype == DType::F16 { epsilon(dtype) } else { 0.0 };
                    assert_near("scaled", &scaled.one_pass.1, &want, relative);
                }
            }
        }
        // what underflows without a scale: half of f16's least number, and negative
        let n = 1 << 16;
        let (x, t) = (Tensor::zeros(n, dtype, device)?, Tensor::ones(n, dtype, device)?);
        let scale = -(n as f64);
        let l1 = L1Loss::new().with_weight(Tensor::full(2e-3f32, (), device)?).with_grad_scale(scale);
        let (_, grad) = l1.loss_and_grad(&x, &t)?;
        let want = tensor(&[2e-3f32 as f64], &[1], dtype, device)?;
        assert_eq!(bits(&grad.narrow(0, 0, 1)?)?, bits(&want)?, "{dtype:?}");
    }
    for device in devices() {
        let x = f32s(&[0.5, 0.5], &device)?;
        for (scale, shown) in [(NAN, "NaN"), (INF, "inf"), (-INF, "-inf")] {
            for loss in scaled(scale, Reduction::Mean) {
                loss.assert_fails(&x, &x, &["grad scale", shown, "finite"]);
            }
        }
    }
    Ok(())
}

/// The dtypes that a target and a mask may have are all named.
#[test]
fn dtypes_of_targets_and_masks() -> Result<()> {
    let device = Device::Cpu;
    let x = f32s(&[0.5, 0.5], &device)?;
    let odd = x.to_dtype(DType::F8E4M3)?;
    let expected = "of dtype F8E4M3, expected f16, bf16, f32, f64, u8, u32, i16, i32 or i64";
    let masked = || BceWithLogitsLoss::new().with_mask(odd.clone());
    loss!("mask", masked()).assert_fails(&x, &x, &["binary_cross_entropy_with_logits: mask", expected]);
    loss!("target", L1Loss::new()).assert_fails(&x, &odd, &["l1: target", expected]);
    Ok(())
}
