//! Small problems through every pass, for Miri: what unsafe code relies on, not the numbers, which the integration
//! tests look at.

use crate::rows::cpu::SEGMENT;
use crate::rows::options::RowOptions;
use crate::softmax::op::log_softmax;
use crate::softmax::problem::{CrossEntropy, SoftmaxOptions};
use candle_core::{DType, Device, Result, Tensor, Var};

fn problem(softcap: Option<f64>) -> CrossEntropy {
    let rows = RowOptions { ignore_index: 1, ..RowOptions::default() };
    let options = SoftmaxOptions { rows, label_smoothing: 0.1, softcap, ..SoftmaxOptions::default() };
    CrossEntropy { name: "test", axis: 1, options }
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
