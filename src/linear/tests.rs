//! Linear cross-entropy on CUDA: what it gives however its rows are cut, and what it asks of the device.

use super::cublas::PRODUCTS;
use super::matmul::{Update, product};
use super::problem::{Linear, LinearGradients, LinearOptions};
use super::scale::{Factors, masked, scaled, times_rows};
use crate::check::arithmetic;
use crate::cuda::testing::{FLOATS, assert_close, indices, numbers, random, tolerance};
use crate::cuda::work::{Work, work_of};
use crate::reduction::Reduction;
use candle_core::{DType, Device, Result, Tensor, Var};

/// hidden states, weight, bias, target on a device, the last row ignored.
struct Inputs {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
}

impl Inputs {
    fn new(rows: usize, features: usize, classes: usize, dtype: DType, device: &Device) -> Result<Self> {
        let mut target = indices(rows, classes, 4)?.to_vec1::<i64>()?;
        target[rows - 1] = -100;
        // logits of a few units
        let weight = (random(&[classes, features], 2, DType::F32)? * (0.5 / (features as f64).sqrt()))?;
        Ok(Inputs {
            hidden: random(&[rows, features], 1, dtype)?.to_device(device)?,
            weight: weight.to_dtype(dtype)?.to_device(device)?,
            bias: random(&[classes], 3, dtype)?.to_device(device)?,
            target: Tensor::new(target, &Device::Cpu)?.to_device(device)?,
        })
    }

    fn linear(&self, options: &LinearOptions) -> Result<Linear> {
        options.problem("linear", &self.hidden, &self.weight, Some(&self.bias), &self.target)
    }

    fn loss_and_grad(&self, options: &LinearOptions) -> Result<(Tensor, LinearGradients)> {
        self.linear(options)?.loss_and_grad(&self.hidden, &self.weight, Some(&self.bias), &self.target)
    }

    /// The loss, and twice its gradients through autograd for an upstream gradient that is not 1.
    fn backward(&self, options: &LinearOptions) -> Result<(Tensor, [[Tensor; 3]; 2])> {
        let var = |tensor: &Tensor| Var::from_tensor(tensor);
        let vars = [var(&self.hidden)?, var(&self.weight)?, var(&self.bias)?];
        let [hidden, weight, bias] = &vars;
        let loss = self.linear(options)?.forward(hidden, weight, Some(bias), &self.target)?;
        let upstream = random(&[loss.elem_count()], 5, loss.dtype())?.reshape(loss.shape())?;
        let upstream = (upstream.to_device(loss.device())? + 4.0)?;
        let gradients = || -> Result<[Tensor; 3]> {
            let grads = (&loss * &upstream)?.sum_all()?.backward()?;
            Ok(vars.each_ref().map(|var| grads.get(var).expect("a gradient").clone()))
        };
        Ok((loss.detach(), [gradients()?, gradients()?]))
    }
}

fn options(reduction: Reduction, chunk_rows: Option<usize>, class_weight: Option<Tensor>) -> LinearOptions {
    let mut options = LinearOptions { chunk_rows, ..Default::default() };
    options.softmax.rows.reduction = reduction;
    options.softmax.rows.weight = class_weight;
    options
}

const REDUCTIONS: [Reduction; 3] = [Reduction::None, Reduction::Mean, Reduction::Sum];
const NAMES: [&str; 3] = ["hidden", "weight", "bias"];

/// A unit of the logits and of their gradient in each of the products' terms, as both are rounded to the dtype; the
/// sums' order is another.
fn linear_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 | DType::BF16 => 4.0 * tolerance(dtype),
        dtype => tolerance(dtype),
    }
}

