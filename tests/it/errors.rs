//! Every class of error by example: what the message says, and that nothing else fails or panics.

use super::losses::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss, Reduction, SigmoidFocalLoss,
    log_softmax,
};
use crate::common::{FLOATS, Random, devices};
use candle_core::{DType, Device, Result, Tensor, Var};
use proptest::prelude::*;

fn zeros(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros(dims, dtype, device)
}

/// The message of an error, which must have all the parts: the function, the offending value, what was expected.
#[track_caller]
fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error, expected one with {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in {message:?}");
    }
}

const F32: DType = DType::F32;

#[test]
fn shapes_of_cross_entropy_and_nll() -> Result<()> {
    for device in devices() {
        let float = |dims: &[usize]| zeros(dims, F32, &device);
        let index = |dims: &[usize]| zeros(dims, DType::U32, &device);
        let (ce, nll) = (CrossEntropyLoss::new(), NllLoss::new());
        assert_says(ce.forward(&float(&[])?, &index(&[])?), &["cross_entropy", "scalar", "expected shape (C)"]);
        assert_says(nll.forward(&float(&[])?, &index(&[])?), &["nll", "scalar", "expected shape (C)"]);
        for dims in [&[0][..], &[3, 0], &[3, 0, 2]] {
            let mut rows = dims.to_vec();
            rows.remove(if dims.len() == 1 { 0 } else { 1 });
            let shape = format!("{dims:?}");
            assert_says(
                ce.forward(&float(dims)?, &index(&rows)?),
                &["cross_entropy", "no classes", &shape, "at least one"],
            );
            assert_says(nll.forward(&float(dims)?, &index(&rows)?), &["nll", "no classes", &shape, "at least one"]);
        }
        for (target, shape) in [(&[4][..], "[4]"), (&[3, 1], "[3, 1]"), (&[], "[]"), (&[2, 3], "[2, 3]")] {
            let expected = ["cross_entropy", shape, "[3, 2]", "expected class indices of shape [3]"];
            assert_says(ce.forward(&float(&[3, 2])?, &index(target)?), &expected);
            assert_says(ce.loss_and_grad(&float(&[3, 2])?, &index(target)?), &expected);
            assert_says(ce.loss_and_grad_inplace(&float(&[3, 2])?, &index(target)?), &expected);
            assert_says(ce.statistics(&float(&[3, 2])?, &index(target)?), &expected);
            let expected = ["nll", shape, "expected class indices of shape [3]"];
            assert_says(nll.forward(&float(&[3, 2])?, &index(target)?), &expected);
            assert_says(nll.loss_and_grad(&float(&[3, 2])?, &index(target)?), &expected);
        }
        // NLL has no probability targets
        assert_says(nll.forward(&float(&[3, 2])?, &float(&[3, 2])?), &["nll", "[3, 2]", "class indices of shape [3]"]);
        assert_says(log_softmax(&float(&[3, 2])?, 2), &["log_softmax"]);
        assert_says(log_softmax(&float(&[])?, 0), &["log_softmax"]);
    }
    Ok(())
}

#[test]
fn dtypes_of_cross_entropy_and_nll() -> Result<()> {
    for device in devices() {
        let (ce, nll) = (CrossEntropyLoss::new(), NllLoss::new());
        let target = zeros(&[3], DType::U32, &device)?;
        for dtype in [DType::U8, DType::U32, DType::I64] {
            let (logits, named) = (zeros(&[3, 2], dtype, &device)?, format!("{dtype:?}"));
            assert_says(
                ce.forward(&logits, &target),
                &["cross_entropy", "logits of dtype", &named, "f16, bf16, f32 or f64"],
            );
            assert_says(nll.forward(&logits, &target), &["nll", "log-probabilities of dtype", &named, "f32"]);
            assert_says(log_softmax(&logits, 1), &["log_softmax", "logits of dtype", &named, "f32"]);
        }
        let logits = zeros(&[3, 2], F32, &device)?;
        for dtype in FLOATS {
            let (target, named) = (zeros(&[3], dtype, &device)?, format!("{dtype:?}"));
            let expected = ["class indices of dtype", &named, "u8, u32, i16, i32 or i64"];
            assert_says(ce.forward(&logits, &target), &["cross_entropy", expected[0], expected[1], expected[2]]);
            assert_says(nll.forward(&logits, &target), &["nll", expected[0], expected[1], expected[2]]);
        }
        let soft = zeros(&[3, 2], DType::I64, &device)?;
        assert_says(
            ce.forward(&logits, &soft),
            &["cross_entropy", "[3, 2]", "probabilities", "I64", "f16, bf16, f32 or f64"],
        );
    }
    Ok(())
}

