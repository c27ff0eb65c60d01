//! One interleaved series of measurements.

use crate::common::case::{Case, Implementation, Pass};
use crate::common::machine::Machine;
use crate::common::work::Inputs;
use crate::memory::peak_of;
use anyhow::Result;
use std::time::{Duration, Instant};

pub struct Series<'a> {
    pub case: Case,
    pub kind: &'a [(Implementation, Pass)],
    /// How long the samples may take, all together.
    pub time: Duration,
}

/// The quantiles of samples, in microseconds a call.
#[derive(Clone, Copy)]
pub struct Times {
    pub p20: f64,
    pub p50: f64,
    pub p80: f64,
}

impl Times {
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| samples[((samples.len() - 1) as f64 * q).round() as usize];
        Times { p20: at(0.2), p50: at(0.5), p80: at(0.8) }
    }
}

pub struct Measured {
    pub implementation: Implementation,
    pub pass: Pass,
    /// Or why there are none.
    pub times: Result<Times, String>,
    /// On the CPU.
    pub peak_bytes: Option<usize>,
    /// The clock, the calls in a sample and the samples.
    pub method: String,
}

const MIN_SAMPLES: usize = 3;
const MAX_SAMPLES: usize = 51;

/// The calls of one sample: enough for the clock, and on a GPU enough that what one call leaves in the cache is written back
/// in the next one's time. Calls that are shorter than it takes to enqueue them are timed one by one.
fn calls(machine: &Machine, one: Duration) -> usize {
    let us = (one.as_secs_f64() * 1e6).max(0.05);
    match machine.device.is_cpu() {
        true => ((500.0 / us) as usize).clamp(1, 2000),
        false if us < 30.0 => 1,
        false => ((500.0 / us) as usize).clamp(1, 8),
    }
}

impl Series<'_> {
    pub fn measure(&self, machine: &Machine) -> Result<Vec<Measured>> {
        let mut inputs = Inputs::new(self.case, machine)?;
        struct Contender {
            implementation: Implementation,
            pass: Pass,
            calls: usize,
            next: usize,
            peak_bytes: Option<usize>,
            samples: Result<Vec<f64>, String>,
        }
        let mut contenders = vec![];
        for &(implementation, pass) in self.kind {
            if !self.case.exists(implementation, pass) {
                continue;
            }
            inputs.prepare(pass)?;
            // the first call loads, compiles, faults pages in and is counted; the second one is the estimate
            let (first, peak) = peak_of(|| inputs.call(implementation, pass, 0));
            let estimate = first.and_then(|()| inputs.time(machine, implementation, pass, 1, 1));
            let (calls, samples) = match estimate {
                Ok(one) => (calls(machine, one), Ok(vec![])),
                Err(e) => (1, Err(e.to_string().lines().next().unwrap_or_default().to_string())),
            };
            let peak_bytes = machine.device.is_cpu().then_some(peak);
            contenders.push(Contender { implementation, pass, calls, next: 2, peak_bytes, samples });
        }
        let started = Instant::now();
        for round in 0..MAX_SAMPLES {
            if round >= MIN_SAMPLES && started.elapsed() > self.time {
                break;
            }
            for c in &mut contenders {
                let Ok(samples) = &mut c.samples else { continue };
                match inputs.time(machine, c.implementation, c.pass, c.next, c.calls) {
                    Ok(time) => samples.push(time.as_secs_f64() * 1e6 / c.calls as f64),
                    Err(e) => c.samples = Err(e.to_string()),
                }
                c.next += c.calls;
            }
        }
        let clock = if machine.device.is_cpu() { "host" } else { "events" };
        let measured = contenders.into_iter().map(|c| Measured {
            implementation: c.implementation,
            pass: c.pass,
            method: format!("{clock} {}x{}", c.samples.as_ref().map_or(0, Vec::len), c.calls),
            times: c.samples.map(Times::of),
            peak_bytes: c.peak_bytes,
        });
        Ok(measured.collect())
    }
}
