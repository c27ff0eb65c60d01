//! Gradients of gradients, which candle computes where `CANDLE_GRAD_DO_NOT_DETACH` is set: they are right, and never
//! silently those of the first order.
//!
//! A binary of its own, with one test, because the variable belongs to the process.

mod elements;

use std::panic::resume_unwind;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, LinearCrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss,
    RowTransform, SigmoidFocalLoss, log_softmax,
};

const VARIABLE: &str = "CANDLE_GRAD_DO_NOT_DETACH";

const AT: [f64; 6] = [0.3, -0.2, 1.1, 0.9, 0.1, -0.4];

type Loss<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;

fn devices() -> Result<Vec<Device>> {
    Ok(vec![
        Device::Cpu,
        #[cfg(feature = "cuda")]
        Device::new_cuda(0)?,
    ])
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_vec1()
}

/// Every loss as a function of a `(2, 3)` of f64.
fn losses(device: &Device) -> Result<Vec<(&'static str, Loss<'static>)>> {
    let classes = Tensor::new(&[2i64, 0], device)?;
    let labels = Tensor::new(&[[1f64, 0., 1.], [0., 0.3, 1.]], device)?;
    let weight = Tensor::new(&[0.5f64, 2., 1.5], device)?;
    let head = Tensor::new(&[[0.4f64, -1., 0.3], [1.2, 0.1, -0.7], [0.2, 0.9, 0.5], [-0.3, 0.6, 1.]], device)?;
    let options = CrossEntropyLoss::new().with_weight(weight.clone()).with_label_smoothing(0.1).with_z_loss(0.02);
    let options = options.with_softcap(3.0).with_logit_scale(1.5);
    let (c, l) = (classes, labels);
    let rows = Tensor::new(&[0.5f64, 2.], device)?;
    let transformed = |transform: RowTransform| -> Loss<'static> {
        let loss = CrossEntropyLoss::new().with_row_weight(rows.clone()).with_row_transform(transform);
        let target = c.clone();
        Box::new(move |x| loss.forward(x, &target))
    };
    let with = |target: &Tensor, f: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Loss<'static> {
        let target = target.clone();
        Box::new(move |x| f(x, &target))
    };
    Ok(vec![
        ("cross-entropy", with(&c, |x, t| CrossEntropyLoss::new().forward(x, t))),
        ("with options", {
            let c = c.clone();
            Box::new(move |x| options.forward(x, &c))
        }),
        ("beside statistics", with(&c, |x, t| Ok(CrossEntropyLoss::new().forward_with_statistics(x, t)?.0))),
        ("softmax focal", transformed(RowTransform::Focal { gamma: 1.5 })),
        ("poly-1", transformed(RowTransform::Poly1 { epsilon: 2.0 })),
        ("generalised cross-entropy", transformed(RowTransform::GeneralizedCe { q: 0.7 })),
        ("of probabilities", with(&l, |x, t| CrossEntropyLoss::new().forward(x, t))),
        ("nll", with(&c, |x, t| NllLoss::new().forward(&log_softmax(x, D::Minus1)?, t))),
        ("log-softmax", Box::new(|x| log_softmax(x, 1)?.sqr()?.sum_all())),
        ("bce", with(&l, |x, t| BceLoss::new().forward(&candle_nn::ops::sigmoid(x)?, t))),
        ("bce with logits", with(&l, |x, t| BceWithLogitsLoss::new().forward(x, t))),
        ("multi-label", with(&l, |x, t| MultiLabelSoftMarginLoss::new().forward(x, t))),
        ("focal", with(&l, |x, t| SigmoidFocalLoss::new().forward(x, t))),
        ("linear", Box::new(move |x| LinearCrossEntropyLoss::new().forward(x, &head, None, &c))),
    ])
}

/// The loss and the squares of its gradient, and the derivative of their sum.
fn penalised(x: &Tensor, loss: &Loss) -> Result<(f64, Vec<f64>)> {
    let x = Var::from_tensor(x)?;
    let loss = loss(&x)?;
    let grads = loss.backward()?;
    let Some(grad) = grads.get(&x) else { candle_core::bail!("no gradient") };
    let sum = (&loss + grad.sqr()?.sum_all()?)?;
    let grads = sum.backward()?;
    let Some(grad) = grads.get(&x) else { candle_core::bail!("no second gradient") };
    Ok((sum.to_scalar()?, values(grad)?))
}

/// Losses ahead of the variable, and their backward after it.
fn set_too_late() -> Result<()> {
    let mut early = vec![];
    // devices of this thread: on CUDA each has a stream of its own
    for device in devices()? {
        let var = Var::from_tensor(&Tensor::from_slice(&AT, (2, 3), &device)?)?;
        for (name, loss) in losses(&device)? {
            early.push((name, loss(&var)?));
        }
    }
    // SAFETY: the thread of the test waits for this one
    unsafe { std::env::set_var(VARIABLE, "1") };
    for (name, loss) in early {
        let error = loss.backward().err().unwrap_or_else(|| panic!("{name}: a gradient without a graph"));
        assert!(error.to_string().contains(VARIABLE), "{name}: {error}");
    }
    Ok(())
}

#[test]
fn gradients_of_gradients() -> Result<()> {
    // SAFETY: no other thread of this process runs while its only test does, but those of thread pools, which read no
    // environment
    unsafe { std::env::remove_var(VARIABLE) };
    std::thread::spawn(set_too_late).join().unwrap_or_else(|panic| resume_unwind(panic))?;
    elements::penalties_have_the_gradients_of_central_differences()?;
    for device in devices()? {
        let x = Tensor::from_slice(&AT, (2, 3), &device)?;
        for (name, loss) in losses(&device)? {
            let (_, got) = penalised(&x, &loss)?;
            for (i, got) in got.into_iter().enumerate() {
                let step = 1e-5;
                let moved = |by: f64| -> Result<f64> {
                    let mut at = AT;
                    at[i] += by;
                    Ok(penalised(&Tensor::from_slice(&at, (2, 3), &device)?, &loss)?.0)
                };
                let want = (moved(step)? - moved(-step)?) / (2.0 * step);
                // a difference's error is of the order of the square of its step, and of the rounding over it
                assert!((got - want).abs() < 1e-8 * (1.0 + want.abs()), "{name}[{i}]: got {got}, expected {want}");
            }
        }
        // without a graph the kernels serve as ever
        let (loss, grad) = CrossEntropyLoss::new().loss_and_grad(&x, &Tensor::new(&[2i64, 0], &device)?)?;
        assert!(loss.to_scalar::<f64>()?.is_finite() && grad.dtype() == DType::F64);
    }
    Ok(())
}
