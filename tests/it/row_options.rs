//! What the options of rows and the statistics beside a loss promise, each by name.

use super::losses::{ABSOLUTE, CrossEntropyLoss, LinearCrossEntropyLoss, NllLoss, Reduction, cross_entropy};
use crate::common::{FLOATS, REDUCTIONS, Random, bits, everywhere, indices, scalar, tensor, values};
use candle_core::{DType, Result, Tensor, Var};

/// The loss through the graph with its gradient, and in one pass.
type RowLoss<'a> = (&'a str, &'a dyn Fn(&Tensor) -> Result<Tensor>, &'a dyn Fn(&Tensor) -> Result<(Tensor, Tensor)>);

/// No gradient goes out of a mean whose targets all weigh 0, and what was added to it keeps its own.
#[test]
fn targets_that_weigh_nothing() -> Result<()> {
    everywhere(|device| {
        for dtype in FLOATS {
            let x = tensor(&[1.0, 2.0, 3.0, 0.5, -1.0, 2.0], &[2, 3], dtype, device)?;
            let t = indices(&[1, 1], &[2], DType::I64, device)?;
            let weight = tensor(&[1.0, 0.0, 1.0], &[3], DType::F32, device)?;
            let ce = CrossEntropyLoss::new().with_weight(weight.clone());
            let smooth = ce.clone().with_label_smoothing(0.1).with_z_loss(0.1);
            let nll = NllLoss::new().with_weight(weight.clone());
            let linear = LinearCrossEntropyLoss::new().with_weight(weight.clone());
            let identity = tensor(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], &[3, 3], dtype, device)?;
            let losses: [RowLoss; 4] = [
                ("cross-entropy", &|x| ce.forward(x, &t), &|x| ce.loss_and_grad(x, &t)),
                ("with options", &|x| smooth.forward(x, &t), &|x| smooth.loss_and_grad(x, &t)),
                ("nll", &|x| nll.forward(x, &t), &|x| nll.loss_and_grad(x, &t)),
                ("linear", &|x| linear.forward(x, &identity, None, &t), &|x| {
                    let (loss, grads) = linear.loss_and_grad(x, &identity, None, &t)?;
                    Ok((loss, grads.hidden))
                }),
            ];
            for (name, forward, loss_and_grad) in losses {
                let what = format!("{name}, {dtype:?}");
                let (loss, grad) = loss_and_grad(&x)?;
                assert!(!scalar(&loss)?.is_finite(), "{what}: a mean over nothing is {loss}");
                assert!(values(&grad)?.iter().all(|g| *g == 0.0), "{what}: {grad}");
                let head = Var::from_tensor(&x)?;
                let both = (forward(&head)?.to_dtype(DType::F32)? + head.to_dtype(DType::F32)?.sum_all()?)?;
                let grads = both.backward()?;
                assert_eq!(values(grads.get(&head).expect("a gradient"))?, [1.0; 6], "{what}: with another loss");
            }
            let in_place = x.copy()?;
            ce.loss_and_grad_inplace(&in_place, &t)?;
            assert!(values(&in_place)?.iter().all(|g| *g == 0.0), "in place, {dtype:?}: {in_place}");
            for loss in [ce.clone().with_reduction(Reduction::Sum), ce.clone().with_normalizer(2.0)] {
                let (loss, grad) = loss.loss_and_grad(&x, &t)?;
                assert_eq!((scalar(&loss)?, values(&grad)?.iter().any(|g| *g != 0.0)), (0.0, false), "{dtype:?}");
            }
        }
        Ok(())
    })
}

