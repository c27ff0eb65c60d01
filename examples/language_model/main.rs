//! Trains a small language model on a book, with the head and its loss in one: the logits never exist at once.
//!
//! ```text
//! cargo run --release --example language_model                     # linear cross-entropy, best device
//! cargo run --release --example language_model -- --loss fused     # all logits, this crate's cross-entropy
//! cargo run --release --example language_model -- --loss candle    # all logits, candle_nn's cross-entropy
//! cargo run --release --example language_model -- --verses         # padded verses, the padding masked by row weights
//! cargo run --release --example language_model -- --verses --accumulate 4  # the same steps in four parts each
//! cargo run --release --example language_model -- --compare        # a few steps of each: time and memory
//! cargo run --release --example language_model -- --compare --vocabulary 8192 --batch 64
//! cargo run --release --example language_model --features cuda -- --device cuda
//! cargo run --release --example language_model -- --quick          # a few steps, as a smoke test
//! ```
//!
//! A transformer of 0.9 million parameters learns seven books of the King James Bible in pieces of words (byte-pair
//! encoding). The run prints what it reaches on chapters it never saw, draws the loss curve, and lets the model write.
//! `examples/data/README.md` names the source of the text.
//!
//! With `--verses`, a passage is a verse, padded to the longest of its step; 852 steps reach a held-out loss of 4.10.
//! With `--accumulate`, each part's loss is divided by the pieces of all parts, so that the loss curve is that of whole
//! steps, up to rounding.

#[path = "../train/chart.rs"]
mod chart;
mod compare;
mod data;
mod loss;
mod memory;
mod model;
mod options;
mod pieces;
#[path = "../train/rng.rs"]
mod rng;
mod sample;
mod training;
mod verses;

use std::process::ExitCode;

use anyhow::Result;
use chart::{Line, Panel};
use clap::Parser;
use data::Corpus;
use options::Options;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let device = options.device()?;
    // so that each step reuses the memory of the step before; before anything starts threads
    candle_fused_loss::keep_memory(&device)?;
    let corpus = Corpus::load(options.vocabulary(), options.verses)?;
    println!("{}", corpus.sentence());
    if options.compare {
        println!("{}", compare::table(&corpus, &options, &device)?);
        return Ok(ExitCode::SUCCESS);
    }

    let outcome = training::train(&corpus, &options, &device)?;
    println!("\n{}\n", outcome.sentence(&corpus));
    println!("{}\n", sample::text(&corpus, &outcome.model, "And God said", &options)?);
    let path = options.out.join("loss.svg");
    let title = format!("language model, {} loss", options.loss.name());
    let line = Line::new("training".to_string(), &outcome.losses);
    chart::write(&path, &[Panel { title, x: "step", lines: vec![line], mark: None }])?;
    println!("loss curve: {}", path.display());
    Ok(match outcome.failure(&options) {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            eprintln!("failed: {failure}");
            ExitCode::FAILURE
        }
    })
}
