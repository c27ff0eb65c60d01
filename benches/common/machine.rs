//! The device a bench runs on, and its clock.

use candle_core::{Device, Result};
use std::time::{Duration, Instant};

/// What becomes of memory that is freed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Freed {
    /// It stays with the process, as after `keep_memory`.
    Kept,
    /// Large blocks go back to the system, and the next ones are mapped anew.
    Returned,
}

pub struct Machine {
    pub device: Device,
    #[allow(dead_code)]
    pub freed: Freed,
    /// The hardware's name: the CPU's model or the GPU's.
    pub name: String,
    /// The last-level cache.
    pub cache_bytes: usize,
    pub clock: Clock,
}

#[derive(Clone)]
pub enum Clock {
    Host,
    #[cfg(feature = "cuda")]
    Gpu(std::sync::Arc<super::gpu::Clock>),
}

/// A moment of the work.
pub enum Mark {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Gpu(super::gpu::Mark),
}

/// Starts recorded work.
pub type Replay = Box<dyn Fn() -> Result<()>>;

impl Clock {
    /// The time that what `work` starts takes on the device.
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        self.flush()?;
        let start = self.mark()?;
        work()?;
        self.between(&start, &self.mark()?)
    }

    /// Empties the cache, on a device.
    pub fn flush(&self) -> Result<()> {
        match self {
            Clock::Host => Ok(()),
            #[cfg(feature = "cuda")]
            Clock::Gpu(clock) => clock.flush(),
        }
    }

    /// The moment at which what has been started so far is done.
    pub fn mark(&self) -> Result<Mark> {
        match self {
            Clock::Host => Ok(Mark::Host(Instant::now())),
            #[cfg(feature = "cuda")]
            Clock::Gpu(clock) => clock.mark().map(Mark::Gpu),
        }
    }

    /// The time between two moments, for the later of which it waits.
    pub fn between(&self, start: &Mark, end: &Mark) -> Result<Duration> {
        match (start, end) {
            (Mark::Host(start), Mark::Host(end)) => Ok(*end - *start),
            #[cfg(feature = "cuda")]
            (Mark::Gpu(start), Mark::Gpu(end)) => start.until(end),
            #[cfg(feature = "cuda")]
            _ => candle_core::bail!("moments of two clocks"),
        }
    }

    /// Records what `work` starts.
    #[allow(dead_code)]
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Replay> {
        match self {
            Clock::Host => candle_core::bail!("the CPU has no graphs"),
            #[cfg(feature = "cuda")]
            Clock::Gpu(clock) => clock.record(work),
        }
    }
}

impl Machine {
    /// The CPU, whose freed memory is `freed`. To be called before anything starts threads.
    pub fn cpu(freed: Freed) -> Result<Self> {
        // elsewhere `keep_memory` has nothing to tell the allocator
        let can_keep = cfg!(all(target_os = "linux", target_env = "gnu"));
        let freed = if can_keep { freed } else { Freed::Returned };
        if freed == Freed::Kept {
            candle_fused_loss::keep_memory(&Device::Cpu)?;
        }
        let (name, cache_bytes) = (cpu_name(), cpu_cache_bytes());
        Ok(Machine { device: Device::Cpu, freed, name, cache_bytes, clock: Clock::Host })
    }

    #[cfg(feature = "cuda")]
    fn gpu(gpu: super::gpu::Gpu) -> Self {
        let super::gpu::Gpu { device, name, cache_bytes, clock } = gpu;
        Machine { device, freed: Freed::Kept, name, cache_bytes, clock: Clock::Gpu(clock) }
    }

    /// The GPU where one works and this is a build for it, else the CPU. `rehearsal`: the times are not looked at, and
    /// may be anything but long.
    ///
    /// Freed memory stays with the process. Else it would go back after each sample, and the next one would measure how
    /// gigabytes are mapped anew: on the CPU by the allocator, on a GPU by the memory pool whenever the host waits for
    /// the device. `freed` can ask for that on the CPU.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn best(freed: Freed, rehearsal: bool) -> Result<Self> {
        let device = candle_fused_loss::best_device();
        match &device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) if freed == Freed::Returned => {
                candle_core::bail!("memory that is freed on a GPU is kept, as PyTorch keeps it")
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(cuda) => {
                candle_fused_loss::keep_memory(&device)?;
                super::gpu::Gpu::new(cuda, rehearsal).map(Self::gpu)
            }
            Device::Cpu => Self::cpu(freed),
            _ => candle_core::bail!("the benches know the CPU and CUDA"),
        }
    }

    /// The same machine where work can be recorded in a graph.
    #[allow(dead_code)]
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn recorder(&self, rehearsal: bool) -> Result<Self> {
        match &self.clock {
            Clock::Host => candle_core::bail!("the CPU has no graphs"),
            #[cfg(feature = "cuda")]
            Clock::Gpu(_) => super::gpu::recorder(rehearsal).map(Self::gpu),
        }
    }

    /// Gives memory that is free back to the system: to other processes on the device.
    #[allow(dead_code)]
    pub fn release(&self) -> Result<()> {
        match &self.clock {
            Clock::Host => Ok(()),
            #[cfg(feature = "cuda")]
            Clock::Gpu(clock) => clock.release(),
        }
    }
}

/// "AMD EPYC 9654 96-Core Processor", or what the kernel has instead of a name.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|k| k.trim() == key))?;
        line.split_once(':').map(|(_, value)| value.trim().to_string())
    };
    let name = value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_string());
    // some virtual machines hide the model's number; family and model still say which it is
    match (value("cpu family"), value("model")) {
        (Some(family), Some(model)) if !name.chars().any(|c| c.is_ascii_digit()) => {
            format!("{name} family {family} model {model}")
        }
        _ => name,
    }
}

fn cpu_cache_bytes() -> usize {
    let read = |index| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok()
    };
    (0..5).filter_map(read).max().unwrap_or(32 << 10) << 10
}
