//! What the machine can do: the rates of a copy, a read and a matrix product, which every loss is measured against.

use crate::common::case::{Minimum, Unit};
use crate::common::machine::{Clock, Machine};
use crate::series::Times;
use anyhow::Result;
use rayon::prelude::*;
use std::hint::black_box;

pub struct Rates {
    /// A copy, counting what it reads and what it writes.
    pub copy: Rate,
    pub read: Rate,
    /// Of bf16, on a GPU.
    pub matmul: Option<Rate>,
}

pub struct Rate {
    pub times: Times,
    /// How many bytes, or which product.
    pub shape: String,
    pub work: Minimum,
    pub method: String,
}

impl Rate {
    /// In GB/s, or in GFLOP/s.
    pub fn rate(&self) -> f64 {
        self.work.amount as f64 / self.times.p50 / 1e3
    }
}

impl Rates {
    /// The rate that a minimum of such a unit is done at.
    pub fn of(&self, unit: Unit) -> Option<f64> {
        match unit {
            Unit::Bytes => Some(self.copy.rate()),
            Unit::Operations => self.matmul.as_ref().map(Rate::rate),
        }
    }
}

/// A buffer's rate.
fn memory(times: Times, amount: usize, formula: &'static str, method: &str) -> Rate {
    let work = Minimum { amount, formula, unit: Unit::Bytes };
    Rate { times, shape: amount.to_string(), work, method: method.to_string() }
}

/// Random numbers: memory and arithmetic are faster on zeros.
fn word(i: usize) -> u64 {
    (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// So many samples of so many calls each, after a first one.
fn sample(
    machine: &Machine,
    (rounds, calls): (usize, usize),
    work: &mut dyn FnMut() -> candle_core::Result<()>,
) -> Result<Times> {
    work()?;
    let samples = (0..rounds).map(|_| machine.clock.time(|| (0..calls).try_for_each(|_| work())));
    let us = samples.map(|time| Ok(time?.as_secs_f64() * 1e6 / calls as f64)).collect::<Result<Vec<_>>>()?;
    Ok(Times::of(us))
}

/// `quick`: of little memory, a few times.
pub fn measure(machine: &Machine, quick: bool) -> Result<Rates> {
    match &machine.clock {
        Clock::Host => cpu(machine, quick),
        #[cfg(feature = "cuda")]
        Clock::Gpu(clock) => gpu(machine, clock, quick),
    }
}

/// The same threads as the losses have, each its part of the buffer.
fn cpu(machine: &Machine, quick: bool) -> Result<Rates> {
    let size = (8 * machine.cache_bytes).clamp(if quick { 32 << 20 } else { 256 << 20 }, 1 << 30);
    let words = size / 8;
    let source: Vec<u64> = (0..words).into_par_iter().map(word).collect();
    let mut target = vec![1u64; words];
    let part = words.div_ceil(rayon::current_num_threads());
    let rounds = if quick { 5 } else { 21 };
    let copy = sample(machine, (rounds, 1), &mut || {
        let parts = target.par_chunks_mut(part).zip(source.par_chunks(part));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut target);
        Ok(())
    })?;
    let read = sample(machine, (rounds, 1), &mut || {
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, &v| sum.wrapping_add(v));
        black_box(source.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add));
        Ok(())
    })?;
    let method = format!("host {rounds}x1");
    Ok(Rates {
        copy: memory(copy, 2 * words * 8, "read+written", &method),
        read: memory(read, words * 8, "read", &method),
        matmul: None,
    })
}

#[cfg(feature = "cuda")]
fn gpu(machine: &Machine, clock: &crate::common::gpu::Clock, quick: bool) -> Result<Rates> {
    use crate::common::gpu::failed;
    use candle_core::{DType, Tensor};
    let stream = clock.stream();
    let (free, _) = stream.context().mem_get_info().map_err(failed)?;
    let size = (if quick { 1 << 20 } else { 1 << 30 }).min(free / 8) / 16384 * 16384;
    let words = (0..size / 8).into_par_iter().map(|i| word(i).to_le_bytes());
    let source = stream.clone_htod(words.collect::<Vec<_>>().as_flattened()).map_err(failed)?;
    let mut target = stream.alloc_zeros::<u8>(size).map_err(failed)?;
    let (rounds, calls) = if quick { (3, 1) } else { (21, 4) };
    let sample = |work: &mut dyn FnMut() -> candle_core::Result<()>| sample(machine, (rounds, calls), work);
    let copy = sample(&mut || stream.memcpy_dtod(&source, &mut target).map_err(failed))?;
    let read = sample(&mut || clock.read(&source).map(|_| ()))?;
    let side = if quick { 64 } else { 8192 };
    let factor = || Tensor::randn(0f32, 1f32, (side, side), &machine.device)?.to_dtype(DType::BF16);
    let (a, b) = (factor()?, factor()?);
    let product = sample(&mut || a.matmul(&b).map(|_| ()))?;
    let work = Minimum { amount: 2 * side * side * side, formula: "2MNK flop", unit: Unit::Operations };
    let method = format!("events {rounds}x{calls}");
    Ok(Rates {
        copy: memory(copy, 2 * size, "read+written", &method),
        read: memory(read, size, "read", &method),
        matmul: Some(Rate { times: product, shape: format!("{side}x{side}x{side}"), work, method }),
    })
}
