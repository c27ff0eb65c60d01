//! The L1 loss against the f64 reference: options, dtypes, shapes and layouts, and what it does at its corner.

use super::losses::{FUSED, L1Loss, Reduction, l1};
use crate::common::{
    Check, ELEMENT_COUNTS, FLOATS, Memory, NUMBERS, Operand, REDUCTIONS, Random, broadcastable, cases, devices,
    element_layouts, tensor, values,
};
use crate::reference::{Elements, Term};
use candle_core::{DType, Device, Result, Tensor, Var};

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    dims: &'a [usize],
    dtype: DType,
    memory: Memory,
    target: DType,
    target_memory: Memory,
    weight: bool,
    mask: bool,
}

const CONTIGUOUS: Case = Case {
    dims: &[],
    dtype: DType::F32,
    memory: Memory::Contiguous,
    target: DType::F32,
    target_memory: Memory::Contiguous,
    weight: false,
    mask: false,
};

const OPTIONS: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// Multiples of 1/8 in [-8, 8), which every dtype holds: some equal their target.
fn eighths(n: usize, random: &mut Random) -> Vec<f64> {
    (0..n).map(|_| random.below(128) as f64 / 8.0 - 8.0).collect()
}

/// Such multiples as targets of a dtype: integers from 0 on where they are integers.
fn targets(n: usize, dtype: DType, random: &mut Random) -> Vec<f64> {
    let signed = dtype.is_float() || dtype == DType::I32 || dtype == DType::I64;
    let value = |v: f64| if dtype.is_float() { v } else { v.trunc() };
    eighths(n, random).into_iter().map(|v| value(if signed { v } else { v.abs() })).collect()
}

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        let Case { dims, dtype, .. } = *self;
        let n: usize = dims.iter().product();
        let input = Operand::new(&eighths(n, random), dims, dtype, device, self.memory)?;
        let labels = targets(n, self.target, random);
        let target = Operand::new(&labels, dims, self.target, device, self.target_memory)?;
        let mut reference = Elements::new(Term::L1);
        let mut loss = L1Loss::new();
        if self.weight {
            let dims = broadcastable(dims, random);
            let weight: Vec<_> = (0..dims.iter().product()).map(|_| 2.0 * random.uniform()).collect();
            let weight = tensor(&weight, &dims, random.pick(&FLOATS), device)?;
            reference.weight = Some(values(&weight.broadcast_as(self.dims)?)?);
            loss = loss.with_weight(weight);
        }
        if self.mask {
            let dims = broadcastable(dims, random);
            let mask: Vec<_> = (0..dims.iter().product()).map(|_| (random.below(3) > 0) as u8 as f64).collect();
            let mask = tensor(&mask, &dims, random.pick(&NUMBERS), device)?;
            reference.mask = Some(values(&mask.broadcast_as(self.dims)?)?);
            loss = loss.with_mask(mask);
        }
        let (x, t) = (input.values()?, target.values()?);
        for reduction in REDUCTIONS {
            let loss = loss.clone().with_reduction(reduction);
            let reference = Elements { reduction, ..reference.clone() };
            Check {
                what: format!("{self:?} {reduction:?}"),
                input: &input,
                target: &target,
                loss_dims: if reduction == Reduction::None { dims.to_vec() } else { vec![] },
                forward: &|x, t| loss.forward(x, t),
                loss_and_grad: &|x, t| loss.loss_and_grad(x, t),
                // composed too, these losses have the accuracy of the kernels
                absolute: 0.0,
                expected: &|upstream| reference.expected(&x, &t, upstream),
            }
            .run(random)?;
        }
        Ok(())
    }
}

#[test]
fn options_and_dtypes() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(41);
        let dtypes = FLOATS.iter().flat_map(|&d| NUMBERS.map(|t| (d, t)));
        let all = dtypes.flat_map(|dtypes| OPTIONS.map(|options| (dtypes, options)));
        for ((dtype, target), (weight, mask)) in cases(&device, FUSED, all) {
            Case { dims: &[3, 4, 5], dtype, target, weight, mask, ..CONTIGUOUS }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(42);
        for (dims, memory, target_memory) in cases(&device, FUSED, element_layouts()) {
            let (dtype, target) = (random.pick(&FLOATS), random.pick(&NUMBERS));
            let (weight, mask) = random.pick(&OPTIONS);
            Case { dims, dtype, memory, target, target_memory, weight, mask }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn sizes() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(43);
        let all = ELEMENT_COUNTS.iter().flat_map(|&n| FLOATS.map(|d| (n, d)));
        for (n, dtype) in cases(&device, FUSED, all) {
            let (weight, mask) = random.pick(&OPTIONS);
            let memory = random.pick(&[Memory::Contiguous, Memory::Odd]);
            Case { dims: &[n], dtype, memory, weight, mask, ..CONTIGUOUS }.check(&device, &mut random)?;
        }
    }
    // as many as several threads share; on the CPU alone: a device in software takes too long
    let case = Case { dims: &[300, 1001], weight: true, mask: true, ..CONTIGUOUS };
    case.check(&Device::Cpu, &mut Random::new(44))
}