/// f16 holds nothing below 3e-8, which is more than most of the gradient of a mean over many rows.
#[test]
fn a_grad_scale_keeps_gradients_from_underflowing() -> Result<()> {
    const SCALE: f64 = 65536.0;
    everywhere(|device| {
        let mut random = Random::new(81);
        let x = tensor(&random.normals(64 * 9, 1.0), &[64, 9], DType::F16, device)?;
        let t = indices(&random.classes(64, 9), &[64], DType::U32, device)?;
        let identity = Tensor::eye(9, DType::F16, device)?;
        // as if there were 2^26 rows
        let rows = 1024.0 * SCALE;
        let ce = CrossEntropyLoss::new().with_normalizer(rows);
        let smooth = ce.clone().with_label_smoothing(0.1);
        let capped = ce.clone().with_softcap(20.0);
        let nll = NllLoss::new().with_normalizer(rows);
        let linear = LinearCrossEntropyLoss::new().with_normalizer(rows);
        type Scaled<'a> = (&'a str, &'a dyn Fn(&Tensor, f64) -> Result<(Tensor, Tensor)>);
        let losses: [Scaled; 6] = [
            ("cross-entropy", &|x, scale| ce.clone().with_grad_scale(scale).loss_and_grad(x, &t)),
            ("smoothed", &|x, scale| smooth.clone().with_grad_scale(scale).loss_and_grad(x, &t)),
            ("capped", &|x, scale| capped.clone().with_grad_scale(scale).loss_and_grad(x, &t)),
            ("in place", &|x, scale| {
                let x = x.copy()?;
                let loss = ce.clone().with_grad_scale(scale).loss_and_grad_inplace(&x, &t)?;
                Ok((loss, x))
            }),
            ("nll", &|x, scale| nll.clone().with_grad_scale(scale).loss_and_grad(x, &t)),
            ("linear", &|x, scale| {
                let loss = linear.clone().with_grad_scale(scale);
                let (loss, grads) = loss.loss_and_grad(x, &identity.to_dtype(x.dtype())?, None, &t)?;
                Ok((loss, grads.hidden))
            }),
        ];
        for (name, loss_and_grad) in losses {
            let (plain, underflown) = loss_and_grad(&x, 1.0)?;
            assert!(values(&underflown)?.iter().all(|g| g.abs() < 1e-7), "{name}");
            let (loss, grad) = loss_and_grad(&x, SCALE)?;
            assert_eq!(bits(&loss)?, bits(&plain)?, "{name}: the loss is as it was");
            let (_, exact) = loss_and_grad(&x.to_dtype(DType::F64)?, SCALE)?;
            // one rounding to f16, which has a spacing of 6e-8 below 2^-14
            for (got, want) in values(&grad)?.into_iter().zip(values(&exact)?) {
                let tolerance = want.abs() * 2f64.powi(-10) + 2f64.powi(-24);
                assert!((got - want).abs() <= tolerance, "{name}: got {got:e}, expected {want:e}");
            }
        }
        Ok(())
    })
}

