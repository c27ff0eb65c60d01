//! What becomes of f16 training without a loss scale.
//!
//! A network learns vectors of digits whose product says whether two images show the same one. The loss is the mean
//! over all pairs of the training images, 52 million of them, so that no logit's gradient is larger than 2e-8. f16 has
//! nothing between 0 and 6e-8: every gradient becomes 0, and the network stays what it was. `with_grad_scale`
//! multiplies the gradient ahead of its rounding to f16, and the weights' gradients, which are f32, are divided by the
//! same number. Data, initial weights and steps are the same each time; the weights are always kept in f32.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_fused_loss::BceWithLogitsLoss;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

use crate::chart::{Line, Panel};
use crate::data::{self, Sample};
use crate::losses::Implementation;
use crate::model::Mlp;
use crate::options::Options;
use crate::rng::Rng;
use crate::tasks;

/// Pixels along a side of an image.
const SIDE: usize = 8;
const HIDDEN: usize = 128;
/// Numbers in a vector.
const WIDTH: usize = 16;
/// The logit of a tenth, the share of pairs that show the same digit: without it, the first steps are spent on that.
const PRIOR: f64 = -2.2;
/// Each with all of the pairs.
const STEPS: u32 = 40;
const QUICK_STEPS: u32 = 6;
const LEARNING_RATE: f64 = 1.5e-2;
/// The products of the gradients and the vectors, sums over thousands of pairs, stay well below f16's largest number.
const GRAD_SCALE: f64 = 65536.0;
/// How far a run with a loss scale may end from f32.
const NEAR: f64 = 0.01;
/// How far below f32 a run that did not learn ends at least.
const STALLED: f64 = 0.15;

struct Precision {
    name: &'static str,
    /// Of all but the weights, their gradients and the optimizer.
    dtype: DType,
    grad_scale: f64,
}

const PRECISIONS: [Precision; 3] = [
    Precision { name: "f32", dtype: DType::F32, grad_scale: 1.0 },
    Precision { name: "f16", dtype: DType::F16, grad_scale: 1.0 },
    Precision { name: "f16, scaled", dtype: DType::F16, grad_scale: GRAD_SCALE },
];

struct Images {
    /// `(N, 64)`
    features: Tensor,
    /// `(N, N)` u8: 1 where two images show the same digit.
    same: Tensor,
}

struct Outcome {
    name: &'static str,
    losses: Vec<f32>,
    /// Share of the pairs whose logit had a gradient of 0, in the first step.
    zeros: f64,
    /// Of held-out pairs: the mean of the share of right answers among pairs of the same digit and among the others.
    accuracy: f64,
    seconds: f64,
}

pub struct F16Demo {
    outcomes: Vec<Outcome>,
}

pub fn run(options: &Options, device: &Device) -> Result<F16Demo> {
    ensure!(options.loss == Implementation::Fused, "--task f16-demo is about this crate's losses: leave out --loss");
    let mut samples = tasks::digit_images()?;
    data::standardise(&mut samples);
    let train = images(&samples.train, true, device)?;
    let held_out = images(&samples.held_out, false, device)?;
    let run = |precision| run_one(precision, &train, &held_out, options);
    Ok(F16Demo { outcomes: PRECISIONS.iter().map(run).collect::<Result<_>>()? })
}

/// The images and, if shifted, each of them once more a pixel further up, down, left and right.
fn images(rows: &[Sample], shifted: bool, device: &Device) -> Result<Images> {
    let pixels: Vec<f32> = rows.iter().flat_map(|row| row.features.iter().copied()).collect();
    let images = Tensor::from_vec(pixels, (rows.len(), SIDE, SIDE), device)?;
    let label: Vec<u32> = rows.iter().map(|row| row.label as u32).collect();
    let label = Tensor::from_vec(label, rows.len(), device)?;
    let mut copies = vec![images.clone()];
    for axis in if shifted { vec![1, 2] } else { vec![] } {
        copies.push(images.pad_with_zeros(axis, 1, 0)?.narrow(axis, 0, SIDE)?);
        copies.push(images.pad_with_zeros(axis, 0, 1)?.narrow(axis, 1, SIDE)?);
    }
    let label = Tensor::cat(&vec![label; copies.len()], 0)?;
    let same = label.unsqueeze(1)?.broadcast_eq(&label.unsqueeze(0)?)?;
    Ok(Images { features: Tensor::cat(&copies, 0)?.flatten_from(1)?, same })
}

/// How alike the images of each pair are: `(N, N)`.
fn logits(vectors: &Tensor) -> Result<Tensor> {
    Ok(((vectors / WIDTH as f64)?.matmul(&vectors.t()?)? + PRIOR)?)
}

