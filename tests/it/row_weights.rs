//! Weights of rows, normalizers, counts and row transforms: what they promise, each by name.

use super::losses::{ABSOLUTE, CrossEntropyLoss, FUSED, LinearCrossEntropyLoss, NllLoss, Reduction};
use crate::common::{
    FLOATS, REDUCTIONS, Random, arithmetic, assert_same_bits, cases, epsilon, everywhere, indices, scalar, tensor,
    values,
};
use candle_core::{DType, Result, Tensor, Var};
use candle_fused_loss::{Normalizer, RowTransform};

/// What a mask takes out is what an ignored row is: to the bit, on every way to a loss, whatever is there.
#[test]
fn a_weight_of_0_hides_everything() -> Result<()> {
    let classes = 7;
    everywhere(|device| {
        let mut random = Random::new(101);
        for (dtype, rows) in
            cases(device, FUSED, FLOATS.into_iter().flat_map(|d| [vec![6], vec![2, 3]].map(|r| (d, r))))
        {
            let dims = [&rows[..1], &[classes], &rows[1..]].concat();
            let hidden = [1, 3, 4];
            let per_row = |row: usize| hidden.contains(&row);
            let inner: usize = rows[1..].iter().product();
            let row_of = |element: usize| element / (classes * inner) * inner + element % inner;
            let clean = random.normals(6 * classes, 2.0);
            let dirty = |values: &[f64], wrong: &[f64]| -> Vec<f64> {
                let wrong = |i: usize| wrong[i % wrong.len()];
                values.iter().enumerate().map(|(i, &v)| if per_row(row_of(i)) { wrong(i) } else { v }).collect()
            };
            let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
            let x = tensor(&dirty(&clean, &wrong), &dims, dtype, device)?;
            let clean = tensor(&dirty(&clean, &[0.0]), &dims, dtype, device)?;
            let target = random.classes(6, classes);
            let replaced = |with: [i64; 3]| -> Result<Tensor> {
                let mut target = target.clone();
                hidden.into_iter().zip(with).for_each(|(row, class)| target[row] = class);
                indices(&target, &rows, DType::I64, device)
            };
            let (bad, ignored) = (replaced([1000, -7, 1 << 40])?, replaced([-100; 3])?);
            let mask: Vec<_> = (0..6).map(|row| !per_row(row) as u8 as f64).collect();
            for of_weights in [DType::U8, DType::F32, DType::F16] {
                let mask = tensor(&mask, &rows, of_weights, device)?;
                for reduction in REDUCTIONS {
                    let what = format!("{dtype:?} {rows:?} {of_weights:?} {reduction:?}");
                    let ce = CrossEntropyLoss::new().with_reduction(reduction).with_target_check(true);
                    let smooth = ce.clone().with_label_smoothing(0.1).with_z_loss(0.01).with_softcap(9.0);
                    let focal = ce.clone().with_row_transform(RowTransform::Focal { gamma: 1.5 });
                    for loss in [ce, smooth, focal] {
                        let weighing = loss.clone().with_row_weight(mask.clone());
                        let got = all_ways(&weighing, &x, &bad, f64::NAN, &mask)?;
                        let want = all_ways(&loss, &clean, &ignored, 1.0, &mask)?;
                        for ((name, got), (_, want)) in got.iter().zip(&want) {
                            assert_same_bits(&format!("{what}: {name}"), got, want)?;
                        }
                    }
                    let nll = NllLoss::new().with_reduction(reduction).with_target_check(true);
                    let (loss, grad) = nll.clone().with_row_weight(mask.clone()).loss_and_grad(&x, &bad)?;
                    let (want, want_grad) = nll.loss_and_grad(&clean, &ignored)?;
                    assert_same_bits(&format!("{what}: nll"), &loss, &want)?;
                    assert_same_bits(&format!("{what}: nll's gradient"), &grad, &want_grad)?;
                }
            }
            // probabilities, and their gradient
            let soft = random.uniforms(6 * classes);
            let wrong_soft = tensor(&dirty(&soft, &wrong), &dims, dtype, device)?;
            let soft = tensor(&dirty(&soft, &[0.0]), &dims, dtype, device)?;
            let mask = tensor(&mask, &rows, DType::U8, device)?;
            for reduction in REDUCTIONS {
                let loss = CrossEntropyLoss::new().with_reduction(reduction).with_label_smoothing(0.1);
                let loss = loss.with_row_weight(mask.clone());
                let got = all_ways(&loss, &x, &wrong_soft, f64::NAN, &mask)?;
                let want = all_ways(&loss, &clean, &soft, 1.0, &mask)?;
                for ((name, got), (_, want)) in got.iter().zip(&want) {
                    assert_same_bits(&format!("probabilities, {dtype:?} {rows:?} {reduction:?}: {name}"), got, want)?;
                }
            }
        }
        Ok(())
    })
}

