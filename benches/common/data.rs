//! Random inputs, made by all threads at once.

use super::case::{Case, Loss};
use candle_core::{DType, Device, Result, Tensor, Var};
use half::{bf16, f16};
use rayon::prelude::*;

/// SplitMix64: a number from its position, so that the parts can be made in any order.
fn random(seed: u64, i: usize) -> u64 {
    let mut z = seed.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// About normal, with standard deviation 2: the sum of four uniform numbers.
fn logit(seed: u64, i: usize) -> f32 {
    let bits = random(seed, i);
    let sum: i32 = (0..4).map(|k| ((bits >> (16 * k)) & 0xFFFF) as i32 - 0x8000).sum();
    sum as f32 * (2.0 * 0.866 / 32768.0)
}

fn fill<T: Send + candle_core::WithDType>(
    shape: (usize, usize),
    device: &Device,
    f: impl Fn(usize) -> T + Sync + Send,
) -> Result<Tensor> {
    let values: Vec<T> = (0..shape.0 * shape.1).into_par_iter().map(f).collect();
    Tensor::from_vec(values, shape, device)
}

fn floats(case: &Case, device: &Device, f: impl Fn(usize) -> f32 + Sync + Send) -> Result<Tensor> {
    let shape = (case.rows, case.classes);
    match case.dtype {
        DType::F16 => fill(shape, device, |i| f16::from_f32(f(i))),
        DType::BF16 => fill(shape, device, |i| bf16::from_f32(f(i))),
        DType::F64 => fill(shape, device, |i| f64::from(f(i))),
        _ => fill(shape, device, f),
    }
}

/// One set of inputs.
pub struct Data {
    pub input: Var,
    pub target: Tensor,
    /// What `loss_and_grad_inplace` overwrites and `accumulate` takes for a gradient.
    pub scratch: Option<Tensor>,
}

impl Data {
    pub fn new(case: &Case, set: u64, device: &Device) -> Result<Self> {
        let seed = 0x5EED_0000 + 2 * set;
        let classes = case.classes;
        let input = floats(case, device, |i| match case.loss {
            Loss::Bce => 0.01 + 0.98 * (random(seed, i) >> 40) as f32 / (1u64 << 24) as f32,
            Loss::Nll => -0.5 - logit(seed, i).abs(),
            _ => logit(seed, i),
        })?;
        let target = match case.loss {
            Loss::CrossEntropy | Loss::Nll | Loss::LogSoftmax => {
                fill((1, case.rows), device, |i| (random(seed + 1, i) % classes as u64) as u32)?.squeeze(0)?
            }
            Loss::CrossEntropyProbabilities => floats(case, device, |i| {
                let share = (random(seed + 1, i) >> 40) as f32 / (1u64 << 23) as f32;
                share / classes as f32
            })?,
            _ => floats(case, device, |i| (random(seed + 1, i) >> 63) as f32)?,
        };
        Ok(Data { input: Var::from_tensor(&input)?, target, scratch: None })
    }
}