#[test]
fn classes_along_any_axis() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(82);
        for dtype in [DType::F32, DType::BF16] {
            let x = tensor(&random.normals(70, 2.0), &[2, 5, 7], dtype, device)?;
            let t = indices(&random.classes(10, 7), &[2, 5], DType::I16, device)?;
            let soft = tensor(&random.uniforms(70), &[2, 5, 7], DType::F32, device)?;
            let swapped = x.transpose(1, 2)?;
            for reduction in REDUCTIONS {
                let ce = CrossEntropyLoss::new().with_reduction(reduction).with_label_smoothing(0.1);
                let nll = NllLoss::new().with_reduction(reduction);
                for axis in [2, -1] {
                    let at = ce.clone().with_class_axis(axis);
                    let pairs = [
                        (at.loss_and_grad(&x, &t)?, ce.loss_and_grad(&swapped, &t)?),
                        (at.loss_and_grad(&x, &soft)?, ce.loss_and_grad(&swapped, &soft.transpose(1, 2)?)?),
                        (nll.clone().with_class_axis(axis).loss_and_grad(&x, &t)?, nll.loss_and_grad(&swapped, &t)?),
                    ];
                    for ((loss, grad), (want, want_grad)) in pairs {
                        assert_eq!((loss.dims(), bits(&loss)?), (want.dims(), bits(&want)?));
                        assert_eq!(grad.dims(), x.dims());
                        assert_eq!(bits(&grad)?, bits(&want_grad.transpose(1, 2)?)?);
                    }
                    let tracked = Var::from_tensor(&x)?;
                    let grads = at.forward(&tracked, &t)?.sum_all()?.backward()?;
                    assert_eq!(grads.get(&tracked).expect("a gradient").dims(), x.dims());
                    assert_eq!(at.statistics(&x, &t)?.argmax.dims(), t.dims());
                    let in_place = x.copy()?;
                    at.loss_and_grad_inplace(&in_place, &t)?;
                    assert_eq!(bits(&in_place)?, bits(&at.loss_and_grad(&x, &t)?.1)?);
                }
            }
            let one = tensor(&random.normals(7, 1.0), &[7], dtype, device)?;
            let class = indices(&[3], &[], DType::U8, device)?;
            let (got, want) = (
                CrossEntropyLoss::new().with_class_axis(0).forward(&one, &class)?,
                CrossEntropyLoss::new().forward(&one, &class)?,
            );
            assert_eq!(bits(&got)?, bits(&want)?);
            // the logits of a linear layer have their classes last
            let head = tensor(&random.normals(21, 1.0), &[3, 7], dtype, device)?;
            let (t, linear) =
                (indices(&random.classes(10, 3), &[2, 5], DType::U32, device)?, LinearCrossEntropyLoss::new());
            let want = linear.forward(&x, &head, None, &t)?;
            for axis in [-1, 2] {
                assert_eq!(bits(&linear.clone().with_class_axis(axis).forward(&x, &head, None, &t)?)?, bits(&want)?);
            }
            let error = linear.with_class_axis(1).forward(&x, &head, None, &t).unwrap_err().to_string();
            assert!(error.contains("class axis 1, expected -1"), "{error}");
        }
        Ok(())
    })
}

/// What is right adds up, beyond what a byte holds, and ignored rows are not in the share.
#[test]
fn accuracy_of_many_rows() -> Result<()> {
    everywhere(|device| {
        let x = tensor(&[2.0, 1.0].repeat(1000), &[1000, 2], DType::F32, device)?;
        let rows = CrossEntropyLoss::new().statistics(&x, &Tensor::zeros(1000, DType::U32, device)?)?;
        assert_eq!(scalar(&rows.correct.sum_all()?)?, 1000.0);
        assert_eq!(scalar(&rows.correct.mean_all()?)?, 1.0);
        assert_eq!((scalar(&rows.accuracy()?)?, rows.counted.dtype()), (1.0, DType::F32));
        // a quarter wrong, and half of all rows ignored
        let target: Vec<_> = (0..1000).map(|row| if row % 2 == 1 { -100 } else { (row % 8 == 0) as i64 }).collect();
        let rows = CrossEntropyLoss::new().statistics(&x, &indices(&target, &[1000], DType::I16, device)?)?;
        assert_eq!((scalar(&rows.counted.sum_all()?)?, scalar(&rows.accuracy()?)?), (500.0, 0.75));
        let nothing = CrossEntropyLoss::new().with_ignore_index(0);
        let rows = nothing.statistics(&x, &Tensor::zeros(1000, DType::U32, device)?)?;
        assert!(scalar(&rows.accuracy()?)?.is_nan());
        Ok(())
    })
}

