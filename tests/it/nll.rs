//! NLL and log-softmax against the f64 reference: options, dtypes, shapes and layouts.

use super::losses::{ABSOLUTE, FUSED, NllLoss, Reduction, log_softmax};
use crate::common::{
    Check, FLOATS, INDICES, Memory, Operand, REDUCTIONS, Random, arithmetic, compare, devices, is_left_out, tensor,
    values, widened,
};
use crate::reference::{self, CrossEntropy};
use Memory::{Contiguous, Odd, Repeated, Swapped, Window};
use candle_core::{DType, Device, Result, Tensor, Var};

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    dims: &'a [usize],
    dtype: DType,
    memory: Memory,
    index: DType,
    target_memory: Memory,
    weight: bool,
    ignore_index: Option<i64>,
    normalizer: Option<f64>,
}

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        if is_left_out(device, FUSED, random) {
            return Ok(());
        }
        let Case { dims, dtype, .. } = *self;
        let axis = if dims.len() == 1 { 0 } else { 1 };
        let (classes, n) = (dims[axis], dims.iter().product::<usize>());
        let mut row_dims = dims.to_vec();
        row_dims.remove(axis);
        let log_probs: Vec<_> = random.normals(n, 3.0).iter().map(|v| -v.abs()).collect();
        let input = Operand::new(&log_probs, dims, dtype, device, self.memory)?;
        let mut target = random.classes(n / classes, classes.min(200));
        if let Some(last) = target.last_mut() {
            *last = 1.min(classes as i64 - 1);
        }
        let target: Vec<_> = target.iter().map(|&t| t as f64).collect();
        let target = Operand::new(&target, &row_dims, self.index, device, self.target_memory)?;
        let (x, t) = (input.values()?, target.values()?);
        let t: Vec<_> = t.iter().map(|&t| t as i64).collect();
        let mut reference = CrossEntropy::default();
        let mut loss = NllLoss::new();
        if self.weight {
            let weight: Vec<_> = (0..classes).map(|c| if c % 3 == 2 { 0.0 } else { 0.5 + random.uniform() }).collect();
            let weight = tensor(&weight, &[classes], random.pick(&FLOATS), device)?;
            reference.weight = Some(values(&weight)?);
            loss = loss.with_weight(weight);
        }
        if random.below(2) == 0 {
            let count = n / classes;
            let weights: Vec<_> = (0..count).map(|i| if i % 4 == 1 { 0.0 } else { 0.5 + random.uniform() }).collect();
            let dtype = random.pick(&[DType::F16, DType::BF16, DType::F32, DType::F64]);
            let weights = tensor(&weights, &row_dims, dtype, device)?;
            reference.row_weight = Some(values(&weights)?);
            loss = loss.with_row_weight(weights);
        }
        if let Some(index) = self.ignore_index {
            reference.ignore_index = index;
            loss = loss.with_ignore_index(index);
        }
        for reduction in REDUCTIONS {
            let mut loss = loss.clone().with_reduction(reduction);
            if let (Some(normalizer), Reduction::Mean) = (self.normalizer, reduction) {
                loss = loss.with_normalizer(normalizer);
            }
            let normalizer = self.normalizer.filter(|_| reduction == Reduction::Mean);
            let reference = CrossEntropy { reduction, normalizer, ..reference.clone() };
            Check {
                what: format!("{self:?} {reduction:?}"),
                input: &input,
                target: &target,
                loss_dims: if reduction == Reduction::None { row_dims.clone() } else { vec![] },
                forward: &|x, t| loss.forward(x, t),
                loss_and_grad: &|x, t| loss.loss_and_grad(x, t),
                absolute: ABSOLUTE,
                expected: &|upstream| reference.expected_nll(dims, axis, &x, &t, upstream),
            }
            .run(random)?;
        }
        Ok(())
    }
}

const CONTIGUOUS: Case = Case {
    dims: &[],
    dtype: DType::F32,
    memory: Contiguous,
    index: DType::U32,
    target_memory: Contiguous,
    weight: false,
    ignore_index: None,
    normalizer: None,
};

