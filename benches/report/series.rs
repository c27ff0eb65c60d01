//! One interleaved series of measurements.

use crate::common::case::{Case, Implementation, Loss, Pass};
use crate::common::machine::{Freed, Machine, Replay};
use crate::common::work::Inputs;
use crate::driver::Driver;
use crate::memory::{page_faults, peak_of};
use anyhow::Result;
use std::time::{Duration, Instant};

pub struct Series<'a> {
    pub case: Case,
    pub kind: &'a [(Implementation, Pass)],
    /// Where graphs can be recorded.
    pub recorder: Option<&'a Machine>,
    /// Who knows the card's clock.
    pub driver: Option<&'a Driver>,
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
    pub implementation: String,
    pub pass: Pass,
    /// Or why there are none.
    pub times: Result<Times, String>,
    /// The most that a call had allocated: on the CPU for this crate and candle, on a GPU for PyTorch.
    pub peak_bytes: Option<usize>,
    /// The clock of the card's multiprocessors, asked for right after a sample.
    pub sm_mhz: Option<u32>,
    /// The clock, the calls in a sample and the samples.
    pub method: String,
}

/// Of a call that takes no more than a tenth of the time there is; of a longer one a single sample may have to do.
const MIN_SAMPLES: usize = 5;
const MAX_SAMPLES: usize = 51;
/// On the CPU, calls that take less are timed as they are in a loop: what ran before has emptied the caches and let the
/// threads fall asleep.
const REPEATED: Duration = Duration::from_millis(50);

/// The calls of a sample of what the host takes for one: fewer than a device's queue holds.
const HOST_CALLS: usize = 200;

/// The calls of one sample: enough for the clock, and on a GPU enough that what one call leaves in the cache is written
/// back in the next one's time. Calls that are shorter than it takes to enqueue them are timed one by one.
fn calls(machine: &Machine, one: Duration) -> usize {
    let us = (one.as_secs_f64() * 1e6).max(0.05);
    match machine.device.is_cpu() {
        true => ((500.0 / us) as usize).clamp(1, 2000),
        false if us < 30.0 => 1,
        false => ((500.0 / us) as usize).clamp(1, 8),
    }
}

/// Logits of up to so many bytes are measured in replays too: about what a GPU does in the time that the host takes to
/// start it.
const REPLAYED_BYTES: usize = 32 << 20;

/// This crate's kernels, replayed from a graph; and called on a device for which cudarc keeps no events.
pub const GRAPH: &str = "fused-graph";
pub const EVENTLESS: &str = "fused-eventless";

/// Of an error, what is not its backtrace.
fn first_line(e: &candle_core::Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_string()
}

/// One of those that are compared.
struct Contender<'a> {
    implementation: &'static str,
    pass: Pass,
    clock: &'static str,
    /// The time of `count` calls, on the sets from the `first` on.
    time: Box<dyn Fn(usize, usize) -> candle_core::Result<Duration> + 'a>,
    /// One call, of the fastest sample so far.
    one: Duration,
    calls: usize,
    next: usize,
    peak_bytes: Option<usize>,
    sm_mhz: Option<u32>,
    samples: Result<Vec<f64>, String>,
}

