//! A few steps with each loss: time and memory.

use std::time::Instant;

use anyhow::Result;
use candle_core::Device;

use crate::data::Corpus;
use crate::loss::Implementation;
use crate::memory;
use crate::model::{Model, WIDTH};
use crate::options::Options;
use crate::rng::Rng;
use crate::training::{optimizer, step};

pub fn table(corpus: &Corpus, options: &Options, device: &Device) -> Result<String> {
    let (batch, context) = (options.batch as usize, options.context as usize);
    let steps = if options.quick { 2 } else { 7 };
    let rows = batch * context;
    let logits = rows * corpus.pieces.len() * 4;
    let mut text = format!(
        "{rows} places x {} pieces, width {WIDTH}: all logits are {:.1} MB\n\n{:<8}{:>12}{:>16}{:>14}{:>16}{:>12}\n",
        corpus.pieces.len(),
        logits as f64 / 1e6,
        "loss",
        "step",
        "memory of step",
        "head + loss",
        "memory of them",
        "first loss"
    );
    for loss in Implementation::ALL {
        let mut rng = Rng::new(options.seed);
        let model = Model::new(corpus.pieces.len(), context, &mut rng, device)?;
        let mut optimizer = optimizer(&model)?;
        let batches = corpus.epoch(batch, context, &mut rng, device)?;
        let (mut whole, mut head) = (Measured::default(), Measured::default());
        let mut first = None;
        for batch in batches.iter().cycle().take(steps + 1) {
            let value = whole.measure(|| step(&model, &mut optimizer, loss, batch, 1))?;
            let hidden = candle_core::Var::from_tensor(&model.hidden(&batch.input)?.detach())?;
            head.measure(|| -> Result<()> {
                let value = loss.loss(&hidden, model.head(), batch, None)?;
                value.backward()?;
                device.synchronize()?;
                Ok(())
            })?;
            first.get_or_insert(value);
        }
        text += &format!(
            "{:<8}{:>9.0} ms{:>13.1} MB{:>11.0} ms{:>13.1} MB{:>12.4}\n",
            loss.name(),
            whole.milliseconds(),
            whole.megabytes(),
            head.milliseconds(),
            head.megabytes(),
            first.unwrap_or(f32::NAN),
        );
    }
    text += "\nMedians of time, peaks of memory, forward and backward; memory beyond weights and the optimizer's state";
    if !device.is_cpu() {
        text += " is the host's, not the device's";
    }
    Ok(text + ".")
}

#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    bytes: usize,
}

impl Measured {
    fn measure<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let (result, bytes) = memory::peak(work);
        self.seconds.push(start.elapsed().as_secs_f64());
        self.bytes = self.bytes.max(bytes);
        result
    }

    /// The median of all but the first, which warms up.
    fn milliseconds(&self) -> f64 {
        let mut seconds = self.seconds[1..].to_vec();
        seconds.sort_by(f64::total_cmp);
        1e3 * seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
    }

    fn megabytes(&self) -> f64 {
        self.bytes as f64 / 1e6
    }
}