/// A loss beside its statistics is the loss, with the gradient, and the statistics are those without a graph.
#[test]
fn losses_beside_statistics() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(83);
        for (dtype, reduction) in FLOATS.into_iter().flat_map(|d| REDUCTIONS.map(|r| (d, r))) {
            let x = Var::from_tensor(&tensor(&random.normals(60, 2.0), &[12, 5], dtype, device)?)?;
            let head = tensor(&random.normals(25, 1.0), &[5, 5], dtype, device)?;
            let target: Vec<_> = (0..12).map(|row| if row % 3 == 1 { -100 } else { row % 5 }).collect();
            let t = indices(&target, &[12], DType::I32, device)?;
            let ce = CrossEntropyLoss::new().with_reduction(reduction).with_logit_scale(0.7).with_z_loss(0.01);
            let linear = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(5).with_z_loss(0.01);
            // what two kernels may differ by, and two sums of 16-bit products
            let relative = match dtype {
                DType::F64 => 1e-12,
                DType::F32 => 1e-5,
                DType::F16 => 4e-3,
                _ => 3e-2,
            };
            let near = |what: &str, got: &Tensor, want: &Tensor| -> Result<()> {
                let (got, want) = (values(got)?, values(want)?);
                let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
                let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off <= relative * largest, "{what}, {dtype:?} {reduction:?}: off by {off:e} of {largest:e}");
                Ok(())
            };
            let gradient = |loss: &Tensor| -> Result<Tensor> {
                let grads = loss.sum_all()?.backward()?;
                Ok(grads.get(&x).expect("a gradient").clone())
            };
            let (loss, rows) = ce.forward_with_statistics(&x, &t)?;
            let want = ce.forward(&x, &t)?;
            near("loss", &loss, &want)?;
            near("gradient", &gradient(&loss)?, &gradient(&want)?)?;
            let alone = ce.statistics(&x, &t)?;
            assert_eq!(bits(&rows.entropy)?, bits(&alone.entropy)?);
            assert!(!rows.lse.track_op() && rows.counted.dims() == [12]);
            let counted = |row: usize| (row % 3 != 1) as u8 as f64;
            assert_eq!(values(&rows.counted)?, (0..12).map(counted).collect::<Vec<_>>());

            let (loss, rows) = linear.forward_with_statistics(&x, &head, None, &t)?;
            let want = linear.forward(&x, &head, None, &t)?;
            near("linear loss", &loss, &want)?;
            near("linear gradient", &gradient(&loss)?, &gradient(&want)?)?;
            let logits = x.as_detached_tensor().matmul(&head.t()?)?;
            let plain = CrossEntropyLoss::new().with_z_loss(0.01).statistics(&logits, &t)?;
            for (name, got, want) in [
                ("row loss", &rows.loss, &plain.loss),
                ("lse", &rows.lse, &plain.lse),
                ("z-loss", &rows.z_loss, &plain.z_loss),
                ("entropy", &rows.entropy, &plain.entropy),
                ("counted", &rows.counted, &plain.counted),
            ] {
                assert_eq!(got.dtype(), want.dtype(), "{name}");
                near(name, got, want)?;
            }
            if matches!(dtype, DType::F32 | DType::F64) {
                assert_eq!(values(&rows.correct)?, values(&plain.correct)?);
                let argmax = (plain.argmax * plain.counted.to_dtype(DType::U32)?)?;
                assert_eq!(values(&rows.argmax)?, values(&argmax)?, "no prediction of an ignored row");
            }
        }
        // no row counts
        let x = Tensor::zeros((2, 3), DType::F32, device)?;
        let t = indices(&[-100, -100], &[2], DType::I64, device)?;
        let (loss, rows) = LinearCrossEntropyLoss::new().forward_with_statistics(&x, &x, None, &t)?;
        assert!(scalar(&loss)?.is_nan() && rows.argmax.dims() == [2] && values(&rows.counted)? == [0.0, 0.0]);
        Ok(())
    })
}

/// The gradient of one pass, brought into the graph of what made the logits.
#[test]
fn a_gradient_of_one_pass_in_a_graph() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(84);
        let w = Var::from_tensor(&tensor(&random.normals(12, 1.0), &[3, 4], DType::F32, device)?)?;
        let x = tensor(&random.normals(15, 1.0), &[5, 3], DType::F32, device)?;
        let t = indices(&random.classes(5, 4), &[5], DType::U32, device)?;
        let z = x.matmul(&w)?;
        let (_, grad) = CrossEntropyLoss::new().loss_and_grad(&z.detach(), &t)?;
        let got = (&z * grad)?.sum_all()?.backward()?;
        let want = cross_entropy(&z, &t)?.backward()?;
        let of = |grads: &candle_core::backprop::GradStore| values(grads.get(&w).expect("a gradient"));
        for (got, want) in of(&got)?.into_iter().zip(of(&want)?) {
            // sums of 5 products in f32
            assert!((got - want).abs() <= 1e-5 * want.abs() + ABSOLUTE * 1e-7, "got {got}, expected {want}");
        }
        Ok(())
    })
}