/// The results of every way to a loss. `hidden` is the upstream gradient of rows that the mask takes out.
fn all_ways(
    loss: &candle_fused_loss::CrossEntropyLoss,
    x: &Tensor,
    target: &Tensor,
    hidden: f64,
    mask: &Tensor,
) -> Result<Vec<(&'static str, Tensor)>> {
    let (tracked, target_var) = (Var::from_tensor(x)?, Var::from_tensor(target)?);
    let target = if target.dtype().is_float() { target_var.as_tensor() } else { target };
    let forward = loss.forward(&tracked, target)?;
    let upstream = match forward.rank() {
        0 => forward.ones_like()?,
        _ => {
            let ones = forward.ones_like()?;
            mask.ne(0f64)?.where_cond(&ones, &(ones.affine(0.0, hidden)?))?
        }
    };
    let grads = (&forward * upstream)?.sum_all()?.backward()?;
    let grad = |of: &Tensor| grads.get(of).cloned().expect("a gradient");
    let mut all = vec![("forward", forward.detach()), ("gradient", grad(&tracked))];
    if target.dtype().is_float() {
        all.push(("the target's gradient", grad(target)));
    }
    let (value, in_one_pass) = loss.loss_and_grad(x, target)?;
    let in_place = x.copy()?.contiguous()?;
    let value_in_place = loss.loss_and_grad_inplace(&in_place, &target.detach().copy()?)?;
    all.extend([
        ("loss", value),
        ("its gradient", in_one_pass),
        ("in place", value_in_place),
        ("the logits", in_place),
    ]);
    let (value, rows) = loss.forward_with_statistics(x, target)?;
    // argmax is of the logits as they are
    all.extend([("beside statistics", value), ("losses", rows.loss), ("lse", rows.lse), ("z-loss", rows.z_loss)]);
    all.extend([("entropy", rows.entropy), ("correct", rows.correct), ("counted", rows.counted)]);
    Ok(all)
}

/// Weights of 1, of any dtype and shape, are no weights.
#[test]
fn weights_of_1_change_no_bit() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(102);
        for (dtype, dims) in
            cases(device, FUSED, FLOATS.into_iter().flat_map(|d| [[4, 9, 3], [2, 70, 1]].map(|s| (d, s))))
        {
            let x = tensor(&random.normals(dims.iter().product(), 2.0), &dims, dtype, device)?;
            let t = indices(&random.classes(dims[0] * dims[2], 9), &[dims[0], dims[2]], DType::I32, device)?;
            let soft = tensor(&random.uniforms(x.elem_count()), &dims, dtype, device)?;
            let ones = |dims: &[usize], dtype: DType| Tensor::ones(dims, dtype, device);
            let weights = [
                ones(&[dims[0], dims[2]], DType::F32)?,
                ones(&[dims[0], 1], DType::U8)?,
                ones(&[], DType::BF16)?,
                (ones(&[dims[2]], DType::U8)? * 200.0)?,
                ones(&[dims[2], dims[0]], DType::F64)?.t()?,
            ];
            for reduction in REDUCTIONS {
                let ce = CrossEntropyLoss::new().with_reduction(reduction);
                let smooth = ce.clone().with_label_smoothing(0.1).with_z_loss(0.01).with_logit_scale(0.5);
                let nll = NllLoss::new().with_reduction(reduction);
                for weight in &weights {
                    for (loss, target) in [(&ce, &t), (&smooth, &t), (&ce, &soft), (&smooth, &soft)] {
                        let (got, got_grad) = loss.clone().with_row_weight(weight.clone()).loss_and_grad(&x, target)?;
                        let (want, want_grad) = loss.loss_and_grad(&x, target)?;
                        assert_same_bits("loss", &got, &want)?;
                        assert_same_bits("gradient", &got_grad, &want_grad)?;
                    }
                    let (got, got_grad) = nll.clone().with_row_weight(weight.clone()).loss_and_grad(&x, &t)?;
                    let (want, want_grad) = nll.loss_and_grad(&x, &t)?;
                    assert_same_bits("nll", &got, &want)?;
                    assert_same_bits("nll's gradient", &got_grad, &want_grad)?;
                }
            }
        }
        Ok(())
    })
}