#[test]
fn options_of_cross_entropy_and_nll() -> Result<()> {
    for device in devices() {
        let (logits, target) = (zeros(&[3, 2], F32, &device)?, zeros(&[3], DType::U32, &device)?);
        let fails = |loss: candle_fused_loss::CrossEntropyLoss, parts: &[&str]| {
            for result in [loss.forward(&logits, &target), loss.loss_and_grad(&logits, &target).map(|v| v.0)] {
                assert_says(result, &[&["cross_entropy"], parts].concat());
            }
            assert_says(loss.statistics(&logits, &target), parts);
        };
        let new = CrossEntropyLoss::new;
        for (value, shown) in [(-0.1, "-0.1"), (1.5, "1.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            fails(new().with_label_smoothing(value), &["label smoothing", shown, "[0, 1]"]);
        }
        for (value, shown) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            fails(new().with_z_loss(value), &["z-loss", shown, "0 or more"]);
        }
        for (value, shown) in [(0.0, "0"), (-2.0, "-2"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            fails(new().with_softcap(value), &["soft cap", shown, "above 0"]);
            fails(new().with_normalizer(value), &["normalizer", shown, "above 0"]);
        }
        for (value, shown) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "-inf")] {
            fails(new().with_logit_scale(value), &["logit scale", shown, "finite"]);
        }
        for dims in [&[3][..], &[], &[1, 2], &[2, 1]] {
            let weight = zeros(dims, F32, &device)?;
            let shape = format!("{dims:?}");
            fails(new().with_weight(weight.clone()), &["class weights of shape", &shape, "(2)"]);
            assert_says(NllLoss::new().with_weight(weight).forward(&logits, &target), &["nll", &shape, "(2)"]);
        }
        let whole = zeros(&[2], DType::U32, &device)?;
        fails(new().with_weight(whole.clone()), &["class weights of dtype", "U32", "f16, bf16, f32 or f64"]);
        assert_says(NllLoss::new().with_weight(whole).forward(&logits, &target), &["nll", "U32"]);
        assert_says(NllLoss::new().with_normalizer(0.0).forward(&logits, &target), &["nll", "normalizer 0", "above 0"]);
        let unfused = CrossEntropyLoss::new().with_fused(false).with_label_smoothing(2.0);
        assert_says(unfused.forward(&logits, &target), &["cross_entropy", "label smoothing 2", "[0, 1]"]);
    }
    Ok(())
}

