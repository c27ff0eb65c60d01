//! Trains small networks on real data with the fused losses, and shows what that gains.
//!
//! ```text
//! cargo run --release --example train                                    # every task, best device
//! cargo run --release --example train -- --loss candle                   # the same with candle_nn::loss
//! cargo run --release --example train -- --loss unfused --task digits    # the losses as chains of tensor ops
//! cargo run --release --example train -- --task nan-demo                 # where candle's loss turns into NaN
//! cargo run --release --example train -- --task f16-demo                 # where f16 stalls without a loss scale
//! cargo run --release --example train --features cuda -- --device cuda
//! cargo run --release --example train -- --quick                         # a few epochs, as a smoke test
//! ```
//!
//! The tasks are handwritten digits (cross-entropy), breast cancer (binary cross-entropy with logits), attributes of
//! digits (multi-label soft margin), and `nan-demo`, which trains the breast cancer network at a larger learning rate
//! with candle's binary cross-entropy and with this crate's. At the ordinary learning rate, and on the attributes,
//! candle's loss turns into NaN too, only later: `--loss candle` shows it, and fails.
//!
//! `f16-demo` is run on its own: it learns which pairs of digits are the same, in f32, in f16, and in f16 with a loss
//! scale, without which the gradients of a mean over 52 million pairs are all 0 in f16. It fails where f16 with the
//! scale ends more than a point of accuracy below f32, or where f16 without one learns.
//!
//! The data ships with the repository; `examples/data/README.md` names its sources and licences.
//!
//! The run prints a table, draws the loss curves, and fails when a held-out accuracy is below its task's threshold.

mod chart;
mod data;
mod f16_demo;
mod losses;
mod model;
mod nan_demo;
mod options;
mod report;
mod rng;
mod tasks;
mod training;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use options::{Options, TaskName};
use training::Outcome;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let device = options.device()?;
    // so that each step reuses the memory of the step before; before anything starts threads
    candle_fused_loss::keep_memory(&device)?;
    println!("{}", report::heading(&options, &device));

    let mut panels = Vec::new();
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut failures = Vec::new();
    for name in options.task.expand() {
        if *name == TaskName::NanDemo {
            let demo = nan_demo::run(&options, &device)?;
            failures.extend(demo.failures(&options));
            panels.push(demo.panel());
            outcomes.extend(demo.into_outcomes());
        } else if *name == TaskName::F16Demo {
            let demo = f16_demo::run(&options, &device)?;
            println!("\n{}", demo.table());
            failures.extend(demo.failures());
            panels.push(demo.panel());
        } else {
            let task = tasks::load(*name, &device)?;
            let loss = (task.loss)(options.loss);
            let outcome = training::train(&task, options.loss, loss, &options)?;
            failures.extend(report::failures(&outcome, task.threshold, &options));
            panels.push(report::panel(&task, &outcome));
            outcomes.push(outcome);
        }
    }

    if !outcomes.is_empty() {
        println!("\n{}", report::table(&outcomes));
    }
    let path = options.out.join("loss.svg");
    chart::write(&path, &panels)?;
    println!("loss curves: {}", path.display());
    for failure in &failures {
        eprintln!("failed: {failure}");
    }
    Ok(match failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