/// Weights with any strides give the bits of contiguous ones of the rows' shape.
#[test]
fn row_weights_of_any_layout() -> Result<()> {
    type View = fn(&Tensor) -> Result<Tensor>;
    let rows = [3, 2, 4];
    let layouts: [(&[usize], View); 6] = [
        (&[4], |w| Ok(w.clone())),
        (&[2, 1], |w| Ok(w.clone())),
        (&[3, 1, 1], |w| Ok(w.clone())),
        (&[4, 3, 2], |w| w.permute((1, 2, 0))),
        (&[3, 2, 9], |w| w.narrow(2, 3, 4)),
        (&[2, 3, 4], |w| w.transpose(0, 1)),
    ];
    everywhere(|device| {
        let mut random = Random::new(103);
        let x = tensor(&random.normals(24 * 5, 2.0), &[3, 5, 2, 4], DType::F32, device)?;
        let t = indices(&random.classes(24, 5), &rows, DType::U8, device)?;
        for (stored, view) in layouts {
            for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64, DType::U8] {
                let weights: Vec<_> = random.uniforms(stored.iter().product()).iter().map(|w| w * 3.0).collect();
                let strided = view(&tensor(&weights, stored, DType::F64, device)?.to_dtype(dtype)?)?;
                let contiguous = strided.broadcast_as(&rows)?.contiguous()?;
                let ce = |w: &Tensor| CrossEntropyLoss::new().with_z_loss(0.1).with_row_weight(w.clone());
                let (got, want) = (ce(&strided).loss_and_grad(&x, &t)?, ce(&contiguous).loss_and_grad(&x, &t)?);
                assert_same_bits(&format!("loss, {stored:?} {dtype:?}"), &got.0, &want.0)?;
                assert_same_bits(&format!("gradient, {stored:?} {dtype:?}"), &got.1, &want.1)?;
                let nll = |w: &Tensor| NllLoss::new().with_row_weight(w.clone());
                let (got, want) = (nll(&strided).loss_and_grad(&x, &t)?, nll(&contiguous).loss_and_grad(&x, &t)?);
                assert_same_bits(&format!("nll's gradient, {stored:?} {dtype:?}"), &got.1, &want.1)?;
            }
        }
        Ok(())
    })
}

/// How far two ways to a number may be apart: two kernels, or a product of 16-bit numbers and its rounding.
fn relative(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

fn assert_near(what: &str, got: &Tensor, want: &Tensor, relative: f64) -> Result<()> {
    let (got, want) = (values(got)?, values(want)?);
    let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let off = (got - want).abs();
        assert!(off <= relative * largest, "{what}[{i}]: got {got:e}, expected {want:e} of {largest:e}");
    }
    Ok(())
}

