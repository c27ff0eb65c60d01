//! The command line.

use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::{Parser, ValueEnum};

use crate::losses::Implementation;

/// Trains small networks on real data with fused losses.
#[derive(Parser, Debug)]
#[command(name = "train")]
pub struct Options {
    /// Which losses to train with
    #[arg(long, value_enum, default_value_t = Implementation::Fused)]
    pub loss: Implementation,
    /// What to train
    #[arg(long, value_enum, default_value_t = TaskName::All)]
    pub task: TaskName,
    /// Epochs for every task [default: the task's own]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: Option<u32>,
    /// Where to train
    #[arg(long, value_enum, default_value_t = DeviceName::Best)]
    pub device: DeviceName,
    /// Seed of the initial weights and of the order of the samples
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder for the picture of the loss curves
    #[arg(long, default_value = "target/train")]
    pub out: PathBuf,
    /// A few epochs only; checks that the loss falls, not how accurate the network gets
    #[arg(long)]
    pub quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TaskName {
    Digits,
    Cancer,
    Attributes,
    NanDemo,
    /// f32, f16, and f16 with a loss scale; not among all
    F16Demo,
    /// All but f16-demo
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// The first CUDA device that works, else the CPU
    Best,
    Cpu,
    Cuda,
}

impl TaskName {
    pub fn expand(&self) -> &[TaskName] {
        match self {
            TaskName::All => &[TaskName::Digits, TaskName::Cancer, TaskName::Attributes, TaskName::NanDemo],
            one => std::slice::from_ref(one),
        }
    }
}

impl Options {
    pub fn device(&self) -> Result<Device> {
        match self.device {
            DeviceName::Best => Ok(candle_fused_loss::best_device()),
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda => Device::new_cuda(0).context("--device cuda needs `--features cuda` and a device"),
        }
    }

    /// `--epochs` if given, else a few for `--quick`, else what the task asks for.
    pub fn epochs(&self, task: usize) -> usize {
        match self.epochs {
            Some(epochs) => epochs as usize,
            None if self.quick => task.min(5),
            None => task,
        }
    }
}