/// One chunk whose products wait for the backward, several that are summed, and the CPU. Rows with gaps (257, 1003),
/// without (40, 1000), of a power of two.
#[test]
fn chunks_give_what_the_cpu_gives() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for (rows, features, classes, weighted) in
        [(7, 8, 40, false), (5, 16, 257, true), (4, 8, 1000, true), (6, 5, 1003, false)]
    {
        for dtype in FLOATS {
            for reduction in REDUCTIONS {
                let class_weight = |device: &Device| -> Result<Option<Tensor>> {
                    let weight = (random(&[classes], 7, arithmetic(dtype))?.abs()? + 0.1)?.to_device(device)?;
                    Ok(weighted.then_some(weight))
                };
                let on = |device: &Device, chunk_rows| -> Result<_> {
                    let inputs = Inputs::new(rows, features, classes, dtype, device)?;
                    let options = options(reduction, chunk_rows, class_weight(device)?);
                    let (both, gradients) = inputs.loss_and_grad(&options)?;
                    let LinearGradients { hidden, weight, bias } = gradients;
                    let (loss, [first, second]) = inputs.backward(&options)?;
                    Ok(([loss, both], [first, second, [hidden, weight, bias.expect("a bias")]]))
                };
                let (losses, gradients) = on(&Device::Cpu, None)?;
                for chunk_rows in [None, Some(1), Some(3), Some(100)] {
                    let (got, got_gradients) = on(&gpu, chunk_rows)?;
                    let what = format!(
                        "{rows} x {features} x {classes}, {dtype:?}, {reduction:?}, weights {weighted}, \
                         chunks {chunk_rows:?}"
                    );
                    for (got, want) in got.iter().zip(&losses) {
                        assert_close(&format!("{what}: loss"), got, want, linear_tolerance(dtype));
                    }
                    let pairs = got_gradients.iter().flatten().zip(gradients.iter().flatten());
                    for ((got, want), name) in pairs.zip(NAMES.iter().cycle()) {
                        assert_close(&format!("{what}: {name}"), got, want, linear_tolerance(dtype));
                    }
                    for ((first, second), name) in got_gradients[0].iter().zip(&got_gradients[1]).zip(NAMES) {
                        assert_close(&format!("{what}: second backward, {name}"), second, first, 0.0);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Where no row counts, gradients are zeros, also of hidden states that are NaN.
#[test]
fn no_row_counts() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for chunk_rows in [None, Some(2)] {
            for reduction in REDUCTIONS {
                let mut inputs = Inputs::new(5, 8, 100, dtype, &gpu)?;
                inputs.target = Tensor::full(-100i64, 5, &gpu)?;
                inputs.hidden = Tensor::full(f32::NAN, (5, 8), &Device::Cpu)?.to_dtype(dtype)?.to_device(&gpu)?;
                let options = options(reduction, chunk_rows, None);
                let (_, LinearGradients { hidden, weight, bias }) = inputs.loss_and_grad(&options)?;
                let (loss, [first, second]) = inputs.backward(&options)?;
                let loss = loss.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                assert!(loss.iter().all(|l| if reduction == Reduction::Mean { l.is_nan() } else { *l == 0.0 }));
                let all = [hidden, weight, bias.expect("a bias")];
                for (gradient, name) in all.iter().chain(&first).chain(&second).zip(NAMES.iter().cycle()) {
                    let what = format!("{dtype:?}, {reduction:?}, chunks {chunk_rows:?}: {name}");
                    assert_close(&what, gradient, &gradient.zeros_like()?, 0.0);
                }
            }
        }
    }
    Ok(())
}

/// Launches, allocations and products of this crate. Products with the gradient of the logits of one chunk write the
/// gradients themselves; sums of several take a pass each, in their own memory where they are not rounded.
#[test]
fn work_of_chunks() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        let inputs = Inputs::new(6, 8, 1003, dtype, &gpu)?;
        let counted = |chunk_rows| -> Result<(Work, usize)> {
            let before = PRODUCTS.get();
            let work = work_of(|| inputs.loss_and_grad(&options(Reduction::Sum, chunk_rows, None)))?;
            Ok((work, PRODUCTS.get() - before))
        };
        counted(None)?;
        let (one, products) = counted(None)?;
        // the logits of the bias, the logits, and three gradients
        assert_eq!(products, 5, "{dtype:?}");
        let (three, products) = counted(Some(2))?;
        assert_eq!(products, 15, "{dtype:?}");
        // a mask of the rows, the copy of the hidden states that count, and the pass over the logits
        assert_eq!((one.launches, one.waits), (3, 0), "{dtype:?}");
        // the mask; of each chunk the copy and the pass; three sums
        assert_eq!((three.launches, three.waits), (1 + 3 * 2 + 3, 0), "{dtype:?}");
        let rounded = if dtype == arithmetic(dtype) { 0 } else { 3 };
        // six rows of doubles take several blocks, and partial sums that two rows do without
        let sums = (dtype == DType::F64) as usize;
        assert_eq!(three.allocations + sums - one.allocations, 2 * 2 + rounded, "{dtype:?}");
    }
    Ok(())
}

/// The kernel against the CPU, for matrices that packs fit and others, aligned or not.
#[test]
fn scaling_matches_the_cpu() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for (rows, columns) in [(1, 1), (1, 4099), (3, 16), (5, 24), (7, 33), (70, 128)] {
            let of = |seed, shape: &[usize], dtype| random(shape, seed, dtype);
            let sum = of(1, &[rows, columns], arithmetic(dtype))?;
            let (all, by_row) = (of(2, &[1], arithmetic(dtype))?.squeeze(0)?, of(3, &[rows], arithmetic(dtype))?);
            let what = format!("{rows} x {columns}, {dtype:?}");
            for of_rows in [None, Some(&by_row)] {
                let want = scaled(sum.copy()?, Factors { all: &all, rows: of_rows }, dtype)?;
                let (all, of_rows) = (all.to_device(&gpu)?, of_rows.map(|rows| rows.to_device(&gpu)).transpose()?);
                let factors = Factors { all: &all, rows: of_rows.as_ref() };
                assert_close(&what, &scaled(sum.to_device(&gpu)?, factors, dtype)?, &want, 0.0);
            }
            // windows at every offset
            let mask =
                Tensor::new(numbers(rows, 4).iter().map(|v| (*v > 0.0) as u8).collect::<Vec<_>>(), &Device::Cpu)?;
            let mask = mask.unsqueeze(1)?;
            for offset in 0..3 {
                let memory = of(5, &[rows + offset, columns], dtype)?;
                let windows = |device: &Device| memory.to_device(device)?.narrow(0, offset, rows);
                let want = times_rows(&windows(&Device::Cpu)?, &by_row)?;
                assert_close(&what, &times_rows(&windows(&gpu)?, &by_row.to_device(&gpu)?)?, &want, 0.0);
                let want = masked(&windows(&Device::Cpu)?, &mask)?;
                assert_close(&what, &masked(&windows(&gpu)?, &mask.to_device(&gpu)?)?, &want, 0.0);
            }
        }
    }
    Ok(())
}