fn run_one(precision: &Precision, train: &Images, held_out: &Images, options: &Options) -> Result<Outcome> {
    let mut rng = Rng::new(options.seed);
    let model = Mlp::new(SIDE * SIDE, HIDDEN, WIDTH, &mut rng, train.features.device())?;
    let parameters = ParamsAdamW { lr: LEARNING_RATE, weight_decay: 0.0, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(model.vars(), parameters)?;
    let steps = options.epochs.unwrap_or(if options.quick { QUICK_STEPS } else { STEPS });
    let started = Instant::now();
    let (mut losses, mut zeros) = (Vec::new(), None);
    for _ in 0..steps {
        let (loss, grad) = step(precision, &model, &mut optimizer, train)?;
        losses.push(loss);
        if zeros.is_none() {
            zeros = Some(share(&grad.eq(0.0)?)?);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let vectors = model.forward_in(precision.dtype, &held_out.features)?.detach();
    let accuracy = accuracy(&logits(&vectors)?, &held_out.same)?;
    let outcome = Outcome { name: precision.name, losses, zeros: zeros.context("no step")?, accuracy, seconds };
    println!("{:12} {} steps, held-out accuracy {:.1} %", outcome.name, outcome.losses.len(), 100.0 * accuracy);
    Ok(outcome)
}

/// One step of the optimizer. Returns the loss before it, and the gradient of the logits, scaled.
fn step(precision: &Precision, model: &Mlp, optimizer: &mut AdamW, images: &Images) -> Result<(f32, Tensor)> {
    let vectors = model.forward_in(precision.dtype, &images.features)?;
    let constant = vectors.detach();
    let loss = BceWithLogitsLoss::new().with_grad_scale(precision.grad_scale);
    let (loss, grad) = loss.loss_and_grad(&logits(&constant)?, &images.same)?;
    // Each vector stands in the rows and in the columns of the pairs, which are symmetric.
    let vector_grad = (grad.matmul(&constant)? * (2.0 / WIDTH as f64))?;
    // A scalar whose gradient with respect to the vectors is this one.
    let mut grads = (&vectors * &vector_grad)?.sum_all()?.backward()?;
    for weight in model.vars() {
        let scaled = grads.get(&weight).context("a weight without a gradient")?;
        let grad = (scaled / precision.grad_scale)?;
        grads.insert(&weight, grad);
    }
    optimizer.step(&grads)?;
    Ok((loss.to_scalar()?, grad))
}

/// Of a u8 tensor, the share of ones.
fn share(of: &Tensor) -> Result<f64> {
    // rows first, since f32 counts no further than to 16 million
    let rows = of.to_dtype(DType::F32)?.mean(1)?;
    Ok(f64::from(rows.mean_all()?.to_scalar::<f32>()?))
}

fn accuracy(logits: &Tensor, same: &Tensor) -> Result<f64> {
    let found = logits.gt(0.0)?;
    let right = share(&(&found * same)?)? / share(same)?;
    let different = same.eq(0u8)?;
    let rejected = share(&(found.eq(0u8)? * &different)?)? / share(&different)?;
    Ok((right + rejected) / 2.0)
}

impl F16Demo {
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<14}{:>12}{:>11}{:>11}{:>17}{:>9}\n",
            "f16-demo", "first loss", "last loss", "held-out", "gradients of 0", "step"
        );
        for outcome in &self.outcomes {
            text += &format!(
                "{:<14}{:>12.4}{:>11.4}{:>9.1} %{:>15.1} %{:>6.0} ms\n",
                outcome.name,
                outcome.losses.first().copied().unwrap_or(f32::NAN),
                outcome.losses.last().copied().unwrap_or(f32::NAN),
                100.0 * outcome.accuracy,
                100.0 * outcome.zeros,
                1e3 * outcome.seconds / outcome.losses.len() as f64,
            );
        }
        text
    }

    /// f16 has to learn as f32 does with a loss scale, and not to learn without.
    pub fn failures(&self) -> Vec<String> {
        let [f32, plain, scaled] = &self.outcomes[..] else { return vec!["f16-demo: a run is missing".to_string()] };
        let percent = |outcome: &Outcome| format!("{:.1} % ({})", 100.0 * outcome.accuracy, outcome.name);
        let mut failures = Vec::new();
        if f32.accuracy - scaled.accuracy > NEAR {
            failures.push(format!("f16-demo: {} is far below {}", percent(scaled), percent(f32)));
        }
        if f32.accuracy - plain.accuracy < STALLED {
            failures.push(format!("f16-demo: {} did not stall, see {}", percent(plain), percent(f32)));
        }
        failures
    }

    pub fn panel(&self) -> Panel {
        let lines = self.outcomes.iter().map(|outcome| Line::new(outcome.name.to_string(), &outcome.losses)).collect();
        Panel { title: "f16-demo: the same digit?".to_string(), x: "step", lines, mark: None }
    }
}
