//! What holds for all inputs, on random ones; the same ones each time.

use crate::common::{
    FLOATS, REDUCTIONS, Random, arithmetic, assert_same_bits, compare, devices, epsilon, indices, tensor, values,
};
use crate::reference::Near;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss, Reduction, SigmoidFocalLoss,
    log_softmax, unfused,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A number of cases, the same in each run; fewer where a device in software may run them, which takes long.
pub fn config(cases: u32) -> ProptestConfig {
    let cases = if cfg!(feature = "cuda") { cases / 10 } else { cases };
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(2311), failure_persistence: None, ..ProptestConfig::default() }
}

/// A few rows of logits and their targets.
struct Batch {
    n: usize,
    classes: usize,
    x: Vec<f64>,
    t: Vec<i64>,
    soft: Vec<f64>,
    weight: Vec<f64>,
    random: Random,
}

impl Batch {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let n = 1 + random.below(20);
        let classes = match random.below(3) {
            0 => 1 + random.below(8),
            1 => 60 + random.below(10),
            _ => 100 + random.below(200),
        };
        let scale = random.pick(&[0.1, 1.0, 5.0]);
        let x = random.normals(n * classes, scale);
        let t = random.classes(n, classes);
        let soft = random.labels(n * classes);
        let weight = random.uniforms(classes).iter().map(|w| w + 0.1).collect();
        Batch { n, classes, x, t, soft, weight, random }
    }

    fn dims(&self) -> [usize; 2] {
        [self.n, self.classes]
    }

    fn logits(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        tensor(&self.x, &self.dims(), dtype, device)
    }

    fn target(&self, device: &Device) -> Result<Tensor> {
        indices(&self.t, &[self.n], DType::I64, device)
    }

    fn soft(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        tensor(&self.soft, &self.dims(), dtype, device)
    }

    /// Cross-entropy with random options that the unfused path has as well.
    fn options(&mut self, reduction: Reduction, device: &Device) -> Result<(CrossEntropyLoss, CrossEntropyLoss)> {
        let (mut fused, mut composed) = (CrossEntropyLoss::new(), CrossEntropyLoss::new().with_fused(false));
        (fused, composed) = (fused.with_reduction(reduction), composed.with_reduction(reduction));
        if self.random.below(2) == 0 {
            let weight = tensor(&self.weight, &[self.classes], self.random.pick(&FLOATS), device)?;
            (fused, composed) = (fused.with_weight(weight.clone()), composed.with_weight(weight));
        }
        if self.random.below(2) == 0 {
            let e = self.random.uniform();
            (fused, composed) = (fused.with_label_smoothing(e), composed.with_label_smoothing(e));
        }
        if self.random.below(3) == 0 {
            (fused, composed) = (fused.with_z_loss(0.01), composed.with_z_loss(0.01));
        }
        if self.random.below(3) == 0 {
            (fused, composed) = (fused.with_softcap(3.0), composed.with_softcap(3.0));
        }
        if self.random.below(3) == 0 {
            (fused, composed) = (fused.with_logit_scale(0.5), composed.with_logit_scale(0.5));
        }
        if self.random.below(3) == 0 {
            let mut weights: Vec<_> = self.random.uniforms(self.n).iter().map(|w| (w - 0.2).max(0.0)).collect();
            weights[0] = 0.5;
            let weights = tensor(&weights, &[self.n], self.random.pick(&FLOATS), device)?;
            (fused, composed) = (fused.with_row_weight(weights.clone()), composed.with_row_weight(weights));
        }
        if self.random.below(3) == 0 && reduction == Reduction::Mean {
            (fused, composed) = (fused.with_normalizer(11.0), composed.with_normalizer(11.0));
        }
        Ok((fused, composed))
    }
}