/// The linear loss is cross-entropy of its logits with these options too, in chunks of any size.
#[test]
fn linear_losses_weigh_and_transform_rows() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(104);
        for dtype in cases(device, FUSED, FLOATS) {
            let (features, classes) = (5, 11);
            let mut hidden = random.normals(12 * features, 1.0);
            let head = Var::from_tensor(&tensor(
                &random.normals(classes * features, 1.0),
                &[classes, features],
                dtype,
                device,
            )?)?;
            let class_weight = tensor(&random.uniforms(classes), &[classes], DType::F32, device)?;
            let mut target = random.classes(12, classes);
            let weight: Vec<_> = (0..12).map(|row| if row % 4 == 1 { 0.0 } else { 0.5 + random.uniform() }).collect();
            for row in [1, 5, 9] {
                hidden[row * features..(row + 1) * features].fill(f64::NAN);
                target[row] = 99;
            }
            target[3] = -100;
            let x = Var::from_tensor(&tensor(&hidden, &[3, 4, features], dtype, device)?)?;
            let t = indices(&target, &[3, 4], DType::I64, device)?;
            let weight = tensor(&weight, &[3, 4], DType::F32, device)?;
            for reduction in REDUCTIONS {
                for (transform, chunk) in [
                    (None, 100),
                    (None, 5),
                    (Some(RowTransform::Focal { gamma: 2.0 }), 4),
                    (Some(RowTransform::Dft), 100),
                ] {
                    let mut linear = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(chunk);
                    let mut ce = CrossEntropyLoss::new().with_reduction(reduction).with_class_axis(-1);
                    linear = linear.with_row_weight(weight.clone()).with_weight(class_weight.clone()).with_z_loss(0.01);
                    ce = ce.with_row_weight(weight.clone()).with_weight(class_weight.clone()).with_z_loss(0.01);
                    if let Some(transform) = transform {
                        (linear, ce) = (linear.with_row_transform(transform), ce.with_row_transform(transform));
                    }
                    let what = format!("{dtype:?} {reduction:?} {transform:?} {chunk}");
                    let loss = linear.forward(&x, &head, None, &t)?;
                    let upstream =
                        tensor(&random.normals(loss.elem_count(), 1.0), loss.dims(), arithmetic(dtype), device)?;
                    let through = |loss: &Tensor| (loss * &upstream)?.sum_all()?.backward();
                    let grads = through(&loss)?;
                    // 0 in place of NaN: the reference multiplies every row
                    let counted = weight.ne(0f64)?.unsqueeze(2)?.broadcast_as(x.shape())?;
                    let clean = Var::from_tensor(&counted.where_cond(&x, &x.zeros_like()?)?.to_dtype(DType::F64)?)?;
                    let wide = Var::from_tensor(&head.to_dtype(DType::F64)?)?;
                    let logits = clean.flatten_to(1)?.matmul(&wide.t()?)?.reshape((3, 4, classes))?;
                    let want = ce.forward(&logits, &t)?;
                    assert_near(&what, &loss, &want, relative(dtype))?;
                    let want = (&want * &upstream.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
                    let grad = |of: &candle_core::backprop::GradStore, t: &Var| of.get(t).cloned().expect("a gradient");
                    assert_near(&format!("{what}, hidden"), &grad(&grads, &x), &grad(&want, &clean), relative(dtype))?;
                    assert_near(&format!("{what}, head"), &grad(&grads, &head), &grad(&want, &wide), relative(dtype))?;
                    let (alone, alone_grads) = linear.loss_and_grad(&x, &head, None, &t)?;
                    assert_near(&format!("{what}, alone"), &alone, &loss, relative(dtype))?;
                    assert!(values(&alone_grads.weight)?.iter().all(|g| g.is_finite()), "{what}");
                    let (beside, rows) = linear.forward_with_statistics(&x, &head, None, &t)?;
                    assert_near(&format!("{what}, beside statistics"), &beside, &loss, relative(dtype))?;
                    let counted: Vec<_> = (0..12).map(|row| (row % 4 != 1 && row != 3) as u8 as f64).collect();
                    assert_eq!(values(&rows.counted)?, counted, "{what}");
                }
            }
        }
        Ok(())
    })
}

/// A number on the device divides as the same number on the host does, whatever its dtype.
#[test]
fn normalizers_are_numbers_or_tensors() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(105);
        let x = tensor(&random.normals(40, 1.0), &[8, 5], DType::F32, device)?;
        let t = indices(&random.classes(8, 5), &[8], DType::U32, device)?;
        let head = tensor(&random.normals(15, 1.0), &[3, 5], DType::F32, device)?;
        let few = indices(&random.classes(8, 3), &[8], DType::U32, device)?;
        for dtype in [DType::F64, DType::F32, DType::F16, DType::U32, DType::I64, DType::I32, DType::U8] {
            let seven = indices(&[7], &[], DType::I64, device)?.to_dtype(DType::F32)?;
            let seven = match dtype {
                DType::I32 => indices(&[7], &[1], DType::I32, device)?,
                dtype => seven.to_dtype(dtype)?,
            };
            let by = |normalizer: Normalizer| -> Result<_> {
                let ce = CrossEntropyLoss::new().with_normalizer(normalizer.clone());
                let nll = NllLoss::new().with_normalizer(normalizer.clone());
                let linear = LinearCrossEntropyLoss::new().with_normalizer(normalizer);
                let tracked = Var::from_tensor(&x)?;
                let forward = ce.forward(&tracked, &t)?;
                let grad = forward.backward()?.remove(&tracked).expect("a gradient");
                let (one, one_grad) = ce.loss_and_grad(&x, &t)?;
                let (two, two_grad) = nll.loss_and_grad(&x, &t)?;
                let (three, grads) = linear.loss_and_grad(&x, &head, None, &few)?;
                Ok([forward.detach(), grad, one, one_grad, two, two_grad, three, grads.weight])
            };
            let (got, want) = (by(Normalizer::from(&seven))?, by(Normalizer::from(7.0))?);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_near(&format!("{dtype:?} {i}"), got, want, 2.0 * epsilon(DType::F32))?;
            }
        }
        // nothing is divided by 0 but the loss
        let zero = Tensor::zeros((), DType::F32, device)?;
        let (loss, grad) = CrossEntropyLoss::new().with_normalizer(&zero).loss_and_grad(&x, &t)?;
        assert!(scalar(&loss)?.is_infinite() && values(&grad)?.iter().all(|g| *g == 0.0), "{loss} {grad}");
        Ok(())
    })
}

