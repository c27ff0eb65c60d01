//! The kernels against the CPU, through the ops.

use crate::cuda::kernels::NLL;
use crate::cuda::testing::{FLOATS, assert_close, form_of, indices, random, tolerance};
use crate::cuda::work::{Work, work_of};
use crate::nll::problem::Nll;
use crate::reduction::Reduction;
use crate::rows::options::RowOptions;
use candle_core::{DType, Device, Result, Tensor, Var};

fn nll(options: RowOptions) -> Nll {
    Nll { name: "nll", axis: 1, form: form_of(options.reduction), options }
}

/// Loss and gradients by all passes.
fn outcome(options: &RowOptions, x: &Tensor, target: &Tensor, device: &Device) -> Result<[Tensor; 4]> {
    let weight = options.weight.as_ref().map(|weight| weight.to_device(device)).transpose()?;
    let problem = nll(RowOptions { weight, ..options.clone() });
    let (x, target) = (Var::from_tensor(&x.to_device(device)?)?, target.to_device(device)?);
    let forward = problem.clone().forward(&x, &target)?;
    let upstream = random(&[forward.elem_count()], 5, forward.dtype())?.reshape(forward.shape())?.to_device(device)?;
    let grads = (&forward * upstream)?.sum_all()?.backward()?;
    let (loss, grad) = problem.loss_and_grad(&x, &target)?;
    Ok([forward, grads.get(&x).unwrap().clone(), loss, grad])
}

#[test]
fn matches_the_cpu_and_reaches_every_kernel() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        let arithmetic = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        // few rows, rows of classes that lie apart, more rows than a block takes, more elements than it writes
        for dims in [vec![6, 45], vec![2, 45, 5], vec![3000, 7], vec![67, 1003]] {
            let classes = dims[1];
            let index_dims: Vec<usize> = [&dims[..1], &dims[2..]].concat();
            let x = random(&dims, 1, dtype)?;
            let target = indices(index_dims.iter().product(), classes, 2)?.reshape(index_dims)?;
            let weight = random(&[classes], 7, arithmetic)?;
            for reduction in [Reduction::None, Reduction::Mean, Reduction::Sum] {
                for weight in [None, Some(weight.clone())] {
                    let options = RowOptions { weight, ignore_index: 1, reduction, ..RowOptions::default() };
                    let what = format!("{dims:?} {dtype:?} {options:?}");
                    let (got, expected) =
                        (outcome(&options, &x, &target, &gpu)?, outcome(&options, &x, &target, &Device::Cpu)?);
                    for (got, expected) in got.iter().zip(&expected) {
                        assert_close(&what, got, expected, tolerance(got.dtype()));
                    }
                }
            }
        }
    }
    assert_eq!(NLL.unused(), [""; 0]);
    Ok(())
}

/// Up to 64 rows of 1000 classes: one launch forward, one backward and one for both.
#[test]
fn small_problems_take_one_launch() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (rows, classes) in [(1, 2), (5, 10), (64, 64), (64, 1000)] {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            let what = format!("{rows} x {classes}, {dtype:?}");
            let x = Var::from_tensor(&random(&[rows, classes], 1, dtype)?.to_device(&gpu)?)?;
            let target = indices(rows, classes, 2)?.to_device(&gpu)?;
            let problem = || nll(RowOptions::default());
            let forward = work_of(|| problem().forward(&x, &target))?;
            assert_eq!(forward, Work { launches: 1, allocations: 2, waits: 0 }, "{what}: forward");
            let both = work_of(|| problem().loss_and_grad(&x, &target))?;
            assert_eq!(both, Work { launches: 1, allocations: 2, waits: 0 }, "{what}: loss_and_grad");
            let loss = problem().forward(&x, &target)?;
            let backward = work_of(|| loss.backward())?;
            assert_eq!(backward, Work { launches: 1, allocations: 1, waits: 0 }, "{what}: backward");
        }
    }
    Ok(())
}

/// More rows than a block takes, or more elements than it writes: the blocks' sums lie beside the denominator.
#[test]
fn work_of_large_problems() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (rows, classes) in [(3000, 7), (67, 1003)] {
        for reduction in [Reduction::None, Reduction::Mean, Reduction::Sum] {
            let what = format!("{rows} x {classes}, {reduction:?}");
            let x = random(&[rows, classes], 1, DType::F32)?.to_device(&gpu)?;
            let target = indices(rows, classes, 2)?.to_device(&gpu)?;
            let problem = || nll(RowOptions { reduction, ..RowOptions::default() });
            let forward = work_of(|| problem().forward(&x, &target))?;
            assert_eq!(forward, Work { launches: 1, allocations: 2, waits: 0 }, "{what}: forward");
            let both = work_of(|| problem().loss_and_grad(&x, &target))?;
            assert_eq!(both, Work { launches: 2, allocations: 3, waits: 0 }, "{what}: loss_and_grad");
        }
    }
    Ok(())
}

/// A class out of range is NaN in its row alone, in the losses and in the gradient.
#[test]
fn a_bad_target_is_nan_in_its_row() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let x = random(&[3, 5], 1, DType::F32)?.to_device(&gpu)?;
    let target = Tensor::new(&[2i64, 5, (1 << 32) + 1], &gpu)?;
    let options = RowOptions { reduction: Reduction::None, ..RowOptions::default() };
    let (loss, grad) = nll(options).loss_and_grad(&x, &target)?;
    let nans = |values: Vec<f32>| values.iter().map(|v| v.is_nan()).collect::<Vec<_>>();
    assert_eq!(nans(loss.to_vec1()?), [false, true, true]);
    for (row, bad) in grad.to_vec2::<f32>()?.into_iter().zip([false, true, true]) {
        assert_eq!(nans(row), [bad; 5]);
    }
    Ok(())
}
