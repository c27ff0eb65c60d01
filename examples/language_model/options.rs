//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::{Parser, ValueEnum};

use crate::loss::Implementation;

/// Trains a small language model with linear cross-entropy.
#[derive(Parser, Debug)]
#[command(name = "language_model")]
pub struct Options {
    /// How the loss is computed from the last layer's input
    #[arg(long, value_enum, default_value_t = Implementation::Linear)]
    pub loss: Implementation,
    /// Time a few steps with each loss, and count the memory they take, instead of training
    #[arg(long)]
    pub compare: bool,
    /// Pieces of words to tell apart [default: 4096, with --quick 1024]
    #[arg(long, value_parser = clap::value_parser!(u32).range(257..65536))]
    vocabulary: Option<u32>,
    /// Passages in a step
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Pieces in a passage
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    pub context: u32,
    /// Learn from verses of different lengths, padded to the longest of their step and cut to the context, instead of
    /// passages that are as long as the context
    #[arg(long, conflicts_with = "compare")]
    pub verses: bool,
    /// Parts of a step's passages whose gradients are made one after the other and added up
    #[arg(long, default_value_t = 1, conflicts_with = "compare", value_parser = clap::value_parser!(u32).range(1..))]
    pub accumulate: u32,
    /// Passes over the text
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: u32,
    /// Where to train
    #[arg(long, value_enum, default_value_t = DeviceName::Best)]
    device: DeviceName,
    /// Seed of the initial weights, of the order of the passages and of the text written
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder for the picture of the loss curve
    #[arg(long, default_value = "target/language_model")]
    pub out: PathBuf,
    /// A few steps only; checks that the loss falls
    #[arg(long)]
    pub quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The first CUDA device that works, else the CPU
    Best,
    Cpu,
    Cuda,
}

impl Options {
    pub fn device(&self) -> Result<Device> {
        match self.device {
            DeviceName::Best => Ok(candle_fused_loss::best_device()),
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda => Device::new_cuda(0).context("--device cuda needs `--features cuda` and a device"),
        }
    }

    pub fn vocabulary(&self) -> usize {
        self.vocabulary.unwrap_or(if self.quick { 1024 } else { 4096 }) as usize
    }
}