#[test]
fn normalizers_and_weights_that_do_not_fit() -> Result<()> {
    everywhere(|device| {
        let x = Tensor::zeros((2, 3), DType::F32, device)?;
        let t = indices(&[0, 2], &[2], DType::U32, device)?;
        let says = |loss: candle_fused_loss::CrossEntropyLoss, expected: &str| {
            let error = loss.forward(&x, &t).unwrap_err().to_string();
            assert!(error.starts_with("cross_entropy: ") && error.contains(expected), "{error}: {expected}");
        };
        let ce = CrossEntropyLoss::new;
        for reduction in [Reduction::None, Reduction::Sum, Reduction::BatchMean] {
            let expected = format!("a normalizer with Reduction::{reduction:?}, expected Mean");
            says(ce().with_reduction(reduction).with_normalizer(2.0), &expected);
            says(ce().with_reduction(reduction).with_normalizer(&Tensor::new(2f32, device)?), &expected);
        }
        says(
            ce().with_normalizer(&Tensor::ones(2, DType::F32, device)?),
            "a normalizer of shape [2], expected a scalar",
        );
        let row_weight = |dims: &[usize], dtype: DType| Tensor::ones(dims, dtype, device);
        says(
            ce().with_row_weight(row_weight(&[3], DType::F32)?),
            "shape [3], expected a shape that broadcasts to the rows' [2]",
        );
        says(ce().with_row_weight(row_weight(&[2, 1], DType::F32)?), "broadcasts");
        for dtype in [DType::U32, DType::I64] {
            says(ce().with_row_weight(row_weight(&[2], dtype)?), "expected f16, bf16, f32, f64, or u8 for a mask");
        }
        says(
            ce().with_row_transform(RowTransform::Focal { gamma: -1.0 }),
            "gamma -1, expected a finite number of 0 or more",
        );
        says(ce().with_row_transform(RowTransform::Poly1 { epsilon: f64::NAN }), "epsilon NaN, expected a finite");
        for q in [0.0, 1.5, f64::NAN] {
            says(ce().with_row_transform(RowTransform::GeneralizedCe { q }), "expected a number in (0, 1]");
        }
        let transformed = ce().with_row_transform(RowTransform::Dft);
        let error = transformed.forward(&x, &x).unwrap_err().to_string();
        assert!(error.contains("row transform Dft with probability targets"), "{error}");
        Ok(())
    })
}

