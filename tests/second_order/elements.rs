//! The losses of elements, with targets and options at which derivatives are special.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{BceLoss, BceWithLogitsLoss, L1Loss, MultiLabelSoftMarginLoss, SigmoidFocalLoss};

type Forward = Box<dyn Fn(&Tensor, &Tensor) -> Result<Tensor>>;
type LossAndGrad = Box<dyn Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>>;

macro_rules! loss {
    ($name:expr, $loss:expr) => {{
        let (one, other) = ($loss, $loss);
        let forward: Forward = Box::new(move |x, t| one.forward(x, t));
        let loss_and_grad: LossAndGrad = Box::new(move |x, t| other.loss_and_grad(x, t));
        ($name.to_string(), forward, loss_and_grad)
    }};
}

fn losses() -> Result<Vec<(String, Forward, LossAndGrad)>> {
    let numbers = |values: &[f64]| Tensor::from_slice(values, values.len(), &Device::Cpu);
    let (weight, pos_weight) = (numbers(&[0.5, 2.0, 0.0, 1.0])?, numbers(&[3.0, 0.25, 1.0, 2.0])?);
    let mask = numbers(&[1.0, 1.0, 1.0, 0.0])?;
    let logits = BceWithLogitsLoss::new;
    let mut losses = vec![
        loss!("bce", BceLoss::new()),
        loss!("bce, weight", BceLoss::new().with_weight(weight.clone())),
        loss!("logits", logits()),
        loss!("logits, smoothing", logits().with_label_smoothing(0.2)),
        loss!(
            "logits, all",
            logits().with_weight(weight.clone()).with_pos_weight(pos_weight.clone()).with_mask(mask.clone())
        ),
        loss!("margin", MultiLabelSoftMarginLoss::new().with_weight(weight.clone())),
        loss!("l1", L1Loss::new().with_weight(weight.clone()).with_mask(mask.clone())),
    ];
    for gamma in [0.0, 0.5, 1.0, 2.0, 3.5] {
        losses.push(loss!(format!("focal {gamma}"), SigmoidFocalLoss::new().with_gamma(gamma)));
        losses
            .push(loss!(format!("focal {gamma}, alpha 1"), SigmoidFocalLoss::new().with_gamma(gamma).with_alpha(1.0)));
    }
    Ok(losses)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_vec1()
}

/// `loss + sum g^2` and its gradients in x and t, g being the gradient of the loss in x: the gradients of a second
/// backward against central differences of the fused kernels' first ones.
pub fn penalties_have_the_gradients_of_central_differences() -> Result<()> {
    let device = Device::Cpu;
    // the logit 0, where absolute values have a corner; labels of 0 and 1, and others
    let x = [[0.75, -1.25, 0.0, 2.0], [-0.5, 1.5, 3.0, -2.5], [0.3, -4.0, 0.0, 1.0]];
    let t = [[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.4, 0.8, 0.6, 0.5]];
    for (name, forward, loss_and_grad) in losses()? {
        let (mut x, mut t) = (Tensor::new(&x, &device)?, Tensor::new(&t, &device)?);
        if name.starts_with("bce") {
            // probabilities and targets with room on either side
            (x, t) = (candle_nn::ops::sigmoid(&(x * 0.3)?)?, t.affine(0.8, 0.1)?);
        }
        let (x, t) = (Var::from_tensor(&x)?, Var::from_tensor(&t)?);
        let loss = forward(&x, &t)?;
        let first = loss.backward()?;
        let g = first.get(&x).expect("a gradient");
        let second = (loss + g.sqr()?.sum_all()?)?.backward()?;

        let penalized = |x: &Tensor, t: &Tensor| -> Result<f64> {
            let (loss, g) = loss_and_grad(x, t)?;
            (loss + g.sqr()?.sum_all()?)?.to_scalar()
        };
        for (what, var) in [("x", &x), ("t", &t)] {
            let got = numbers(second.get(var).expect("a gradient"))?;
            for (i, got) in got.iter().enumerate() {
                // of four points: the error is h^4 times a fifth derivative, 1e-16, and the rounding of a sum over h
                let h = 1e-4;
                let moved = |by: f64| -> Result<f64> {
                    let mut values = numbers(var)?;
                    values[i] += by;
                    let moved = Tensor::from_vec(values, var.dims(), &device)?;
                    if what == "x" { penalized(&moved, &t.detach()) } else { penalized(&x.detach(), &moved) }
                };
                let want = (8.0 * (moved(h)? - moved(-h)?) - (moved(2.0 * h)? - moved(-2.0 * h)?)) / (12.0 * h);
                assert!(
                    (got - want).abs() < 1e-9 * (1.0 + want.abs()),
                    "{name}: in {what}[{i}] {got}, expected {want}"
                );
            }
        }
        assert_eq!(second.get(&x).expect("a gradient").dtype(), DType::F64);
    }
    Ok(())
}