/// Loss and gradient through the graph.
fn through_graph(x: &Tensor, loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<(Tensor, Tensor)> {
    let x = Var::from_tensor(x)?;
    let loss = loss(&x)?;
    let grad = loss.backward()?.remove(&x).expect("a gradient");
    Ok((loss, grad))
}

/// Off by at most `relative` times the number or the largest of them, whichever is more.
fn assert_close(what: &str, got: &Tensor, want: &Tensor, relative: f64, arithmetic: DType) -> Result<()> {
    let want = values(want)?;
    let largest = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let slack = relative * largest / epsilon(arithmetic);
    let want: Vec<_> = want.iter().map(|&value| Near { value, slack }).collect();
    compare(what, got, &want, arithmetic)
}

fn check(body: impl Fn(&Device) -> Result<()>) {
    for device in devices() {
        body(&device).expect("a result");
    }
}

proptest! {
    #![proptest_config(config(300))]

    /// A number added to all logits of a row changes nothing; a power of two near the logits keeps them exact.
    #[test]
    fn shift_invariance(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            batch.x.iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0);
            let (x, t) = (batch.logits(DType::F64, device)?, batch.target(device)?);
            let loss = CrossEntropyLoss::new().with_label_smoothing(0.1);
            let (value, grad) = loss.loss_and_grad(&x, &t)?;
            for offset in [1024.0, -65536.0] {
                let (moved, moved_grad) = loss.loss_and_grad(&(&x + offset)?, &t)?;
                assert_same_bits("loss with an offset", &moved, &value)?;
                assert_same_bits("gradient with an offset", &moved_grad, &grad)?;
                let (moved, x) = (log_softmax(&(&x + offset)?, 1)?, log_softmax(&x, 1)?);
                assert_same_bits("log_softmax with an offset", &moved, &x)?;
            }
            Ok(())
        });
    }

    /// The gradient of a function that a shift does not change is orthogonal to the shift.
    #[test]
    fn gradient_rows_sum_to_zero(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            for dtype in [DType::F32, DType::F64] {
                let weight = tensor(&batch.weight, &[batch.classes], dtype, device)?;
                let e = batch.random.uniform();
                let loss = CrossEntropyLoss::new().with_reduction(Reduction::None);
                let loss = loss.with_weight(weight).with_label_smoothing(e);
                let x = batch.logits(dtype, device)?;
                for target in [batch.target(device)?, batch.soft(DType::F32, device)?] {
                    let grad = loss.loss_and_grad(&x, &target)?.1;
                    let size = values(&grad.abs()?.sum(1)?)?;
                    for (row, sum) in values(&grad.to_dtype(DType::F64)?.sum(1)?)?.iter().enumerate() {
                        let bound = 32.0 * epsilon(dtype) * (size[row] + batch.classes as f64);
                        assert!(sum.abs() <= bound, "row {row}: {sum:e} of {bound:e}");
                    }
                }
            }
            Ok(())
        });
    }

    /// The gradient is the slope of the loss, in f64.
    #[test]
    fn finite_differences(seed in any::<u64>()) {
        let mut batch = Batch::new(seed);
        batch.n = batch.n.min(3);
        let len = batch.n * batch.classes;
        batch.x.truncate(len);
        batch.soft.truncate(len);
        batch.t.truncate(batch.n);
        check(|device| {
            let mut batch = Batch {
                x: batch.x.clone(),
                soft: batch.soft.clone(),
                t: batch.t.clone(),
                weight: batch.weight.clone(),
                random: Random::new(seed),
                ..batch
            };
            let (ce, _) = batch.options(Reduction::Mean, device)?;
            let (t, soft) = (batch.target(device)?, batch.soft(DType::F64, device)?);
            let probabilities: Vec<_> = batch.x.iter().map(|x| 0.2 + 0.6 / (1.0 + x.exp())).collect();
            let weight = tensor(&batch.weight, &[batch.classes], DType::F64, device)?;
            let logits = BceWithLogitsLoss::new().with_pos_weight(weight.clone()).with_label_smoothing(0.1);
            let gamma = batch.random.pick(&[0.0, 0.5, 2.0]);
            let focal = SigmoidFocalLoss::new().with_gamma(gamma);
            let margin = MultiLabelSoftMarginLoss::new().with_weight(weight.clone());
            let bce = BceLoss::new().with_weight(weight.clone());
            type Loss<'a> = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor> + 'a>;
            let losses: [(&str, &[f64], &Tensor, Loss); 8] = [
                ("cross_entropy", &batch.x, &t, Box::new(|x, t| ce.forward(x, t))),
                ("cross_entropy of probabilities", &batch.x, &soft, Box::new(|x, t| ce.forward(x, t))),
                ("nll", &batch.x, &t, Box::new(|x, t| NllLoss::new().with_weight(weight.clone()).forward(x, t))),
                ("log_softmax", &batch.x, &soft, Box::new(|x, t| (log_softmax(x, 1)? * t)?.mean_all())),
                ("bce", &probabilities, &soft, Box::new(|x, t| bce.forward(x, t))),
                ("bce_with_logits", &batch.x, &soft, Box::new(|x, t| logits.forward(x, t))),
                ("multi_label_soft_margin", &batch.x, &soft, Box::new(|x, t| margin.forward(x, t))),
                ("sigmoid_focal", &batch.x, &soft, Box::new(|x, t| focal.forward(x, t))),
            ];
            for (name, x, t, loss) in &losses {
                let at = |x: &[f64], t: &Tensor| -> Result<f64> {
                    Ok(values(&loss(&tensor(x, &batch.dims(), DType::F64, device)?, t)?)?[0])
                };
                let x_var = Var::from_tensor(&tensor(x, &batch.dims(), DType::F64, device)?)?;
                let t_var = Var::from_tensor(&t.to_dtype(DType::F64)?)?;
                let tracks = t.dtype().is_float();
                let grads = loss(&x_var, if tracks { &t_var } else { t })?.backward()?;
                let grad = values(grads.get(&x_var).expect("a gradient"))?;
                let tolerance = |slope: f64, loss: f64| 1e-8 * (1.0 + slope.abs() + loss.abs());
                let loss_here = at(x, t)?;
                // a step at which the third derivative and the rounding of the loss cost about the same
                let h = 1e-5;
                for i in [0, x.len() / 2, x.len() - 1] {
                    let moved = |by: f64| { let mut x = x.to_vec(); x[i] += by; x };
                    let slope = (at(&moved(h), t)? - at(&moved(-h), t)?) / (2.0 * h);
                    let close = (grad[i] - slope).abs() <= tolerance(slope, loss_here);
                    assert!(close, "{name} at {i}: {} {slope}", grad[i]);
                    if tracks && *name != "log_softmax" {
                        let target_grad = values(grads.get(&t_var).expect("a gradient"))?[i];
                        let inner = |by: f64| { let mut t = batch.soft.clone(); t[i] = t[i].clamp(0.1, 0.9) + by; t };
                        let base = Var::from_tensor(&tensor(&inner(0.0), &batch.dims(), DType::F64, device)?)?;
                        let grads = loss(&x_var, &base)?.backward()?;
                        let grad = values(grads.get(&base).expect("a gradient"))?[i];
                        let moved = |by: f64| at(x, &tensor(&inner(by), &batch.dims(), DType::F64, device)?);
                        let slope = (moved(h)? - moved(-h)?) / (2.0 * h);
                        let close = (grad - slope).abs() <= tolerance(slope, loss_here);
                        assert!(close, "{name}, target at {i}: {grad} {slope}");
                        assert!(target_grad.is_finite());
                    }
                }
            }
            Ok(())
        });
    }

    /// The rows' losses add up to the sum, and the mean is the sum over the denominator.
    #[test]
    fn none_adds_up_to_the_sum(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            let dtype = batch.random.pick(&FLOATS);
            let (x, t, soft) = (batch.logits(dtype, device)?, batch.target(device)?, batch.soft(dtype, device)?);
            let (ce, _) = batch.options(Reduction::Sum, device)?;
            type Loss<'a> = Box<dyn Fn(Reduction) -> Result<Tensor> + 'a>;
            let losses: [(&str, Loss); 5] = [
                ("cross_entropy", Box::new(|r| ce.clone().with_reduction(r).forward(&x, &t))),
                ("cross_entropy of probabilities", Box::new(|r| ce.clone().with_reduction(r).forward(&x, &soft))),
                ("bce_with_logits", Box::new(|r| BceWithLogitsLoss::new().with_reduction(r).forward(&x, &soft))),
                ("margin", Box::new(|r| MultiLabelSoftMarginLoss::new().with_reduction(r).forward(&x, &soft))),
                ("focal", Box::new(|r| SigmoidFocalLoss::new().with_reduction(r).forward(&x, &soft))),
            ];
            for (name, loss) in &losses {
                let rows = values(&loss(Reduction::None)?)?;
                let (sum, total) = (values(&loss(Reduction::Sum)?)?[0], rows.iter().sum::<f64>());
                let bound = 64.0 * epsilon(arithmetic(dtype)) * rows.iter().map(|v| v.abs()).sum::<f64>();
                assert!((sum - total).abs() <= bound, "{name}: {sum} {total}");
            }
            Ok(())
        });
    }

    /// Rows know nothing of each other: in another order they have the same losses and gradients.
    #[test]
    fn permutation_of_rows(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            let dtype = batch.random.pick(&FLOATS);
            let (x, t, soft) = (batch.logits(dtype, device)?, batch.target(device)?, batch.soft(dtype, device)?);
            let mut order: Vec<_> = (0..batch.n as u32).collect();
            (1..batch.n).for_each(|i| order.swap(i, batch.random.below(i + 1)));
            let order = Tensor::new(order, device)?;
            let (ce, _) = batch.options(Reduction::None, device)?;
            let ce = ce.with_row_weight(Tensor::new(1f32, device)?);
            let permuted = |t: &Tensor| t.index_select(&order, 0);
            for target in [t, soft] {
                let (loss, grad) = ce.loss_and_grad(&x, &target)?;
                let (other_loss, other_grad) = ce.loss_and_grad(&permuted(&x)?, &permuted(&target)?)?;
                let (loss, grad) = (permuted(&loss)?, permuted(&grad)?);
                if device.is_cpu() {
                    assert_same_bits("loss", &other_loss, &loss)?;
                    assert_same_bits("gradient", &other_grad, &grad)?;
                } else {
                    // on CUDA a row's place decides how it is aligned, and with that the order of its sum
                    let largest = batch.x.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                    let relative = 64.0 * largest * epsilon(arithmetic(dtype));
                    assert_close("loss", &other_loss, &loss, relative, dtype)?;
                    assert_close("gradient", &other_grad, &grad, relative.max(epsilon(dtype)), dtype)?;
                }
            }
            Ok(())
        });
    }

    /// One pass computes what two compute, within a few roundings: exponentials that one pass shares, two make anew.
    #[test]
    fn one_pass_is_two_passes(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            let dtype = batch.random.pick(&FLOATS);
            let (x, t, soft) = (batch.logits(dtype, device)?, batch.target(device)?, batch.soft(dtype, device)?);
            // not divided by anything: the gradient is a difference of terms of size 1
            let (ce, _) = batch.options(Reduction::Sum, device)?;
            let reduction = batch.random.pick(&[Reduction::Mean, Reduction::Sum]);
            let nll = NllLoss::new().with_reduction(reduction);
            let logits = BceWithLogitsLoss::new().with_reduction(reduction);
            let margin = MultiLabelSoftMarginLoss::new().with_reduction(reduction);
            let focal = SigmoidFocalLoss::new().with_reduction(reduction);
            let bce = BceLoss::new().with_reduction(reduction);
            for (name, one, two) in [
                ("cross_entropy", ce.loss_and_grad(&x, &t)?, through_graph(&x, |x| ce.forward(x, &t))?),
                ("of probabilities", ce.loss_and_grad(&x, &soft)?, through_graph(&x, |x| ce.forward(x, &soft))?),
                ("nll", nll.loss_and_grad(&x, &t)?, through_graph(&x, |x| nll.forward(x, &t))?),
                ("bce", bce.loss_and_grad(&soft, &soft)?, through_graph(&soft, |x| bce.forward(x, &soft))?),
                ("logits", logits.loss_and_grad(&x, &soft)?, through_graph(&x, |x| logits.forward(x, &soft))?),
                ("margin", margin.loss_and_grad(&x, &soft)?, through_graph(&x, |x| margin.forward(x, &soft))?),
                ("focal", focal.loss_and_grad(&x, &soft)?, through_graph(&x, |x| focal.forward(x, &soft))?),
            ] {
                let relative = 16.0 * epsilon(arithmetic(dtype));
                assert_close(&format!("{name}: loss"), &one.0, &two.0, relative, arithmetic(dtype))?;
                // both are rounded to the dtype
                let terms = match name {
                    "cross_entropy" => 2.0,
                    "of probabilities" => batch.classes as f64,
                    _ => 0.0,
                };
                                let want = values(&two.1)?;
                let largest = want.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let slack = |v: f64| 16.0 * (terms + largest) + v.abs() * epsilon(dtype) / epsilon(arithmetic(dtype));
                let want: Vec<_> = want.iter().map(|&value| Near { value, slack: slack(value) }).collect();
                compare(&format!("{name}: gradient"), &one.1, &want, arithmetic(dtype))?;
            }
            Ok(())
        });
    }

    /// The fused losses against the composed ones, with random options.
    #[test]
    fn fused_is_unfused(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            // candle composes f64 on any device, and its f32 arithmetic rounds what the kernels keep
            for dtype in [DType::F32, DType::F64] {
                let (x, soft) = (batch.logits(dtype, device)?, batch.soft(dtype, device)?);
                let mut t = batch.t.clone();
                (1..batch.n).for_each(|i| t[i] = if batch.random.below(4) == 0 { -100 } else { t[i] });
                let t = indices(&t, &[batch.n], DType::I64, device)?;
                let reduction = batch.random.pick(&REDUCTIONS);
                let (ce, composed) = batch.options(reduction, device)?;
                let weight = tensor(&batch.weight, &[batch.classes], dtype, device)?;
                let (reduction, e) = (batch.random.pick(&REDUCTIONS), batch.random.uniform());
                let (alpha, gamma) = (batch.random.pick(&[0.25, -1.0]), batch.random.pick(&[0.0, 1.5, 2.0]));
                let p = tensor(&batch.random.uniforms(batch.x.len()), &batch.dims(), dtype, device)?;
                let p = p.affine(0.98, 0.01)?;
                let mask = batch.target(device)?.ge(1i64)?.unsqueeze(1)?;
                let counted = if values(&mask)?.iter().any(|&m| m > 0.0) { mask } else { mask.ones_like()? };
                let fused_logits = BceWithLogitsLoss::new()
                    .with_reduction(reduction)
                    .with_label_smoothing(e)
                    .with_pos_weight(weight.clone())
                    .with_mask(counted.clone());
                let composed_logits = BceWithLogitsLoss::new().with_fused(false)
                    .with_reduction(reduction)
                    .with_label_smoothing(e)
                    .with_pos_weight(weight.clone())
                    .with_mask(counted);
                let (margin, other_margin) = (
                    MultiLabelSoftMarginLoss::new().with_reduction(reduction).with_weight(weight.clone()),
                    MultiLabelSoftMarginLoss::new()
                        .with_fused(false)
                        .with_reduction(reduction)
                        .with_weight(weight.clone()),
                );
                let (focal, other_focal) = (
                    SigmoidFocalLoss::new().with_alpha(alpha).with_gamma(gamma).with_reduction(reduction),
                    SigmoidFocalLoss::new()
                        .with_fused(false)
                        .with_alpha(alpha)
                        .with_gamma(gamma)
                        .with_reduction(reduction),
                );
                let (bce, other_bce) = (
                    BceLoss::new().with_weight(weight.clone()).with_reduction(reduction),
                    BceLoss::new().with_fused(false).with_weight(weight.clone()).with_reduction(reduction),
                );
                let (nll, other_nll) = (
                    NllLoss::new().with_weight(weight.clone()).with_reduction(reduction),
                    NllLoss::new().with_fused(false).with_weight(weight.clone()).with_reduction(reduction),
                );
                // of one sign, so that their sum has the digits of its terms
                let log_p = x.abs()?.neg()?;
                // terms of the size of the largest logit are rounded several times
                let largest = batch.x.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
                let relative = 64.0 * largest * epsilon(dtype);
                for (name, got, want) in [
                    ("cross_entropy", ce.loss_and_grad(&x, &t)?, composed.loss_and_grad(&x, &t)?),
                    ("of probabilities", ce.loss_and_grad(&x, &soft)?, composed.loss_and_grad(&x, &soft)?),
                    ("nll", nll.loss_and_grad(&log_p, &t)?, other_nll.loss_and_grad(&log_p, &t)?),
                    ("bce", bce.loss_and_grad(&p, &soft)?, other_bce.loss_and_grad(&p, &soft)?),
                    ("logits", fused_logits.loss_and_grad(&x, &soft)?, composed_logits.loss_and_grad(&x, &soft)?),
                    ("margin", margin.loss_and_grad(&x, &soft)?, other_margin.loss_and_grad(&x, &soft)?),
                    ("focal", focal.loss_and_grad(&x, &soft)?, other_focal.loss_and_grad(&x, &soft)?),
                    (
                        "log_softmax",
                        through_graph(&x, |x| log_softmax(x, 1))?,
                        through_graph(&x, |x| unfused::log_softmax(x, 1))?,
                    ),
                ] {
                    assert_eq!(got.0.dims(), want.0.dims(), "{name}");
                    assert_close(&format!("{name} loss {dtype:?}"), &got.0, &want.0, relative, dtype)?;
                    // gradients are differences of terms of the size of the weights, or of a row's probabilities
                    let mass = if name == "of probabilities" { batch.classes as f64 } else { 1.0 };
                    let grad = values(&want.1)?;
                    let near = |&value: &f64| Near { value, slack: 64.0 * largest * (mass + value.abs()) };
                    let want: Vec<_> = grad.iter().map(near).collect();
                    compare(&format!("{name} gradient {dtype:?}"), &got.1, &want, dtype)?;
                }
            }
            Ok(())
        });
    }

    /// 16-bit logits give what the same numbers give in f32: the loss within a few roundings of f32, the gradient
    /// within these and its one rounding to 16 bits.
    #[test]
    fn sixteen_bits_are_rounded_once(seed in any::<u64>()) {
        check(|device| {
            let mut batch = Batch::new(seed);
            let reduction = batch.random.pick(&REDUCTIONS);
            let (ce, _) = batch.options(reduction, device)?;
            for dtype in [DType::F16, DType::BF16] {
                let (x, t) = (batch.logits(dtype, device)?, batch.target(device)?);
                let (loss, grad) = ce.loss_and_grad(&x, &t)?;
                let (wide, wide_grad) = ce.loss_and_grad(&x.to_dtype(DType::F32)?, &t)?;
                let relative = 16.0 * epsilon(DType::F32);
                assert_close("loss", &loss, &wide, relative, DType::F32)?;
                assert_close("gradient", &grad, &wide_grad, relative, DType::F32)?;
            }
            Ok(())
        });
    }
}
