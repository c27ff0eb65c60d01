//! Small problems through every pass, for Miri: what unsafe code relies on, not the numbers, which the integration
//! tests look at; and results past the cache, which are large elsewhere.

use crate::cpu::stream::FORCED;
use crate::reduction::LossForm;
use crate::rows::cpu::{BLOCK, SEGMENT};
use crate::rows::options::RowOptions;
use crate::softmax::op::log_softmax;
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
use candle_core::{DType, Device, Result, Tensor, Var};

fn problem(softcap: Option<f64>) -> CrossEntropy {
    let rows = RowOptions { ignore_index: 1, ..RowOptions::default() };
    let options = SoftmaxOptions { rows, label_smoothing: 0.1, softcap, ..SoftmaxOptions::default() };
    CrossEntropy { name: "test", axis: 1, form: LossForm::MEAN, options }
}

/// All passes of cross-entropy and of log-softmax; the losses of the two ways to the gradient, and in place, are the
/// same.
fn all_passes(problem: &CrossEntropy, x: &Tensor, target: &Tensor) -> Result<()> {
    let x = Var::from_tensor(x)?;
    let loss = problem.clone().forward(&x, target)?;
    let grads = loss.backward()?;
    assert_eq!(grads.get(&x).map(|grad| grad.dims().to_vec()), Some(x.dims().to_vec()));
    let x = x.as_detached_tensor();
    let (again, grad) = problem.clone().loss_and_grad(&x, target)?;
    let in_place = x.copy()?.contiguous()?;
    let inplace_loss = problem.clone().loss_and_grad_inplace(&in_place, target)?;
    let number = |t: &Tensor| t.to_dtype(DType::F64)?.to_scalar::<f64>();
    let (loss, again, inplace_loss) = (number(&loss)?, number(&again)?, number(&inplace_loss)?);
    assert!((loss - again).abs() <= 1e-5 * loss.abs() && again == inplace_loss, "{loss} {again} {inplace_loss}");
    let difference = (grad.to_dtype(DType::F64)? - in_place.to_dtype(DType::F64)?)?.abs()?.max_all()?;
    assert_eq!(number(&difference)?, 0.0);
    problem.clone().forward_with_statistics(&x, target)?;
    let x = Var::from_tensor(&x)?;
    log_softmax("log_softmax", true, &x, 1)?.sqr()?.sum_all()?.backward()?;
    Ok(())
}

#[test]
fn small_rows_keep_to_their_memory() -> Result<()> {
    let device = &Device::Cpu;
    // tiles of adjacent classes and of classes that lie apart, several of these side by side, strips of several rows
    for dims in [vec![3, 5], vec![2, 3, 4], vec![2, 5, 40], vec![2, 70]] {
        let x = Tensor::rand(-2f32, 2., dims.clone(), device)?;
        let index_dims = [&dims[..1], &dims[2..]].concat();
        let rows: usize = index_dims.iter().product();
        let index: Vec<u32> = (0..rows as u32).map(|row| row % dims[1] as u32).collect();
        let index = Tensor::from_vec(index, index_dims, device)?;
        for (dtype, softcap) in [(DType::F16, None), (DType::BF16, Some(3.0))] {
            all_passes(&problem(softcap), &x.to_dtype(dtype)?, &index)?;
        }
        if dims == [2, 70] {
            FORCED.set(true);
            all_passes(&problem(None), &x.to_dtype(DType::BF16)?, &index)?;
            FORCED.set(false);
        }
        let mut soft = problem(None);
        soft.options.rows.ignore_index = -100;
        all_passes(&soft, &x, &Tensor::rand(0f32, 1., dims, device)?)?;
    }
    Ok(())
}

/// Few long rows: several tasks share each.
#[test]
fn small_segments_keep_to_their_memory() -> Result<()> {
    let classes = 2 * SEGMENT + 5;
    let x = Tensor::rand(-2f32, 2., (1, classes), &Device::Cpu)?;
    all_passes(&problem(None), &x, &Tensor::new(&[7u32], &Device::Cpu)?)
}

/// Stored past the cache, a result is the same to the last bit: rows of any alignment, some of which are ignored.
#[test]
fn results_past_the_cache_are_the_same() -> Result<()> {
    for (rows, classes) in [(70, 70), (5, 5000), (40, 1000), (9, 33), (2, 40_000)] {
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let x = Tensor::randn(0f32, 3., (rows, classes), &Device::Cpu)?.to_dtype(dtype)?;
            let target: Vec<u32> = (0..rows as u32).map(|row| row % 7).collect();
            let target = Tensor::from_vec(target, rows, &Device::Cpu)?;
            for softcap in [None, Some(5.0)] {
                let results = |past_cache: bool| {
                    FORCED.set(past_cache);
                    let (_, grad) = problem(softcap).loss_and_grad(&x, &target)?;
                    let log_probs = log_softmax("log_softmax", true, &x, 1)?;
                    FORCED.set(false);
                    let bits = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
                    Ok::<_, candle_core::Error>((bits(&grad)?, bits(&log_probs)?))
                };
                assert_eq!(results(true)?, results(false)?, "{rows} x {classes} {dtype:?} {softcap:?}");
            }
        }
    }
    Ok(())
}

/// The gradient of rows of several blocks comes from exponentials that are relative to the maximum so far: whether it
/// rises, falls, or is another block's twice, the gradient is that of f64. So it is where several such rows are one
/// unit of work, up to as many of as many blocks as one can have.
#[test]
fn gradients_of_rising_and_falling_rows() -> Result<()> {
    for (rows, classes) in [(5, 3 * BLOCK + 100), (100, 3 * BLOCK + 100), (300, BLOCK + 1)] {
        let slopes = [30.0, -30.0, 0.0, 200.0, -200.0];
        let value = |row: usize, i: usize| {
            let noise = ((i * 7919) % 1024) as f64 / 256.0;
            // exact in f32, and their differences too
            ((slopes[row % 5] * i as f64 / classes as f64 + noise) * 256.0).round() / 256.0
        };
        let x: Vec<f64> = (0..rows * classes).map(|at| value(at / classes, at % classes)).collect();
        let x = Tensor::from_vec(x, (rows, classes), &Device::Cpu)?;
        let targets = [0, 2, 1500, classes as u32 - 101, classes as u32 - 100];
        let target: Vec<u32> = (0..rows).map(|row| targets[row % 5]).collect();
        let target = Tensor::from_vec(target, rows, &Device::Cpu)?;
        let mut plain = problem(None);
        (plain.options.label_smoothing, plain.options.rows.ignore_index) = (0.0, -100);
        let (_, want) = plain.clone().loss_and_grad(&x, &target)?;
        let (_, got) = plain.loss_and_grad(&x.to_dtype(DType::F32)?, &target)?;
        let (want, got) = (want.flatten_all()?.to_vec1::<f64>()?, got.flatten_all()?.to_vec1::<f32>()?);
        for (i, (want, got)) in want.into_iter().zip(got).enumerate() {
            // two exponentials of an ulp each, the sum and two products: 6 units, as everywhere; below the normal
            // numbers 0
            let bound = 6.0 * f32::EPSILON as f64 * want.abs() + f32::MIN_POSITIVE as f64;
            assert!((want - got as f64).abs() <= bound, "{rows} x {classes}, element {i}: {want} {got}");
        }
    }
    Ok(())
}