/// The sum over the first axis of what the reduction could return in its place.
#[test]
fn batch_means() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(106);
        for dims in [&[4, 3][..], &[4, 3, 5], &[3]] {
            let x = tensor(&random.normals(dims.iter().product(), 1.0), dims, DType::F64, device)?;
            let mut rows = dims.to_vec();
            rows.remove(dims.len().min(2) - 1);
            let t = indices(&random.classes(rows.iter().product(), 3), &rows, DType::I64, device)?;
            let first = rows.first().copied().unwrap_or(1) as f64;
            let ce = |reduction| CrossEntropyLoss::new().with_ignore_index(1).with_reduction(reduction);
            let (got, grad) = ce(Reduction::BatchMean).loss_and_grad(&x, &t)?;
            let (sum, sum_grad) = ce(Reduction::Sum).loss_and_grad(&x, &t)?;
            assert_near("loss", &got, &(sum / first)?, 1e-15)?;
            assert_near("gradient", &grad, &(sum_grad / first)?, 1e-15)?;
            let nll = |reduction| NllLoss::new().with_reduction(reduction).forward(&x, &t);
            assert_near("nll", &nll(Reduction::BatchMean)?, &(nll(Reduction::Sum)? / first)?, 1e-15)?;
        }
        let none = Tensor::zeros((0, 3), DType::F32, device)?;
        let t = Tensor::zeros(0, DType::U32, device)?;
        let loss = CrossEntropyLoss::new().with_reduction(Reduction::BatchMean).forward(&none, &t)?;
        assert!(scalar(&loss)?.is_nan(), "{loss}");
        Ok(())
    })
}

/// A sum over its count is the mean.
#[test]
fn counts_are_the_denominators() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(107);
        let (rows, classes) = (vec![5, 4], 6);
        let x = tensor(&random.normals(120, 1.0), &[5, classes, 4], DType::F64, device)?;
        let soft = tensor(&random.uniforms(120), &[5, classes, 4], DType::F32, device)?;
        let target: Vec<_> = random
            .classes(20, classes)
            .into_iter()
            .enumerate()
            .map(|(i, t)| if i % 5 == 3 { -100 } else { t })
            .collect();
        let class_weight = tensor(&random.uniforms(classes), &[classes], DType::F32, device)?;
        let row_weight = tensor(&random.uniforms(4), &[4], DType::F32, device)?;
        for dtype in [DType::I16, DType::I32, DType::I64] {
            let t = indices(&target, &rows, dtype, device)?;
            for case in 0..4 {
                let ce = |reduction: Reduction| {
                    let loss = CrossEntropyLoss::new().with_reduction(reduction);
                    let loss = if case % 2 == 1 { loss.with_weight(class_weight.clone()) } else { loss };
                    if case >= 2 { loss.with_row_weight(row_weight.clone()) } else { loss }
                };
                for target in [&t, &soft] {
                    let count = ce(Reduction::None).count(target)?;
                    assert_eq!((count.dims(), count.dtype()), (&[][..], DType::F64));
                    assert!(count.device().same_device(device));
                    let (sum, mean) =
                        (ce(Reduction::Sum).forward(&x, target)?, ce(Reduction::Mean).forward(&x, target)?);
                    assert_near(&format!("{dtype:?} {case}"), &(sum / count)?, &mean, 1e-14)?;
                }
            }
            assert_eq!(scalar(&NllLoss::new().count(&t)?)?, 16.0);
            assert_eq!(scalar(&LinearCrossEntropyLoss::new().count(&t)?)?, 16.0);
            // without logits there is still no class below 0
            let error = LinearCrossEntropyLoss::new().with_ignore_index(9).with_target_check(true).count(&t);
            assert!(error.is_err_and(|error| error.to_string().contains("target -100 at row 3")));
        }
        let t = indices(&target, &rows, DType::I64, device)?;
        let ce = CrossEntropyLoss::new;
        assert_eq!(scalar(&ce().with_normalizer(3.5).count(&t)?)?, 3.5);
        assert_eq!(scalar(&ce().with_normalizer(&Tensor::new(9u32, device)?).count(&t)?)?, 9.0);
        assert_eq!(scalar(&ce().count(&Tensor::zeros(0, DType::U32, device)?)?)?, 0.0);
        assert_eq!(scalar(&ce().with_class_axis(-1).count(&soft)?)?, 30.0);
        assert!(ce().with_normalizer(-1.0).count(&t).is_err());
        Ok(())
    })
}