#[test]
fn losses_of_elements() -> Result<()> {
    for device in devices() {
        let input = zeros(&[3, 2], F32, &device)?;
        let (bce, logits) = (BceLoss::new(), BceWithLogitsLoss::new());
        let (margin, focal) = (MultiLabelSoftMarginLoss::new(), SigmoidFocalLoss::new());
        let all = |input: &Tensor, target: &Tensor, parts: &[&str]| {
            for (name, result) in [
                ("binary_cross_entropy", bce.forward(input, target)),
                ("binary_cross_entropy", bce.loss_and_grad(input, target).map(|v| v.0)),
                ("binary_cross_entropy_with_logits", logits.forward(input, target)),
                ("binary_cross_entropy_with_logits", logits.loss_and_grad(input, target).map(|v| v.0)),
                ("multi_label_soft_margin", margin.forward(input, target)),
                ("sigmoid_focal", focal.forward(input, target)),
                ("sigmoid_focal", focal.loss_and_grad(input, target).map(|v| v.0)),
            ] {
                assert_says(result, &[&[name], parts].concat());
            }
        };
        // no silent broadcasting of the target, or of the input
        for dims in [&[2][..], &[3, 1], &[1, 2], &[2, 3], &[3, 2, 1], &[]] {
            let shape = format!("target of shape {dims:?}");
            all(&input, &zeros(dims, F32, &device)?, &[&shape, "expected the input's shape [3, 2]"]);
        }
        all(&zeros(&[3, 2], DType::U8, &device)?, &input, &["of dtype U8", "f16, bf16, f32 or f64"]);

        let scalar = zeros(&[], F32, &device)?;
        assert_says(margin.forward(&scalar, &scalar), &["multi_label_soft_margin", "scalar", "(C)"]);
        let empty = zeros(&[3, 0], F32, &device)?;
        assert_says(margin.forward(&empty, &empty), &["multi_label_soft_margin", "no classes", "[3, 0]"]);
        for dims in [&[3][..], &[1], &[3, 2], &[]] {
            let margin = margin.clone().with_weight(zeros(dims, F32, &device)?);
            let shape = format!("{dims:?}");
            assert_says(margin.forward(&input, &input), &["multi_label_soft_margin", "class weights", &shape, "(2)"]);
        }
        for dims in [&[3][..], &[4, 3, 2], &[3, 3]] {
            let weight = zeros(dims, F32, &device)?;
            let shape = format!("{dims:?}");
            let to = "broadcasts to the input's [3, 2]";
            let of =
                |result: Result<Tensor>, what: &str| assert_says(result, &["binary_cross_entropy", what, &shape, to]);
            of(bce.clone().with_weight(weight.clone()).forward(&input, &input), "weight");
            of(logits.clone().with_weight(weight.clone()).forward(&input, &input), "weight");
            of(logits.clone().with_pos_weight(weight.clone()).forward(&input, &input), "pos_weight");
            of(logits.clone().with_mask(weight).forward(&input, &input), "mask");
        }
        let whole = zeros(&[2], DType::U32, &device)?;
        assert_says(bce.clone().with_weight(whole.clone()).forward(&input, &input), &["weight of dtype U32", "f32"]);
        let positive = logits.clone().with_pos_weight(whole);
        assert_says(positive.forward(&input, &input), &["pos_weight of dtype U32", "f32"]);
        for (value, shown) in [(-0.1, "-0.1"), (1.1, "1.1"), (f64::NAN, "NaN")] {
            let smooth = logits.clone().with_label_smoothing(value);
            assert_says(smooth.forward(&input, &input), &["with_logits", "label smoothing", shown, "[0, 1]"]);
        }
        for (value, shown) in [(1.5, "1.5"), (f64::NAN, "NaN")] {
            let focal = focal.clone().with_alpha(value);
            assert_says(focal.forward(&input, &input), &["sigmoid_focal", "alpha", shown, "[0, 1]"]);
        }
        for (value, shown) in [(-0.5, "-0.5"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
            let focal = focal.clone().with_gamma(value);
            assert_says(focal.forward(&input, &input), &["sigmoid_focal", "gamma", shown, "0 or more"]);
        }
    }
    Ok(())
}

/// Operands on another device.
#[cfg(feature = "cuda")]
#[test]
fn devices_that_differ() -> Result<()> {
    let (cpu, cuda) = (&Device::Cpu, &crate::common::cuda());
    let (here, there) = (zeros(&[3, 2], F32, cuda)?, zeros(&[3, 2], F32, cpu)?);
    let weight = zeros(&[2], F32, cpu)?;
    let index = zeros(&[3], DType::U32, cpu)?;
    assert_says(CrossEntropyLoss::new().forward(&here, &index), &["cross_entropy", "target", "device"]);
    assert_says(NllLoss::new().forward(&here, &index), &["nll", "target", "device"]);
    assert_says(BceWithLogitsLoss::new().forward(&here, &there), &["with_logits", "target", "device"]);
    let logits = BceWithLogitsLoss::new();
    assert_says(logits.clone().with_weight(weight.clone()).forward(&here, &here), &["weight", "device"]);
    assert_says(logits.clone().with_pos_weight(weight.clone()).forward(&here, &here), &["pos_weight", "device"]);
    assert_says(logits.with_mask(weight.clone()).forward(&here, &here), &["mask", "device"]);
    let ce = CrossEntropyLoss::new().with_weight(weight);
    assert_says(ce.forward(&here, &zeros(&[3], DType::U32, cuda)?), &["cross_entropy", "class weights", "device"]);
    Ok(())
}

const DTYPES: [DType; 8] =
    [DType::U8, DType::U32, DType::I32, DType::I64, DType::F16, DType::BF16, DType::F32, DType::F64];
const OPTIONS: [f64; 12] =
    [0.0, 0.1, 1.0, 2.5, -1.0, 1e-30, 1e30, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE];

/// A tensor of any shape (often an empty one), dtype and layout, with any numbers.
fn any_tensor(random: &mut Random, dims: &[usize]) -> Result<Tensor> {
    let n = dims.iter().product();
    let value = |random: &mut Random| match random.below(6) {
        0 => random.pick(&OPTIONS),
        1 => random.below(4) as f64,
        _ => random.uniform(),
    };
    let values: Vec<_> = (0..n).map(|_| value(random)).collect();
    let tensor = Tensor::from_slice(&values, dims, &Device::Cpu)?.to_dtype(random.pick(&DTYPES))?;
    let tensor = match (random.below(4), dims.len()) {
        (0, 2..) => tensor.transpose(0, dims.len() - 1)?.contiguous()?.transpose(0, dims.len() - 1)?,
        (1, 1..) if dims[0] > 0 => tensor.narrow(0, 0, 1)?.broadcast_as(dims)?,
        _ => tensor,
    };
    if tensor.dtype().is_float() && random.below(3) == 0 {
        Ok(Var::from_tensor(&tensor)?.into_inner())
    } else {
        Ok(tensor)
    }
}

/// Mostly shapes that fit each other, else a loss would hardly ever see them.
fn any_operand(random: &mut Random, dims: &[usize]) -> Result<Tensor> {
    let mut dims = dims.to_vec();
    match random.below(5) {
        0 if !dims.is_empty() => drop(dims.remove(random.below(dims.len()))),
        1 => dims.insert(random.below(dims.len() + 1), random.below(3)),
        _ => {}
    }
    any_tensor(random, &dims)
}

/// Whatever comes of it, a result or an error: no panic. Backward too.
fn survives(loss: Result<Tensor>) {
    if let Ok(loss) = loss.and_then(|loss| loss.sum_all()) {
        let _ = loss.backward();
    }
}

fn any_loss(random: &mut Random) -> Result<()> {
    let rank = random.below(5);
    let dims: Vec<_> = (0..rank).map(|_| random.pick(&[0, 1, 2, 3, 5, 70])).collect();
    let x = any_operand(random, &dims)?;
    let mut rows = dims.clone();
    if rank > 0 {
        rows.remove(if rank == 1 { 0 } else { 1 });
    }
    let rows = if random.below(3) > 0 { any_operand(random, &rows)? } else { any_operand(random, &dims)? };
    let like = any_operand(random, &dims)?;
    let classes = random.pick(&dims.iter().copied().chain([2]).collect::<Vec<_>>());
    let weight = any_operand(random, &[classes])?;
    let reduction = random.pick(&[Reduction::None, Reduction::Mean, Reduction::Sum]);
    let option = |random: &mut Random, usual: f64| if random.below(3) == 0 { random.pick(&OPTIONS) } else { usual };

    let mut ce = CrossEntropyLoss::new()
        .with_reduction(reduction)
        .with_label_smoothing(option(random, 0.0))
        .with_z_loss(option(random, 0.0))
        .with_logit_scale(option(random, 1.0))
        .with_ignore_index(random.pick(&[-100, 0, 1, i64::MIN, i64::MAX]))
        .with_target_check(random.below(2) == 0);
    let mut nll = NllLoss::new().with_reduction(reduction).with_ignore_index(random.pick(&[-100, 0]));
    let mut bce = BceLoss::new().with_reduction(reduction);
    let mut logits = BceWithLogitsLoss::new().with_reduction(reduction).with_label_smoothing(option(random, 0.0));
    let mut margin = MultiLabelSoftMarginLoss::new().with_reduction(reduction);
    let focal = SigmoidFocalLoss::new()
        .with_reduction(reduction)
        .with_alpha(option(random, 0.25))
        .with_gamma(option(random, 2.0));
    if random.below(3) == 0 {
        ce = ce.with_weight(weight.clone()).with_softcap(option(random, 3.0)).with_normalizer(option(random, 3.0));
        nll = nll.with_weight(weight.clone()).with_normalizer(option(random, 3.0));
        bce = bce.with_weight(weight.clone());
        logits = logits.with_weight(weight.clone()).with_mask(any_operand(random, &dims)?);
        logits = logits.with_pos_weight(any_operand(random, &dims)?);
        margin = margin.with_weight(weight);
    }
    survives(ce.forward(&x, &rows));
    survives(ce.loss_and_grad(&x, &rows).map(|v| v.0));
    survives(ce.statistics(&x, &rows).map(|v| v.entropy));
    survives(nll.forward(&x, &rows));
    survives(nll.loss_and_grad(&x, &rows).map(|v| v.1));
    survives(bce.forward(&x, &like));
    survives(bce.loss_and_grad(&x, &like).map(|v| v.0));
    survives(logits.forward(&x, &like));
    survives(logits.loss_and_grad(&x, &like).map(|v| v.0));
    survives(margin.forward(&x, &like));
    survives(focal.forward(&x, &like));
    survives(log_softmax(&x, random.below(5)));
    let in_place = x.detach().copy()?;
    survives(ce.loss_and_grad_inplace(&in_place, &rows));
    Ok(())
}

proptest! {
    #![proptest_config(crate::properties::config(1500))]

    /// On the CPU: what is checked before a kernel runs does not depend on the device.
    #[test]
    fn nothing_panics(seed in any::<u64>()) {
        any_loss(&mut Random::new(seed)).expect("tensors");
    }
}

/// What else may have been meant, in the message.
#[test]
fn remedies() -> Result<()> {
    for device in devices() {
        let float = |dims: &[usize]| zeros(dims, F32, &device);
        let index = |dims: &[usize]| zeros(dims, DType::U32, &device);
        let (ce, nll) = (CrossEntropyLoss::new(), NllLoss::new());
        // a variable behind detached logits would become its own gradient
        let var = Var::from_tensor(&float(&[2, 3])?)?;
        let parts = ["cross_entropy", "tracked by autograd", "variable", "copy", "loss_and_grad"];
        assert_says(ce.loss_and_grad_inplace(&var, &index(&[2])?), &parts);
        // two halves of one tensor
        let both = float(&[4, 3])?;
        let (logits, target) = (both.narrow(0, 0, 2)?, both.narrow(0, 2, 2)?);
        let parts = ["cross_entropy", "share their storage", "target.copy()", "loss_and_grad"];
        assert_says(ce.loss_and_grad_inplace(&logits, &target), &parts);
        // a negative index that lost its sign
        let minus = Tensor::new(&[0u32, (-100i32) as u32], &device)?;
        let checked = ce.clone().with_target_check(true);
        let parts = ["target 4294967196 at row 1", "ignore_index -100", "-100 ahead of a cast to U32", "signed"];
        assert_says(checked.forward(&float(&[2, 3])?, &minus), &parts);
        assert_says(nll.clone().with_target_check(true).forward(&float(&[2, 3])?, &minus), &parts[..3]);
        let byte = Tensor::new(&[156u8, 0], &device)?;
        assert_says(
            checked.loss_and_grad(&float(&[2, 3])?, &byte),
            &["target 156 at row 0", "-100 ahead of a cast to U8"],
        );
        let large = Tensor::new(&[3u32, 0], &device)?;
        let error = checked.forward(&float(&[2, 3])?, &large).unwrap_err().to_string();
        assert!(error.contains("target 3 at row 0") && !error.contains("cast"), "{error}");
        // labels of each logit
        let parts = ["cross_entropy", "[3]", "dtype U32", "class indices of shape []", "BceWithLogitsLoss"];
        assert_says(ce.forward(&float(&[3])?, &index(&[3])?), &parts);
        // the classes along another axis
        let parts = ["[2, 5]", "[2, 5, 7]", "class indices of shape [2, 7]", "with_class_axis(2)"];
        assert_says(ce.forward(&float(&[2, 5, 7])?, &index(&[2, 5])?), &parts);
        assert_says(nll.loss_and_grad(&float(&[2, 5, 7])?, &index(&[2, 5])?), &parts);
        for (axis, what) in
            [(3, "class axis 3"), (-4, "class axis -4"), (isize::MIN, "class axis -9223372036854775808")]
        {
            let expected = [what, "[2, 5, 7]", "-3..3"];
            let ce = ce.clone().with_class_axis(axis);
            assert_says(ce.forward(&float(&[2, 5, 7])?, &index(&[2, 7])?), &expected);
            assert_says(nll.clone().with_class_axis(axis).forward(&float(&[2, 5, 7])?, &index(&[2, 7])?), &expected);
        }
        for scale in [f64::NAN, f64::INFINITY] {
            let ce = ce.clone().with_grad_scale(scale);
            let parts = ["cross_entropy", "grad scale", "finite"];
            assert_says(ce.loss_and_grad(&float(&[2, 3])?, &index(&[2])?), &parts);
        }
    }
    Ok(())
}
