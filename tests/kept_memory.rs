//! That a step maps no memory anew once `keep_memory` has been called: counted in page faults, which depend on neither
//! the machine's speed nor its load.
//!
//! A program of its own, without the test harness, because the call is for the whole process and has to be the first
//! thing in `main`: the harness's threads would have heaps of their own by then.

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn main() {
    println!("not here: only glibc's allocator is told to keep memory");
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn main() -> candle_core::Result<()> {
    glibc::keeps_memory()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use candle_core::{DType, Device, Result, Tensor, Var};
    use candle_fused_loss::{CrossEntropyLoss, keep_memory};

    // A gradient of 131 MB: more than glibc ever takes from a heap by itself (32 MB), and more than fits in a heap of
    // a thread that isn't the main one (64 MB).
    const ROWS: usize = 32_768;
    const CLASSES: usize = 1000;
    /// One buffer of the gradient's size, mapped anew, takes at least a fault for each large page, and 512 times as
    /// many in pages of 4 KB. Without one, a step took none.
    const LARGE_PAGE: usize = 2 << 20;
    const ONE_BUFFER: i64 = (ROWS * CLASSES * size_of::<f32>() / LARGE_PAGE) as i64;

    /// The page faults of all threads of this process until now.
    fn page_faults() -> i64 {
        // SAFETY: a plain struct of numbers, for which zeros are a value
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a `rusage` that lives as long as the call
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) }, 0);
        usage.ru_minflt
    }

    /// The faults of a step after a first one: the fewest of a few, as the kernel may move pages at any time.
    fn faults_of(what: &str, step: impl Fn() -> Result<()>) -> Result<i64> {
        step()?;
        let mut fewest = i64::MAX;
        for _ in 0..3 {
            let before = page_faults();
            step()?;
            fewest = fewest.min(page_faults() - before);
        }
        println!("{what}: {fewest} page faults");
        Ok(fewest)
    }

    /// Of one pass without a graph, and of a step with candle's `backward()`, its zeros and sums included.
    fn faults_of_steps(x: &Var, target: &Tensor, when: &str) -> Result<[i64; 2]> {
        let loss = CrossEntropyLoss::new();
        let logits = x.as_detached_tensor();
        Ok([
            faults_of(&format!("{when}, loss_and_grad"), || loss.loss_and_grad(&logits, target).map(drop))?,
            faults_of(&format!("{when}, backward"), || loss.forward(x, target)?.backward().map(drop))?,
        ])
    }

    /// First with kept memory, then without it in a new process, as the setting can't be undone in this one. Where
    /// memory is kept anyway, the first would mean nothing.
    pub fn keeps_memory() -> Result<()> {
        const FRESH: &str = "--fresh";
        let fresh = std::env::args().any(|arg| arg == FRESH);
        if !fresh {
            keep_memory(&Device::Cpu)?;
        }
        let x = Var::from_tensor(&Tensor::zeros((ROWS, CLASSES), DType::F32, &Device::Cpu)?.affine(1.0, 0.5)?)?;
        let target = Tensor::zeros(ROWS, DType::U32, &Device::Cpu)?;
        let when = if fresh { "without keep_memory" } else { "after keep_memory" };
        let here = faults_of_steps(&x, &target, when)?;
        let elsewhere = format!("{when}, another thread");
        let there = std::thread::scope(|scope| {
            let steps = scope.spawn(|| faults_of_steps(&x, &target, &elsewhere));
            steps.join().expect("the steps of the other thread")
        })?;
        let faults = [here, there].concat();
        if fresh {
            assert!(faults.iter().all(|&n| n >= ONE_BUFFER), "{faults:?}: nothing to keep, without the call");
            return Ok(());
        }
        assert!(faults.iter().all(|&n| n < ONE_BUFFER), "{faults:?}: {ONE_BUFFER} are those of one buffer");
        let program = std::env::current_exe()?;
        let mut without = std::process::Command::new(program);
        // the same by the environment would be kept memory too
        for variable in ["MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"] {
            without.env_remove(variable);
        }
        assert!(without.arg(FRESH).status()?.success(), "the steps of a process without keep_memory");
        Ok(())
    }
}
