//! The first call of a process: loading, and on a GPU compiling, what it needs.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use std::process::Command;
use std::time::Instant;

/// candle's own, an operation of one small module; and cross-entropy.
pub const OPERATION: &str = "affine";
pub const LOSS: &str = "cross_entropy";
pub const PASS: &str = "first_call";
pub const ROWS: usize = 64;
pub const CLASSES: usize = 1000;

/// In a process of its own: prints the microseconds from a device that is there to the first result on the host.
pub fn call(what: &str, device: &Device) -> Result<()> {
    // neither a copy nor zeros take a kernel
    let x = Tensor::from_vec(vec![0.5f32; ROWS * CLASSES], (ROWS, CLASSES), device)?;
    let target = Tensor::zeros(ROWS, DType::U32, device)?;
    device.synchronize()?;
    let start = Instant::now();
    match what {
        OPERATION => drop(x.affine(2.0, 1.0)?.get(0)?.to_vec1::<f32>()?),
        LOSS => drop(candle_fused_loss::cross_entropy(&x, &target)?.to_scalar::<f32>()?),
        other => bail!("{other} is neither {OPERATION} nor {LOSS}"),
    }
    println!("{}", start.elapsed().as_secs_f64() * 1e6);
    Ok(())
}

/// Starts such a process, without the driver's cache of what it has compiled before.
pub fn measure(what: &str) -> Result<f64> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--first-call", what, "--device", "cuda"])
        .env("CUDA_CACHE_DISABLE", "1")
        .output()
        .context("a process for the first call")?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.trim().parse() {
        Ok(us) if output.status.success() => Ok(us),
        _ => bail!("{what}: {} {}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
    }
}
