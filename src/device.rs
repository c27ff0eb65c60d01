//! The choice of a device, and the fate of the memory that is freed on it.

use candle_core::{Device, Result};

/// The first CUDA device that works, else the CPU.
///
/// Without the `cuda` feature this is the CPU. With it, a machine whose driver is broken or has no device silently gets
/// the CPU too: ask [`Device::is_cuda`] where it matters. A program built with `cuda` is linked to the driver's
/// library, as candle is, and does not start where that is missing.
///
/// # Example
/// ```
/// use candle_core::{DType, Tensor};
/// # fn main() -> candle_core::Result<()> {
/// let device = candle_fused_loss::best_device();
/// let logits = Tensor::zeros((8, 10), DType::F32, &device)?;
/// let target = Tensor::zeros(8, DType::U32, &device)?;
/// let loss = candle_fused_loss::cross_entropy(&logits, &target)?;
/// assert!((loss.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn best_device() -> Device {
    #[cfg(feature = "cuda")]
    if let Some(device) = working_cuda_device() {
        return device;
    }
    Device::Cpu
}

/// Device 0 if it can be created and computes something right.
#[cfg(feature = "cuda")]
fn working_cuda_device() -> Option<Device> {
    // an error of the driver can be a panic in the layers between
    let found = std::panic::catch_unwind(|| {
        let device = Device::new_cuda(0).ok()?;
        let sum = candle_core::Tensor::new(&[1f32, 2.], &device).ok()?.sum_all().ok()?.to_scalar::<f32>().ok()?;
        (sum == 3.0).then_some(device)
    });
    found.ok().flatten()
}

/// Lets memory that is freed stay with the process, for the next step to take.
///
/// A training step allocates and frees the same large tensors again and again, and by default what is free goes back to
/// the system. The next step then maps the same gigabytes once more, which can take longer than all computation. Call
/// this function once, for the device that the program trains on; on the CPU as the first thing in `main`.
///
/// The price is memory: the process keeps as much as it ever had in use at once, and no other process can have it.
/// Don't call it in a program that shares a machine whose memory is short, that needs much memory once and then runs
/// for long, or whose threads allocate and free blocks of more than a kilobyte all the time.
///
/// **CPU.** With glibc's allocator, which is Rust's default on most Linux systems, blocks of 32 MB and more are mapped
/// and unmapped each time. This function sets three of its parameters for the whole process: no block is mapped by
/// itself any more (`M_MMAP_MAX` 0), the heap never shrinks (`M_TRIM_THRESHOLD`), and there is one heap for all threads
/// (`M_ARENA_MAX` 1). Without the last, other threads than the main one have heaps of their own, made of pieces of 64
/// MB, and larger blocks are mapped there all the same. A thread that has allocated anything *before* the call keeps
/// such a heap, and threads that start later may come to share it: so call this before any thread is started.
///
/// With another allocator (of musl, macOS, Windows, or a `#[global_allocator]`) nothing changes: choose one that keeps
/// its pages, and tell it so. The README has settings of mimalloc and jemalloc, with times.
///
/// **CUDA.** candle allocates from the device's memory pool, which by default returns all free memory to the system
/// whenever the host waits for the device, as it does to read a loss. This function raises the pool's release threshold
/// to the maximum, for the whole process. The CPU's allocator stays as it is. On other devices nothing changes.
///
/// # Errors
/// Those of the allocator or the driver, if it refuses.
///
/// # Example
/// ```
/// let device = candle_fused_loss::best_device();
/// candle_fused_loss::keep_memory(&device)?;
/// let logits = candle_core::Tensor::zeros((8, 10), candle_core::DType::F32, &device)?;
/// assert_eq!(logits.sum_all()?.to_scalar::<f32>()?, 0.0);
/// # candle_core::Result::Ok(())
/// ```
///
/// Sources: [mallopt(3)](https://man7.org/linux/man-pages/man3/mallopt.3.html); [the stream-ordered memory
/// allocator](https://docs.nvidia.com/cuda/cuda-c-programming-guide/#stream-ordered-memory-allocator),
/// `cudaMemPoolAttrReleaseThreshold`.
pub fn keep_memory(device: &Device) -> Result<()> {
    match device {
        Device::Cpu => keep_heap(),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => keep_pool(device),
        _ => Ok(()),
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_heap() -> Result<()> {
    // One arena is worth its price: the heaps of others end at 64 MB, and a block that fits in none is mapped whatever
    // `M_MMAP_MAX` says, so that a training thread would keep nothing. Blocks of up to a kilobyte come from caches of
    // each thread's own, without a lock; and beyond those a step allocates few blocks, most of them tensors. Two
    // threads that did nothing but allocate up to 64 KB and free it took 0.6 to 0.8 us for that, against 0.1 to 0.4.
    let settings = [
        // the most blocks that are mapped by themselves
        (libc::M_MMAP_MAX, 0, "M_MMAP_MAX"),
        // as an unsigned number the largest: as much may be free at the end of the heap
        (libc::M_TRIM_THRESHOLD, -1, "M_TRIM_THRESHOLD"),
        (libc::M_ARENA_MAX, 1, "M_ARENA_MAX"),
    ];
    for (parameter, value, name) in settings {
        // SAFETY: numbers are passed, and the function locks the heap while it sets them
        if unsafe { libc::mallopt(parameter, value) } == 0 {
            candle_core::bail!("keep_memory: the allocator refuses {name} = {value} (mallopt returned 0)");
        }
    }
    Ok(())
}

/// There is no setting that every allocator has.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_heap() -> Result<()> {
    Ok(())
}

#[cfg(feature = "cuda")]
fn keep_pool(device: &candle_core::CudaDevice) -> Result<()> {
    use candle_core::cuda_backend::WrapErr;
    use cudarc::driver::result;
    use cudarc::driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        // without pools, memory is allocated and freed as the driver does for everybody
        return Ok(());
    }
    context.bind_to_thread().w()?;
    let mut most = u64::MAX;
    // SAFETY: the device is the context's, the pool is the device's, and the attribute's value is a u64
    unsafe {
        let pool = result::device::get_mem_pool(context.cu_device()).w()?;
        result::mem_pool::set_attribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut most).cast()).w()
    }
}