#[test]
fn options_and_dtypes() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(41);
        for (dtype, index) in FLOATS.iter().flat_map(|&d| INDICES.map(|i| (d, i))) {
            for (dims, weight) in [(&[13, 7][..], false), (&[13, 7], true), (&[2, 5, 3, 2], true), (&[5], true)] {
                for (ignore_index, normalizer) in [(None, None), (Some(0), None), (Some(0), Some(3.5))] {
                    Case { dims, dtype, index, weight, ignore_index, normalizer, ..CONTIGUOUS }
                        .check(&device, &mut random)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    let shapes: [(&[usize], &[Memory], &[Memory]); 4] = [
        (&[6], &[Contiguous, Odd, Window(0), Repeated(0)], &[Contiguous, Odd]),
        (
            &[9, 5],
            &[Contiguous, Odd, Window(0), Window(1), Swapped(0, 1), Repeated(0), Repeated(1)],
            &[Contiguous, Odd, Window(0), Repeated(0)],
        ),
        (
            &[3, 70, 4],
            &[Contiguous, Odd, Window(1), Window(2), Swapped(1, 2), Swapped(0, 2), Repeated(2)],
            &[Contiguous, Window(1), Swapped(0, 1), Repeated(0)],
        ),
        (
            &[2, 3, 4, 5],
            &[Contiguous, Window(3), Window(2), Swapped(1, 3), Swapped(2, 3), Swapped(0, 3)],
            &[Contiguous, Odd, Window(2), Swapped(0, 2), Repeated(1)],
        ),
    ];
    for device in devices() {
        let mut random = Random::new(42);
        for (dims, memories, target_memories) in shapes {
            for (&memory, &target_memory) in memories.iter().flat_map(|m| target_memories.iter().map(move |t| (m, t))) {
                let (dtype, index, weight) = (random.pick(&FLOATS), random.pick(&INDICES), random.below(2) == 1);
                Case { dims, dtype, memory, index, target_memory, weight, ..CONTIGUOUS }.check(&device, &mut random)?;
            }
        }
    }
    Ok(())
}

/// Log-softmax and its gradient for a random upstream gradient.
fn check_log_softmax(
    dims: &[usize],
    axis: usize,
    dtype: DType,
    memory: Memory,
    device: &Device,
    random: &mut Random,
) -> Result<()> {
    let what = format!("log_softmax {dims:?} along {axis}, {dtype:?} {memory:?}");
    let n = dims.iter().product();
    let input = Operand::new(&random.normals(n, 4.0), dims, dtype, device, memory)?;
    let x = input.values()?;
    let y = log_softmax(&input.tracked()?, axis)?;
    assert_eq!((y.dims(), y.dtype()), (dims, dtype), "{what}");
    let upstream = tensor(&random.normals(n, 1.0), dims, dtype, device)?;
    let arithmetic = arithmetic(dtype);
    let want = reference::log_softmax(dims, axis, &x, &values(&upstream)?);
    let compare =
        |what: &str, got: &Tensor, want: &[reference::Near]| compare(what, got, &widened(want, ABSOLUTE), arithmetic);
    compare(&what, &y, &want.loss)?;
    // the sum's own upstream gradient is one number, repeated: a stride of 0 goes into the backward
    let leaf = Var::from_tensor(&input.detached()?)?;
    let grads = (log_softmax(&leaf, axis)? * &upstream)?.sum_all()?.backward()?;
    compare(&format!("{what}: gradient"), grads.get(&leaf).expect("a gradient"), &want.grad)?;
    let ones = reference::log_softmax(dims, axis, &x, &vec![1.0; n]);
    let grads = log_softmax(&leaf, axis)?.sum_all()?.backward()?;
    compare(&format!("{what}: gradient of the sum"), grads.get(&leaf).expect("a gradient"), &ones.grad)
}

#[test]
fn log_softmax_along_any_axis() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(43);
        for dims in [&[7][..], &[5, 9], &[3, 130], &[2, 3, 70], &[2, 3, 4, 5]] {
            for (axis, dtype) in (0..dims.len()).flat_map(|a| FLOATS.map(|d| (a, d))) {
                let mut memories = vec![Contiguous, Odd];
                memories.extend((0..dims.len()).flat_map(|axis| [Window(axis), Repeated(axis)]));
                memories.extend((1..dims.len()).map(|axis| Swapped(0, axis)));
                for memory in memories {
                    check_log_softmax(dims, axis, dtype, memory, &device, &mut random)?;
                }
            }
        }
        for classes in [1, 31, 33, 63, 64, 65, 1000, 2049, 5003] {
            check_log_softmax(&[3, classes], 1, DType::F32, Odd, &device, &mut random)?;
        }
    }
    // a row in parts; on the CPU alone: a device in software takes too long
    check_log_softmax(&[1, 100_000], 1, DType::BF16, Contiguous, &Device::Cpu, &mut Random::new(44))
}

/// A negative axis counts from the back, and upstream gradients of other layouts give the same.
#[test]
fn log_softmax_upstream_layouts() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(45);
        let x = Var::from_tensor(&tensor(&random.normals(60, 2.0), &[3, 4, 5], DType::F32, &device)?)?;
        let weight = tensor(&random.normals(60, 1.0), &[3, 4, 5], DType::F32, &device)?;
        let gradient = |y: Result<Tensor>| -> Result<Vec<f64>> {
            values((y? * &weight)?.sum_all()?.backward()?.get(&x).expect("a gradient"))
        };
        let through_transpose = |y: Tensor| -> Result<Vec<f64>> {
            let swapped = (y.transpose(1, 2)? * weight.transpose(1, 2)?)?;
            values(swapped.sum_all()?.backward()?.get(&x).expect("a gradient"))
        };
        let want = gradient(log_softmax(&x, 1))?;
        assert_eq!(gradient(log_softmax(&x, candle_core::D::Minus2))?, want);
        assert_eq!(through_transpose(log_softmax(&x, 1)?)?, want);
    }
    Ok(())
}