/// A factor on the device, and what is replaced holds NaN.
#[test]
fn products_times_a_factor() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        for factor in [0.25, -3.0, 0.0] {
            let (lhs, rhs) = (random(&[5, 7], 1, dtype)?, random(&[9, 7], 2, dtype)?);
            let on = |device: &Device| -> Result<Tensor> {
                let dtype = if device.is_cpu() { arithmetic(dtype) } else { dtype };
                let of = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_device(device);
                let to = of(&Tensor::full(f32::NAN, (5, 9), &Device::Cpu)?)?;
                let factor = Tensor::new(factor, &Device::Cpu)?.to_dtype(arithmetic(dtype))?.to_device(device)?;
                product(&to, &of(&lhs)?, &of(&rhs)?.t()?, Update::ReplaceTimes(&factor))?;
                Ok(to)
            };
            let want = on(&Device::Cpu)?.to_dtype(dtype)?;
            assert_close(&format!("{dtype:?} times {factor}"), &on(&gpu)?, &want, tolerance(dtype));
        }
    }
    Ok(())
}

/// Products of one device at the same time, with scalars of the host and of the device: each has the scalars that it
/// was given.
#[test]
fn threads_share_a_device() -> Result<()> {
    let gpu = Device::new_cuda(0)?;
    let (lhs, rhs) = (random(&[3, 4], 1, DType::F32)?, random(&[4, 5], 2, DType::F32)?);
    let want = lhs.matmul(&rhs)?;
    std::thread::scope(|scope| {
        let work = |scales: bool| {
            let (gpu, lhs, rhs, want) = (&gpu, &lhs, &rhs, &want);
            move || -> Result<()> {
                let (lhs, rhs) = (lhs.to_device(gpu)?, rhs.to_device(gpu)?);
                let two = Tensor::full(2f32, (), gpu)?;
                for _ in 0..20 {
                    let got = if scales {
                        let to = Tensor::zeros((3, 5), DType::F32, gpu)?;
                        product(&to, &lhs, &rhs, Update::ReplaceTimes(&two))?;
                        (to / 2.0)?
                    } else {
                        lhs.matmul(&rhs)?
                    };
                    assert_close("a product", &got, want, 1e-6);
                }
                Ok(())
            }
        };
        let threads = [scope.spawn(work(true)), scope.spawn(work(false)), scope.spawn(work(true))];
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}