impl Series<'_> {
    pub fn measure(&self, machine: &Machine) -> Result<Vec<Measured>> {
        let mut inputs = Inputs::new(self.case, machine)?;
        let kind = || {
            self.kind
                .iter()
                .copied()
                .filter(|&(implementation, pass)| self.case.exists(implementation, pass, machine.device.is_cuda()))
        };
        for (_, pass) in kind() {
            inputs.prepare(pass)?;
        }
        let inputs = &inputs;
        let mut contenders = vec![];
        for (implementation, pass) in kind() {
            let time = move |first, count| inputs.time(machine, implementation, pass, first, count);
            // the first call loads, compiles, faults pages in and is counted; the fastest of those on all sets is the
            // estimate, unless the first one has shown that it takes long. On a GPU it shows how long loading takes,
            // and nothing else
            let start = Instant::now();
            let (first, peak) = peak_of(|| inputs.call(implementation, pass, 0));
            let mut best = start.elapsed();
            let start = if machine.device.is_cpu() { start } else { Instant::now() };
            let estimate = first.and_then(|()| {
                for i in 1..2 * inputs.sets() + 1 {
                    if start.elapsed() > self.time / 10 {
                        break;
                    }
                    best = best.min(time(i, 1)?);
                }
                Ok(best)
            });
            let (one, samples) = match estimate {
                Ok(one) => (one, Ok(vec![])),
                Err(e) => (Duration::ZERO, Err(first_line(&e))),
            };
            contenders.push(Contender {
                implementation: implementation.name(),
                pass,
                clock: if machine.device.is_cpu() || pass == Pass::HostCall { "host" } else { "events" },
                time: Box::new(time),
                one,
                calls: if pass == Pass::HostCall { HOST_CALLS } else { calls(machine, one) },
                next: 2,
                peak_bytes: machine.device.is_cpu().then_some(peak),
                sm_mhz: None,
                samples,
            });
        }
        if let Some(recorder) = self.recorder
            && self.case.input_bytes() <= REPLAYED_BYTES
            // which copies the strides of candle's operations from the host
            && self.case.loss != Loss::LinearCrossEntropy
        {
            let passes =
                kind().filter(|(implementation, _)| *implementation == Implementation::Fused).map(|(_, pass)| pass);
            for pass in passes.filter(|pass| matches!(pass, Pass::Forward | Pass::LossAndGrad)) {
                contenders.push(self.replayed(recorder, pass));
            }
        }
        if let Some(recorder) = self.recorder
            && kind().any(|(_, pass)| pass == Pass::HostCall)
        {
            contenders.push(self.without_events(recorder));
        }
        self.sample(machine, &mut contenders);
        let measured = contenders.into_iter().map(|c| Measured {
            implementation: c.implementation.to_string(),
            pass: c.pass,
            method: format!("{} {}x{}", c.clock, c.samples.as_ref().map_or(0, Vec::len), c.calls),
            times: c.samples.map(Times::of),
            peak_bytes: c.peak_bytes,
            sm_mhz: c.sm_mhz,
        });
        Ok(measured.collect())
    }

    /// Samples of all in turns.
    fn sample(&self, machine: &Machine, contenders: &mut [Contender]) {
        let few = self.few_pages(machine);
        let started = Instant::now();
        let mut open = true;
        while open {
            open = false;
            for c in contenders.iter_mut() {
                let Ok(samples) = &mut c.samples else { continue };
                let enough = if c.one > self.time / 10 { 1 } else { MIN_SAMPLES };
                if samples.len() == MAX_SAMPLES || samples.len() >= enough && started.elapsed() > self.time {
                    continue;
                }
                open = true;
                if machine.device.is_cpu() && c.one < REPEATED {
                    let _ = (c.time)(c.next, c.calls);
                }
                let pages = page_faults();
                match (c.time)(c.next, c.calls) {
                    Ok(time) => {
                        c.one = c.one.min(time / c.calls as u32);
                        // a block that was freed may be in pieces when its like is asked for again
                        if page_faults() - pages < few || started.elapsed() > 2 * self.time {
                            samples.push(time.as_secs_f64() * 1e6 / c.calls as f64);
                        }
                    }
                    Err(e) => c.samples = Err(e.to_string()),
                }
                c.next += c.calls;
                // once, after a sample that every contender has
                if c.sm_mhz.is_none() && c.samples.as_ref().is_ok_and(|samples| samples.len() == enough) {
                    c.sm_mhz = self.driver.and_then(Driver::sm_mhz);
                }
            }
        }
    }

    /// New pages from which on a call shows a heap that still grows: of kept memory, each call should get what the one
    /// before has freed.
    fn few_pages(&self, machine: &Machine) -> i64 {
        match machine.device.is_cpu() && machine.freed == Freed::Kept {
            true => ((self.case.input_bytes() / 4096 / 100) as i64).max(16),
            false => i64::MAX,
        }
    }

    /// This crate's kernels without the host: one call on each set of inputs, recorded once. What can't be recorded is
    /// a contender without samples.
    fn replayed<'m>(&self, recorder: &'m Machine, pass: Pass) -> Contender<'m> {
        let (replay, samples) = match self.record(recorder, pass) {
            Ok(replay) => (Some(replay), Ok(vec![])),
            Err(e) => (None, Err(first_line(&e))),
        };
        Contender {
            implementation: GRAPH,
            pass,
            clock: "graph",
            one: Duration::ZERO,
            calls: replay.as_ref().map_or(0, |(inputs, _)| inputs.sets()),
            time: Box::new(move |_, _| match &replay {
                // the inputs live as long as the recording, which has their addresses
                Some((_, replay)) => recorder.clock.time(replay),
                None => candle_core::bail!("nothing was recorded"),
            }),
            next: 0,
            peak_bytes: None,
            sm_mhz: None,
            samples,
        }
    }

    /// What a call takes the host on a device for which cudarc keeps no events: else it makes two for each allocation,
    /// though it has nothing to wait for on a single stream.
    fn without_events<'m>(&self, recorder: &'m Machine) -> Contender<'m> {
        let pass = Pass::HostCall;
        let inputs = Inputs::new(self.case, recorder).and_then(|inputs| {
            inputs.time(recorder, Implementation::Fused, pass, 0, inputs.sets())?;
            Ok(inputs)
        });
        let (inputs, samples) = match inputs {
            Ok(inputs) => (Some(inputs), Ok(vec![])),
            Err(e) => (None, Err(first_line(&e))),
        };
        Contender {
            implementation: EVENTLESS,
            pass,
            clock: "host",
            one: Duration::ZERO,
            calls: HOST_CALLS,
            time: Box::new(move |first, count| match &inputs {
                Some(inputs) => inputs.time(recorder, Implementation::Fused, pass, first, count),
                None => candle_core::bail!("no inputs"),
            }),
            next: 0,
            peak_bytes: None,
            sm_mhz: None,
            samples,
        }
    }

    fn record(&self, recorder: &Machine, pass: Pass) -> candle_core::Result<(Inputs, Replay)> {
        let inputs = Inputs::new(self.case, recorder)?;
        let all = || (0..inputs.sets()).try_for_each(|i| inputs.call(Implementation::Fused, pass, i));
        // the first calls load the kernels, which a recording can't
        all()?;
        recorder.device.synchronize()?;
        let replay = recorder.clock.record(all)?;
        Ok((inputs, replay))
    }
}
