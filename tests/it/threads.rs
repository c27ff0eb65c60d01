//! The same bits with any number of threads, and wherever the classes of a row lie. A matter of the CPU alone.

use crate::common::{FLOATS, Memory, Operand, REDUCTIONS, Random, assert_same_bits, bits, indices, tensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss, Reduction, SigmoidFocalLoss,
    log_softmax,
};

/// Runs a computation in pools of several sizes and compares all that it returns.
fn same_in_all_pools(what: &str, compute: impl Fn() -> Result<Vec<Tensor>> + Sync) -> Result<()> {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| compute()?.iter().map(bits).collect::<Result<Vec<_>>>())
    };
    let one = run(1)?;
    for threads in [2, 3, 8] {
        for (i, (got, want)) in run(threads)?.iter().zip(&one).enumerate() {
            let first = got.iter().zip(want).position(|(a, b)| a != b);
            assert!(first.is_none(), "{what}: output {i} differs at {first:?} with {threads} threads");
        }
    }
    Ok(())
}

fn through_graph(x: &Tensor, loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let x = Var::from_tensor(x)?;
    let loss = loss(&x)?;
    let grad = loss.backward()?.remove(&x).expect("a gradient");
    Ok(vec![loss, grad])
}

#[test]
fn softmax_family() -> Result<()> {
    let mut random = Random::new(71);
    // tiles of rows, blocks, a few rows in parts, a class axis that is not innermost
    let shapes: [(&[usize], DType); 6] = [
        (&[3001, 33], DType::F32),
        (&[40, 5000], DType::BF16),
        (&[3, 50_000], DType::F32),
        (&[1, 70_001], DType::F16),
        (&[2, 50, 1103], DType::F32),
        (&[60, 2049], DType::F64),
    ];
    for (dims, dtype) in shapes {
        let n: usize = dims.iter().product();
        let x = tensor(&random.normals(n, 3.0), dims, dtype, &Device::Cpu)?;
        let mut rows = dims.to_vec();
        let classes = rows.remove(1);
        let t = indices(&random.classes(n / classes, classes), &rows, DType::I64, &Device::Cpu)?;
        let soft = tensor(&random.uniforms(n), dims, DType::F32, &Device::Cpu)?;
        let weight = tensor(&random.uniforms(classes), &[classes], DType::F32, &Device::Cpu)?;
        for reduction in [Reduction::None, Reduction::Mean] {
            let plain = CrossEntropyLoss::new().with_reduction(reduction);
            let full = plain.clone().with_weight(weight.clone()).with_label_smoothing(0.1).with_z_loss(0.01);
            let nll = NllLoss::new().with_weight(weight.clone()).with_reduction(reduction);
            same_in_all_pools(&format!("{dims:?} {dtype:?} {reduction:?}"), || {
                let mut all = vec![];
                for loss in [&plain, &full] {
                    for target in [&t, &soft] {
                        all.extend(through_graph(&x, |x| loss.forward(x, target))?);
                        all.extend(<[Tensor; 2]>::from(loss.loss_and_grad(&x, target)?));
                    }
                }
                let in_place = x.copy()?;
                all.push(full.loss_and_grad_inplace(&in_place, &t)?);
                all.push(in_place);
                let rows = full.statistics(&x, &t)?;
                all.extend([rows.loss, rows.lse, rows.z_loss, rows.entropy, rows.argmax, rows.correct]);
                all.extend(through_graph(&x, |x| nll.forward(x, &t))?);
                all.extend(through_graph(&x, |x| log_softmax(x, 1))?);
                Ok(all)
            })?;
        }
    }
    Ok(())
}

/// The classes of a row lie apart or side by side, near or in another page, a tile's rows in one image or in two: rows
/// of up to 64 classes are computed in the same order.
#[test]
fn classes_apart_have_the_bits_of_classes_side_by_side() -> Result<()> {
    let mut random = Random::new(79);
    let device = &Device::Cpu;
    let shapes = [(2, 21, 1089), (1, 2, 1500), (3, 64, 1025), (5, 3, 7), (2, 10, 130)];
    for ((images, classes, pixels), dtype) in shapes.into_iter().flat_map(|shape| FLOATS.map(|dtype| (shape, dtype))) {
        let (dims, n) = ([images, classes, pixels], images * classes * pixels);
        let x = tensor(&random.normals(n, 3.0), &dims, dtype, device)?;
        let soft = tensor(&random.uniforms(n), &dims, dtype, device)?;
        let index = indices(&random.classes(images * pixels, classes), &[images, pixels], DType::U32, device)?;
        let weight = tensor(&random.uniforms(classes), &[classes], DType::F32, device)?;
        let side_by_side = |t: &Tensor| t.transpose(1, 2)?.flatten(0, 1)?.contiguous();
        let back = |t: &Tensor| t.reshape((images, pixels, classes))?.transpose(1, 2)?.contiguous();
        let plain = CrossEntropyLoss::new().with_reduction(Reduction::None);
        let full = plain.clone().with_weight(weight).with_label_smoothing(0.1).with_softcap(5.0);
        let same = |what: &str, apart: &Tensor, other: &Tensor| {
            assert_same_bits(&format!("{what} of {dims:?} {dtype:?}"), &apart.contiguous()?, other)
        };
        for (loss, target) in [(&plain, &soft), (&full, &soft), (&plain, &index), (&full, &index)] {
            let (value, grad) = loss.loss_and_grad(&x, target)?;
            let other = if target.rank() == 3 { side_by_side(target)? } else { target.flatten_all()? };
            let (other_value, other_grad) = loss.loss_and_grad(&side_by_side(&x)?, &other)?;
            same("the loss", &value.flatten_all()?, &other_value)?;
            same("the gradient", &grad, &back(&other_grad)?)?;
        }
        let through_graph = |x: Tensor, upstream: Tensor| -> Result<(Tensor, Tensor)> {
            let x = Var::from_tensor(&x)?;
            let y = log_softmax(&x, 1)?;
            let grad = (&y * upstream)?.sum_all()?.backward()?.remove(&x).expect("a gradient");
            Ok((y.detach(), grad))
        };
        let (y, grad) = through_graph(x.clone(), soft.clone())?;
        let (other, other_grad) = through_graph(side_by_side(&x)?, side_by_side(&soft)?)?;
        same("log-softmax", &y, &back(&other)?)?;
        same("log-softmax's gradient", &grad, &back(&other_grad)?)?;
    }
    Ok(())
}

