//! The choice of a device.

use candle_core::Device;

/// The first CUDA device that works, else the CPU.
///
/// Without the `cuda` feature this is the CPU. With it, a machine whose driver is broken or has no device gets the CPU too,
/// silently: ask [`Device::is_cuda`] where it matters. A program built with `cuda` is linked to the driver's library, as
/// candle is, and does not start where that is missing.
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
