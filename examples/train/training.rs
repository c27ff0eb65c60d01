//! The training loop, and the clocks around it.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW};
use indicatif::{ProgressBar, ProgressStyle};

use crate::losses::{Implementation, Loss};
use crate::model::Mlp;
use crate::options::Options;
use crate::rng::Rng;
use crate::tasks::Task;

/// What a training run came to.
pub struct Outcome {
    pub task: &'static str,
    pub implementation: Implementation,
    pub epochs: usize,
    /// Held-out, after the last epoch.
    pub accuracy: f32,
    pub step_losses: Vec<f32>,
    /// Means over an epoch's steps.
    pub train_losses: Vec<f32>,
    pub held_out_losses: Vec<f32>,
    /// The largest magnitude of a logit in any step whose loss was finite.
    pub largest_logit: f32,
    pub overflow: Option<Overflow>,
    /// Medians over the steps: the first also starts threads and loads kernels, and other programs interrupt some.
    pub loss_time: Duration,
    pub step_time: Duration,
}

/// The first step whose loss was not finite.
pub struct Overflow {
    pub step: usize,
    pub loss: f32,
    pub largest_logit: f32,
}

pub fn train(task: &Task, implementation: Implementation, loss: Loss, options: &Options) -> Result<Outcome> {
    let device = task.train.features.device();
    let mut rng = Rng::new(options.seed);
    let inputs = task.train.features.dim(1)?;
    let model = Mlp::new(inputs, task.hidden, task.outputs, &mut rng, device)?;
    let parameters = ParamsAdamW { lr: task.learning_rate, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(model.vars(), parameters)?;

    let epochs = options.epochs(task.epochs);
    let mut outcome = Outcome::new(task.name, implementation, epochs);
    let mut clocks = Clocks::default();
    let bar = progress_bar(&format!("{} ({})", task.name, implementation.name()), epochs);
    for epoch in 0..epochs {
        for rows in rng.permutation(task.train.rows()?).chunks(task.batch) {
            let started = start(device)?;
            let rows = Tensor::new(rows, device)?;
            let features = task.train.features.index_select(&rows, 0)?;
            let target = task.train.target.index_select(&rows, 0)?;
            let logits = model.forward(&features)?;
            let value = loss(&logits, &target)?;
            optimizer.backward_step(&value)?;
            let step_time = stop(device, started)?;

            clocks.add(time_loss(loss, &logits, &target)?, step_time);
            outcome.record(value.to_scalar()?, largest(&logits)?);
        }
        outcome.close_epoch();
        let (held_out_loss, accuracy) = evaluate(task, &model, loss)?;
        outcome.held_out_losses.push(held_out_loss);
        outcome.accuracy = accuracy;
        show(&bar, epoch, epochs, &outcome);
    }
    bar.finish_and_clear();
    (outcome.loss_time, outcome.step_time) = clocks.medians();
    println!("{}", crate::report::sentence(&outcome));
    Ok(outcome)
}

impl Outcome {
    fn new(task: &'static str, implementation: Implementation, epochs: usize) -> Self {
        Self {
            task,
            implementation,
            epochs,
            accuracy: 0.,
            step_losses: Vec::new(),
            train_losses: Vec::new(),
            held_out_losses: Vec::new(),
            largest_logit: 0.,
            overflow: None,
            loss_time: Duration::ZERO,
            step_time: Duration::ZERO,
        }
    }

    fn record(&mut self, loss: f32, largest_logit: f32) {
        self.step_losses.push(loss);
        if loss.is_finite() {
            self.largest_logit = self.largest_logit.max(largest_logit);
        } else if self.overflow.is_none() {
            self.overflow = Some(Overflow { step: self.step_losses.len(), loss, largest_logit });
        }
    }

    fn close_epoch(&mut self) {
        let steps = self.step_losses.len() / (self.train_losses.len() + 1);
        let last = &self.step_losses[self.step_losses.len() - steps..];
        self.train_losses.push(last.iter().sum::<f32>() / steps as f32);
    }
}

fn evaluate(task: &Task, model: &Mlp, loss: Loss) -> Result<(f32, f32)> {
    let logits = model.forward(&task.held_out.features)?.detach();
    let value = loss(&logits, &task.held_out.target)?.to_scalar()?;
    Ok((value, (task.accuracy)(&logits, &task.held_out.target)?))
}

fn largest(logits: &Tensor) -> Result<f32> {
    Ok(logits.abs()?.max_all()?.to_scalar()?)
}

/// Time of the loss alone, forward and backward, on the logits of the step just taken. `backward_step` runs the loss's
/// backward pass amid the network's, so the loss is run once more on its own; that is not part of the step's time.
fn time_loss(loss: Loss, logits: &Tensor, target: &Tensor) -> Result<Duration> {
    let device = logits.device();
    let logits = Var::from_tensor(&logits.detach())?;
    let started = start(device)?;
    loss(&logits, target)?.backward()?;
    stop(device, started)
}

/// A CUDA device goes on working after a call has returned, so a measurement waits for it at both ends.
fn start(device: &Device) -> Result<Instant> {
    device.synchronize()?;
    Ok(Instant::now())
}

fn stop(device: &Device, started: Instant) -> Result<Duration> {
    device.synchronize()?;
    Ok(started.elapsed())
}

#[derive(Default)]
struct Clocks {
    loss: Vec<Duration>,
    step: Vec<Duration>,
}

impl Clocks {
    fn add(&mut self, loss: Duration, step: Duration) {
        self.loss.push(loss);
        self.step.push(step);
    }

    fn medians(self) -> (Duration, Duration) {
        (median(self.loss), median(self.step))
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn progress_bar(prefix: &str, epochs: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:22} {bar:30} {pos:>3}/{len} epochs  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(epochs as u64).with_style(style).with_prefix(prefix.to_string())
}

/// Moves the progress bar or, where there is no terminal to show it, prints a line now and then.
fn show(bar: &ProgressBar, epoch: usize, epochs: usize, outcome: &Outcome) {
    let loss = outcome.train_losses.last().copied().unwrap_or(f32::NAN);
    let message = format!("loss {loss:.4}, held-out accuracy {:.1} %", 100. * outcome.accuracy);
    if !std::io::stderr().is_terminal() && (epoch + 1).is_multiple_of(epochs.div_ceil(4)) {
        println!("{:22} epoch {:>3}  {message}", bar.prefix(), epoch + 1);
    }
    bar.set_message(message);
    bar.inc(1);
}
