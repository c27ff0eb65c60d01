//! The bandwidth of the machine's memory, which is what every loss is measured against.

use crate::common::machine::{Clock, Machine};
use crate::series::Times;
use anyhow::Result;
use rayon::prelude::*;
use std::hint::black_box;

pub struct Bandwidth {
    /// A copy, counting what it reads and what it writes.
    pub copy: Rate,
    pub read: Rate,
}

pub struct Rate {
    pub times: Times,
    pub bytes: usize,
    pub method: String,
}

impl Rate {
    /// In GB/s.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.times.p50 / 1e3
    }
}

/// `quick`: of little memory, a few times.
pub fn measure(machine: &Machine, quick: bool) -> Result<Bandwidth> {
    match &machine.clock {
        Clock::Host => cpu(machine, quick),
        #[cfg(feature = "cuda")]
        Clock::Gpu(clock) => gpu(clock, quick),
    }
}

/// The same threads as the losses have, each its part of the buffer.
fn cpu(machine: &Machine, quick: bool) -> Result<Bandwidth> {
    let bytes = (8 * machine.cache_bytes).clamp(if quick { 32 << 20 } else { 256 << 20 }, 1 << 30);
    let words = bytes / 8;
    let source: Vec<u64> = (0..words as u64).into_par_iter().map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect();
    let mut target = vec![1u64; words];
    let part = words.div_ceil(rayon::current_num_threads());
    let rounds = if quick { 5 } else { 21 };
    let sample = |work: &mut dyn FnMut()| {
        work();
        let samples = (0..rounds).map(|_| {
            machine.clock.time(|| {
                work();
                Ok(())
            })
        });
        let us = samples.map(|time| Ok(time?.as_secs_f64() * 1e6)).collect::<Result<Vec<_>>>()?;
        anyhow::Ok(Times::of(us))
    };
    let copy = sample(&mut || {
        let parts = target.par_chunks_mut(part).zip(source.par_chunks(part));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut target);
    })?;
    let read = sample(&mut || {
        let sum = |part: &[u64]| part.iter().fold(0u64, |sum, &v| sum.wrapping_add(v));
        black_box(source.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add));
    })?;
    let method = format!("host {rounds}x1");
    Ok(Bandwidth {
        copy: Rate { times: copy, bytes: 2 * words * 8, method: method.clone() },
        read: Rate { times: read, bytes: words * 8, method },
    })
}

#[cfg(feature = "cuda")]
fn gpu(clock: &crate::common::gpu::Clock, quick: bool) -> Result<Bandwidth> {
    use crate::common::gpu::failed;
    let stream = clock.stream();
    let (free, _) = stream.context().mem_get_info().map_err(failed)?;
    let bytes = (if quick { 1 << 20 } else { 1 << 30 }).min(free / 8) / 16384 * 16384;
    let source = stream.alloc_zeros::<u8>(bytes).map_err(failed)?;
    let mut target = stream.alloc_zeros::<u8>(bytes).map_err(failed)?;
    let (rounds, calls) = if quick { (3, 1) } else { (21, 4) };
    let sample = |work: &mut dyn FnMut() -> candle_core::Result<()>| {
        work()?;
        let samples = (0..rounds).map(|_| clock.time(|| (0..calls).try_for_each(|_| work())));
        let us = samples.map(|time| Ok(time?.as_secs_f64() * 1e6 / calls as f64)).collect::<Result<Vec<_>>>()?;
        anyhow::Ok(Times::of(us))
    };
    let copy = sample(&mut || stream.memcpy_dtod(&source, &mut target).map_err(failed))?;
    let read = sample(&mut || clock.read(&source).map(|_| ()))?;
    black_box(&target);
    let method = format!("events {rounds}x{calls}");
    Ok(Bandwidth {
        copy: Rate { times: copy, bytes: 2 * bytes, method: method.clone() },
        read: Rate { times: read, bytes, method },
    })
}