/// Many classes of a row that lie in a page each: what is kept of them from the loss to the gradient, and how many rows
/// are worked through at once, changes nothing. In parts of an image, classes lie nearer to each other.
#[test]
fn classes_far_apart_have_the_bits_of_classes_near() -> Result<()> {
    let mut random = Random::new(80);
    let device = &Device::Cpu;
    let (images, pixels) = (2, 1100);
    for (classes, dtype) in [65, 150, 1024, 1025].into_iter().zip([DType::BF16, DType::F32, DType::F16, DType::F64]) {
        let (dims, n) = ([images, classes, pixels], images * classes * pixels);
        let x = tensor(&random.normals(n, 3.0), &dims, dtype, device)?;
        let soft = tensor(&random.uniforms(n), &dims, DType::F32, device)?;
        let index = indices(&random.classes(images * pixels, classes), &[images, pixels], DType::I64, device)?;
        let weight = tensor(&random.uniforms(classes), &[classes], DType::F32, device)?;
        let plain = CrossEntropyLoss::new().with_reduction(Reduction::None);
        let full = plain.clone().with_weight(weight).with_label_smoothing(0.1).with_softcap(5.0);
        let results = |x: &Tensor, soft: &Tensor, index: &Tensor| -> Result<Vec<Tensor>> {
            let mut all = vec![log_softmax(x, 1)?];
            for (loss, target) in [(&plain, soft), (&full, soft), (&plain, index), (&full, index)] {
                let (value, grad) = loss.loss_and_grad(x, target)?;
                all.extend([loss.forward(x, target)?, value, grad]);
            }
            Ok(all)
        };
        let whole = results(&x, &soft, &index)?;
        for (start, len) in [(0, 600), (600, 500)] {
            let part = |t: &Tensor| t.narrow(t.rank() - 1, start, len)?.contiguous();
            for (i, (whole, part_alone)) in
                whole.iter().zip(results(&part(&x)?, &part(&soft)?, &part(&index)?)?).enumerate()
            {
                assert_same_bits(&format!("result {i} of {dims:?} {dtype:?}"), &part(whole)?, &part_alone)?;
            }
        }
    }
    Ok(())
}

#[test]
fn logistic_family() -> Result<()> {
    let mut random = Random::new(72);
    for (dims, dtype) in [(&[300_001][..], DType::F32), (&[301, 1003], DType::BF16), (&[3, 70_001], DType::F64)] {
        let n: usize = dims.iter().product();
        let x = tensor(&random.normals(n, 3.0), dims, dtype, &Device::Cpu)?;
        let t = Operand::new(&random.labels(n), dims, DType::F32, &Device::Cpu, Memory::Odd)?.detached()?;
        let probs = t.to_dtype(dtype)?;
        let classes = dims[dims.len() - 1];
        let weight = tensor(&random.uniforms(classes), &[classes], DType::F32, &Device::Cpu)?;
        for reduction in REDUCTIONS {
            let bce = BceLoss::new().with_weight(weight.clone()).with_reduction(reduction);
            let logits = BceWithLogitsLoss::new().with_pos_weight(weight.clone()).with_reduction(reduction);
            let logits = logits.with_mask(weight.gt(0.3)?);
            let margin = MultiLabelSoftMarginLoss::new().with_weight(weight.clone()).with_reduction(reduction);
            let focal = SigmoidFocalLoss::new().with_reduction(reduction);
            same_in_all_pools(&format!("{dims:?} {dtype:?} {reduction:?}"), || {
                let mut all = vec![];
                all.extend(through_graph(&probs, |x| bce.forward(x, &t))?);
                all.extend(through_graph(&x, |x| logits.forward(x, &t))?);
                all.extend(through_graph(&x, |x| margin.forward(x, &t))?);
                all.extend(through_graph(&x, |x| focal.forward(x, &t))?);
                all.extend(<[Tensor; 2]>::from(bce.loss_and_grad(&probs, &t)?));
                all.extend(<[Tensor; 2]>::from(logits.loss_and_grad(&x, &t)?));
                all.extend(<[Tensor; 2]>::from(margin.loss_and_grad(&x, &t)?));
                all.extend(<[Tensor; 2]>::from(focal.loss_and_grad(&x, &t)?));
                Ok(all)
            })?;
        }
    }
    Ok(())
}
