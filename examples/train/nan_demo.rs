//! What becomes of training when a logit grows large: candle's binary cross-entropy against this crate's.
//!
//! Past a logit of 16.6, f32 rounds the sigmoid to exactly 1. candle then multiplies `1 - target`, which is 0 for a
//! sample the network gets right, by the logarithm of 0: the loss is NaN, so is every gradient, and after that step so
//! is every weight. Network, data, initial weights and order of the samples are the same for both losses.

use anyhow::Result;
use candle_core::Device;

use crate::chart::{Line, Panel};
use crate::losses::Implementation;
use crate::options::Options;
use crate::report;
use crate::tasks;
use crate::training::{self, Outcome};

pub struct NanDemo {
    candle: Outcome,
    ours: Outcome,
    threshold: f32,
}

pub fn run(options: &Options, device: &Device) -> Result<NanDemo> {
    let mut task = tasks::cancer(device)?;
    task.name = "nan-demo";
    task.learning_rate = 5e-3;
    task.epochs = 20;
    let ours = match options.loss {
        Implementation::Unfused => Implementation::Unfused,
        Implementation::Fused | Implementation::Candle => Implementation::Fused,
    };
    let train =
        |implementation: Implementation| training::train(&task, implementation, implementation.cancer(), options);
    Ok(NanDemo { candle: train(Implementation::Candle)?, ours: train(ours)?, threshold: task.threshold })
}

impl NanDemo {
    /// Ours has to stay finite, learn, and be accurate; what candle does is shown, not required.
    pub fn failures(&self, options: &Options) -> Vec<String> {
        report::failures(&self.ours, self.threshold, options)
    }

    pub fn panel(&self) -> Panel {
        let line = |outcome: &Outcome| {
            let label = outcome.implementation.name().to_string();
            Line::new(label, &outcome.step_losses)
        };
        Panel {
            title: "nan-demo: breast cancer, large logits".to_string(),
            x: "step",
            lines: vec![line(&self.ours), line(&self.candle)],
            mark: self.candle.overflow.as_ref().map(|overflow| {
                let text = format!("candle: {} from step {}", overflow.loss, overflow.step);
                (overflow.step, text)
            }),
        }
    }

    pub fn into_outcomes(self) -> [Outcome; 2] {
        [self.candle, self.ours]
    }
}
