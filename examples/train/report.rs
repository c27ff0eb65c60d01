//! What a run prints: sentences, the table, the picture's panels, and what went wrong.

use std::time::Duration;

use candle_core::Device;

use crate::chart::{Line, Panel};
use crate::options::Options;
use crate::tasks::Task;
use crate::training::Outcome;

pub fn heading(options: &Options, device: &Device) -> String {
    let device = match device {
        Device::Cpu => "the CPU",
        Device::Cuda(_) => "CUDA",
        Device::Metal(_) => "Metal",
    };
    format!("{} losses on {device}, seed {}", options.loss.name(), options.seed)
}

/// One run's result, and whether and where its loss stopped being a number.
pub fn sentence(outcome: &Outcome) -> String {
    let who = format!("{} ({})", outcome.task, outcome.implementation.name());
    let accuracy = 100. * outcome.accuracy;
    match &outcome.overflow {
        Some(overflow) => format!(
            "{who:22} loss {} from step {} of {} on, at a logit of magnitude {:.1}; held-out accuracy {accuracy:.1} %",
            overflow.loss,
            overflow.step,
            outcome.step_losses.len(),
            overflow.largest_logit,
        ),
        None => format!(
            "{who:22} loss finite in all {} steps, logits up to {:.1}; held-out accuracy {accuracy:.1} %",
            outcome.step_losses.len(),
            outcome.largest_logit,
        ),
    }
}

pub fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "{:<12}{:<10}{:>7}{:>11}{:>15}{:>11}{:>8}\n",
        "task", "loss", "epochs", "held-out", "loss per step", "step", "share"
    );
    for outcome in outcomes {
        let share = outcome.loss_time.as_secs_f64() / outcome.step_time.as_secs_f64();
        text += &format!(
            "{:<12}{:<10}{:>7}{:>9.1} %{:>12} us{:>8} us{:>6.1} %\n",
            outcome.task,
            outcome.implementation.name(),
            outcome.epochs,
            100. * outcome.accuracy,
            microseconds(outcome.loss_time),
            microseconds(outcome.step_time),
            100. * share,
        );
    }
    text
}

fn microseconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e6)
}

pub fn panel(task: &Task, outcome: &Outcome) -> Panel {
    Panel {
        title: format!("{}: {} ({})", task.name, task.loss_name, outcome.implementation.name()),
        x: "epoch",
        lines: vec![
            Line::new("training".to_string(), &outcome.train_losses),
            Line::new("held-out".to_string(), &outcome.held_out_losses),
        ],
        mark: None,
    }
}

/// A loss that is not finite or does not fall is always a failure; a low accuracy is one unless the run is a quick one.
pub fn failures(outcome: &Outcome, threshold: f32, options: &Options) -> Vec<String> {
    let who = format!("{} ({})", outcome.task, outcome.implementation.name());
    let mut failures = Vec::new();
    if let Some(overflow) = &outcome.overflow {
        failures.push(format!("{who}: the loss is {} from step {} on", overflow.loss, overflow.step));
    } else if let [first, .., last] = outcome.train_losses[..]
        && last >= first
    {
        failures.push(format!("{who}: the loss went from {first} to {last}"));
    }
    if !options.quick && outcome.accuracy < threshold {
        failures.push(format!(
            "{who}: held-out accuracy {:.1} % is below {:.0} %",
            100. * outcome.accuracy,
            100. * threshold
        ));
    }
    failures
}