/// At the ends of its range a transform is its limit: no NaN where the own class is at -inf, or is the only one.
#[test]
fn row_transforms_at_their_ends() -> Result<()> {
    let inf = f64::INFINITY;
    // own class at -inf, one class, confident, hopeless
    let rows: [(&[f64], i64); 4] = [(&[0.0, -inf, 1.0], 1), (&[3.0], 0), (&[0.0, 60.0], 1), (&[0.0, 60.0], 0)];
    let small = (-60f64).exp();
    let transforms: [(RowTransform, [f64; 4], [f64; 4]); 6] = [
        (RowTransform::Focal { gamma: 2.0 }, [inf, 0.0, small.powi(3), 60.0], [1.0, 0.0, 3.0 * small.powi(2), 1.0]),
        (RowTransform::Focal { gamma: 0.5 }, [inf, 0.0, small.powf(1.5), 60.0], [1.0, 0.0, 1.5 * small.sqrt(), 1.0]),
        (RowTransform::Focal { gamma: 0.0 }, [inf, 0.0, small, 60.0], [1.0, 1.0, 1.0, 1.0]),
        (RowTransform::Poly1 { epsilon: 2.0 }, [inf, 0.0, 3.0 * small, 62.0], [1.0, 3.0, 3.0, 1.0]),
        (RowTransform::Dft, [0.0, 0.0, small, 60.0 * small], [0.0, 1.0, 1.0, small]),
        (RowTransform::GeneralizedCe { q: 0.5 }, [2.0, 0.0, small, 2.0], [0.0, 1.0, 1.0, (-30f64).exp()]),
    ];
    everywhere(|device| {
        for dtype in [DType::F32, DType::F64] {
            for (transform, losses, slopes) in &transforms {
                for ((row, class), (loss, slope)) in rows.iter().zip(losses.iter().zip(slopes)) {
                    let what = format!("{dtype:?} {transform:?} {row:?}");
                    let x = tensor(row, &[1, row.len()], dtype, device)?;
                    let t = indices(&[*class], &[1], DType::I64, device)?;
                    let ce = CrossEntropyLoss::new().with_row_transform(*transform);
                    let (got, grad) = ce.loss_and_grad(&x, &t)?;
                    let tracked = Var::from_tensor(&x)?;
                    let through_graph = ce.forward(&tracked, &t)?.backward()?.remove(&tracked).expect("a gradient");
                    // the composed one takes the logarithm of a probability that is rounded
                    let near = |got: f64, want: f64| {
                        let (relative, absolute) = (2e-5, if ABSOLUTE > 0.0 { 1e-6 } else { 1e-37 });
                        got == want || (got - want).abs() <= relative * want.abs() + absolute
                    };
                    assert!(near(scalar(&got)?, *loss), "{what}: {got}, expected {loss:e}");
                    // the slope times that of the negative log-likelihood
                    let plain = values(&CrossEntropyLoss::new().loss_and_grad(&x, &t)?.1)?;
                    for grad in [grad, through_graph] {
                        for (got, plain) in values(&grad)?.iter().zip(&plain) {
                            assert!(near(*got, slope * plain), "{what}: {grad}, expected {slope:e} times {plain:?}");
                        }
                    }
                }
            }
        }
        // a row without a softmax stays NaN, and the others what they are
        let x = tensor(&[f64::NAN, 1.0, 2.0, 0.5], &[2, 2], DType::F32, device)?;
        let t = indices(&[1, 0], &[2], DType::U8, device)?;
        for (transform, ..) in transforms {
            let ce = CrossEntropyLoss::new().with_reduction(Reduction::None).with_row_transform(transform);
            let (loss, grad) = ce.loss_and_grad(&x, &t)?;
            let (loss, grad) = (values(&loss)?, values(&grad)?);
            assert!(
                loss[0].is_nan() && loss[1].is_finite() && grad[0].is_nan() && grad[3].is_finite(),
                "{transform:?}"
            );
        }
        Ok(())
    })
}

/// A transform that changes nothing changes no bit of the loss, up to the kernel that serves it.
#[test]
fn transforms_without_an_effect() -> Result<()> {
    everywhere(|device| {
        let mut random = Random::new(108);
        let x = tensor(&random.normals(60, 2.0), &[12, 5], DType::F64, device)?;
        let t = indices(&random.classes(12, 5), &[12], DType::U32, device)?;
        let (want, want_grad) = CrossEntropyLoss::new().loss_and_grad(&x, &t)?;
        for transform in [RowTransform::Focal { gamma: 0.0 }, RowTransform::Poly1 { epsilon: 0.0 }] {
            let (loss, grad) = CrossEntropyLoss::new().with_row_transform(transform).loss_and_grad(&x, &t)?;
            assert_near(&format!("{transform:?}"), &loss, &want, 1e-15)?;
            assert_near(&format!("{transform:?}, gradient"), &grad, &want_grad, 1e-15)?;
        }
        Ok(())
    })
}
