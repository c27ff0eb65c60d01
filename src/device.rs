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

/// Lets memory that is freed on a CUDA device stay with the process, for the next step to take.
///
/// A training step allocates and frees the same large tensors again and again. By default CUDA's memory pool, from
/// which candle allocates, returns all free memory to the system whenever the host waits for the device, as it does to
/// read a loss. The next step has to map gigabytes again while the GPU idles, which can take longer than the kernels.
/// This function raises the pool's release threshold to the maximum, for the whole process. Call it once, before the
/// first step.
///
/// The price is memory: the process keeps as much as it ever had in use at once, and other processes on the GPU can't
/// have it. On other devices nothing changes.
///
/// # Errors
/// Those of the driver.
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
/// Source: [the stream-ordered memory
/// allocator](https://docs.nvidia.com/cuda/cuda-c-programming-guide/#stream-ordered-memory-allocator),
/// `cudaMemPoolAttrReleaseThreshold`.
pub fn keep_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => keep_pool(device),
        _ => Ok(()),
    }
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