/// Equal numbers, infinities and NaN.
#[test]
fn corners() -> Result<()> {
    const INF: f64 = f64::INFINITY;
    const NAN: f64 = f64::NAN;
    let x = [2.0, -0.0, 3e38, INF, -INF, INF, NAN, 1.0, -1e-30];
    let t = [2.0, 0.0, -3e38, 1.0, INF, INF, 0.0, NAN, 1e-30];
    let want_loss = [0.0, 0.0, INF, INF, INF, NAN, NAN, NAN, 2e-30];
    let want_grad = [0.0, 0.0, 1.0, 1.0, -1.0, NAN, NAN, NAN, -1.0];
    let same = |what: &str, got: &[f64], want: &[f64]| {
        assert_eq!(got.len(), want.len(), "{what}");
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!(
                g == w || (g - w).abs() < 1e-35 || (g.is_nan() && w.is_nan()),
                "{what}[{i}]: {g:e}, expected {w:e}"
            );
        }
    };
    for device in devices() {
        let x = Var::from_tensor(&tensor(&x, &[9], DType::F32, &device)?)?;
        let t = Var::from_tensor(&tensor(&t, &[9], DType::F32, &device)?)?;
        let loss = L1Loss::new().with_reduction(Reduction::None);
        let value = loss.forward(&x, &t)?;
        same("loss", &values(&value)?, &want_loss);
        let grads = value.backward()?;
        let grad = |of: &Var| values(grads.get(of).expect("a gradient"));
        same("gradient", &grad(&x)?, &want_grad);
        same("target's gradient", &grad(&t)?, &want_grad.map(|g| -g));
        let (_, grad) = loss.loss_and_grad(&x.detach(), &t.detach())?;
        same("one-pass gradient", &values(&grad)?, &want_grad);
    }
    Ok(())
}

/// Masked elements count for nothing, whatever they hold; without any others the mean is NaN and its gradient 0.
#[test]
fn masks() -> Result<()> {
    for device in devices() {
        let x = Tensor::new(&[1f32, f32::NAN, f32::INFINITY, -1.0], &device)?;
        let t = Tensor::new(&[4i64, 0, 0, 0], &device)?;
        let mask = Tensor::new(&[1u8, 0, 0, 1], &device)?;
        let loss = L1Loss::new().with_mask(mask);
        assert_eq!(values(&loss.forward(&x, &t)?)?, [2.0]);
        assert_eq!(values(&loss.clone().with_reduction(Reduction::Sum).forward(&x, &t)?)?, [4.0]);
        let each = loss.clone().with_reduction(Reduction::None).forward(&x, &t)?;
        assert_eq!(values(&each)?, [3.0, 0.0, 0.0, 1.0]);
        assert_eq!(values(&loss.loss_and_grad(&x, &t)?.1)?, [-0.5, 0.0, 0.0, -0.5]);
        let (loss, grad) = L1Loss::new().with_mask(Tensor::zeros(4, DType::U8, &device)?).loss_and_grad(&x, &t)?;
        assert!(values(&loss)?[0].is_nan());
        assert_eq!(values(&grad)?, [0.0; 4]);
    }
    Ok(())
}

/// The free function, and integers beyond those that f32 holds.
#[test]
fn free_function() -> Result<()> {
    for device in devices() {
        let x = Tensor::new(&[1f64, -2.0, 0.5], &device)?;
        let t = Tensor::new(&[(1i64 << 53) - 1, -2, 2], &device)?;
        let want = ((1i64 << 53) as f64 - 2.0 + 1.5) / 3.0;
        assert_eq!(values(&l1(&x, &t)?)?, [want]);
    }
    Ok(())
}

#[test]
fn errors() -> Result<()> {
    let says = |result: Result<Tensor>, parts: &[&str]| {
        let error = result.expect_err("an error").to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    };
    for device in devices() {
        let x = Tensor::zeros((2, 3), DType::F32, &device)?;
        let whole = Tensor::zeros((2, 3), DType::U32, &device)?;
        let long = Tensor::zeros(4, DType::F32, &device)?;
        says(l1(&x, &Tensor::zeros((3, 2), DType::F32, &device)?), &["l1: target of shape [3, 2]", "[2, 3]"]);
        says(l1(&whole, &x), &["l1: input of dtype U32", "f16, bf16, f32 or f64"]);
        let loss = L1Loss::new();
        says(loss.clone().with_weight(long.clone()).forward(&x, &x), &["l1: weight of shape [4]", "[2, 3]"]);
        says(loss.clone().with_weight(whole.clone()).forward(&x, &x), &["l1: weight of dtype U32"]);
        says(loss.clone().with_mask(long.clone()).forward(&x, &x), &["l1: ", "mask of shape [4]", "[2, 3]"]);
        says(loss.loss_and_grad(&x, &long).map(|(loss, _)| loss), &["l1: target of shape [4]"]);
    }
    Ok(())
}
