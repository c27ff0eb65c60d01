//! Training, and evaluation on held-out text.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result as CandleResult, Tensor};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use indicatif::{ProgressBar, ProgressStyle};

use crate::data::{Batch, Corpus};
use crate::loss::{self, Implementation};
use crate::memory;
use crate::model::Model;
use crate::options::Options;
use crate::rng::Rng;

const LEARNING_RATE: f64 = 3e-3;
const WARM_UP: usize = 20;
const QUICK_STEPS: usize = 12;
/// A run that doesn't get below this many nats a piece did not learn.
const THRESHOLD: f64 = 4.4;

pub struct Outcome {
    pub model: Model,
    pub losses: Vec<f32>,
    /// Mean loss on the held-out text, in nats a piece.
    held_out: f64,
    time: Duration,
    /// Bytes beyond weights and the optimizer's state.
    peak: usize,
}

impl Outcome {
    pub fn sentence(&self, corpus: &Corpus) -> String {
        let bits = self.held_out / std::f64::consts::LN_2 / corpus.bytes_per_piece();
        format!(
            "held-out loss {:.3} nats a piece: perplexity {:.1}, {bits:.3} bits a byte; {} steps in \
             {:.0} s, at most {:.0} MB in a step",
            self.held_out,
            self.held_out.exp(),
            self.losses.len(),
            self.time.as_secs_f64(),
            self.peak as f64 / 1e6,
        )
    }

    pub fn failure(&self, options: &Options) -> Option<String> {
        let last = f64::from(*self.losses.last()?);
        let first = f64::from(*self.losses.first()?);
        if options.quick {
            let fell = last < first - 0.5;
            return (!fell).then(|| format!("the loss went from {first:.3} to {last:.3}, expected it to fall"));
        }
        let learned = self.held_out < THRESHOLD;
        (!learned).then(|| format!("held-out loss {:.3}, expected less than {THRESHOLD}", self.held_out))
    }
}

/// One step of the optimizer, with the batch's gradients made in so many parts. Returns the loss before it.
pub fn step(model: &Model, optimizer: &mut AdamW, loss: Implementation, batch: &Batch, parts: usize) -> Result<f32> {
    if parts == 1 {
        let loss = loss.loss(&model.hidden(&batch.input)?, model.head(), batch, None)?;
        optimizer.backward_step(&loss)?;
        return Ok(loss.to_scalar()?);
    }
    let (loss, grads) = accumulate(model, loss, &batch.split(parts)?)?;
    optimizer.step(&grads)?;
    Ok(loss.to_scalar()?)
}

/// The loss of all parts as one batch, and its gradients. Each part's loss is its share of the sum over the count of
/// all parts: a mean of the parts' means would weigh the pieces of a short one more.
fn accumulate(model: &Model, loss: Implementation, parts: &[Batch]) -> Result<(Tensor, GradStore)> {
    let counts = parts.iter().map(loss::count).collect::<CandleResult<Vec<_>>>()?;
    let count = Tensor::stack(&counts, 0)?.sum_all()?;
    let mut total: Option<(Tensor, GradStore)> = None;
    for part in parts {
        let value = loss.loss(&model.hidden(&part.input)?, model.head(), part, Some(&count))?;
        let mut grads = value.backward()?;
        for parameter in model.parameters() {
            let before = total.as_ref().and_then(|(_, sums)| sums.get(&parameter));
            // detached, since a gradient keeps the activations that it was made of
            let sum = match (before, grads.get(&parameter).map(Tensor::detach)) {
                (Some(before), Some(grad)) => (before + grad)?,
                (Some(sum), None) => sum.clone(),
                (None, Some(sum)) => sum,
                (None, None) => continue,
            };
            grads.insert(&parameter, sum);
        }
        let value = match total {
            Some((before, _)) => (before + value.detach())?,
            None => value.detach(),
        };
        total = Some((value, grads));
    }
    total.context("no passages")
}

pub fn optimizer(model: &Model) -> Result<AdamW> {
    let settings = ParamsAdamW { lr: LEARNING_RATE, beta2: 0.98, weight_decay: 0.05, ..Default::default() };
    Ok(AdamW::new(model.parameters(), settings)?)
}

pub fn train(corpus: &Corpus, options: &Options, device: &Device) -> Result<Outcome> {
    let (batch, context) = (options.batch as usize, options.context as usize);
    let parts = options.accumulate as usize;
    let mut rng = Rng::new(options.seed);
    let model = Model::new(corpus.pieces.len(), context, &mut rng, device)?;
    let mut optimizer = optimizer(&model)?;
    let steps = match options.quick {
        true => QUICK_STEPS,
        false => options.epochs as usize * corpus.batches(batch, context),
    };
    let bar = progress_bar(steps);
    let start = Instant::now();
    let (mut losses, mut peak) = (Vec::with_capacity(steps), 0);
    while losses.len() < steps {
        let left = steps - losses.len();
        for batch in corpus.epoch(batch, context, &mut rng, device)?.iter().take(left) {
            optimizer.set_learning_rate(LEARNING_RATE * schedule(losses.len(), steps));
            let (loss, bytes) = memory::peak(|| step(&model, &mut optimizer, options.loss, batch, parts));
            losses.push(loss?);
            peak = peak.max(bytes);
            show(&bar, &losses, steps);
        }
    }
    bar.finish();
    let time = start.elapsed();
    let batches = corpus.held_out(batch, context, device)?;
    let held_out = evaluate(&model, if options.quick { &batches[..1] } else { &batches })?;
    Ok(Outcome { model, losses, held_out, time, peak })
}

/// Linear warm-up, then half a cosine down to a tenth.
fn schedule(step: usize, steps: usize) -> f64 {
    let warm = (step + 1) as f64 / WARM_UP as f64;
    let cosine = (std::f64::consts::PI * step as f64 / steps as f64).cos();
    warm.min(0.55 + 0.45 * cosine)
}

fn evaluate(model: &Model, batches: &[Batch]) -> Result<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for batch in batches {
        // detached, so that no gradients are made
        let hidden = model.hidden(&batch.input)?.detach();
        let loss = Implementation::Linear.loss(&hidden, &model.head().detach(), batch, None)?;
        let pieces = loss::count(batch)?.to_scalar::<f64>()?;
        sum += f64::from(loss.to_scalar::<f32>()?) * pieces;
        count += pieces;
    }
    (count > 0.0).then(|| sum / count).context("no held-out text")
}

fn progress_bar(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("training {bar:40} {pos:>4}/{len} steps, {eta} left  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style)
}

/// Moves the progress bar or, where there is no terminal to show it, prints a line now and then.
fn show(bar: &ProgressBar, losses: &[f32], steps: usize) {
    let recent = &losses[losses.len().saturating_sub(20)..];
    let message = format!("loss {:.3}", recent.iter().sum::<f32>() / recent.len() as f32);
    if !std::io::stderr().is_terminal() && losses.len().is_multiple_of(steps.div_ceil(8)) {
        println!("step {:>4} of {steps}  {message}", losses.len());
    }
    bar.set_message(message);
    bar.inc(1);
}
