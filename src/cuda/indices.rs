//! A contiguous copy of strided i32 class indices, which candle has no kernel for. The kernel is `kernels/indices.cu`.

use super::launch::{Input, Module, launch};
use super::ptx;
use crate::plan::Grid;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{Layout, Result, bail};
use cudarc::driver::{DeviceRepr, PushKernelArg};

const MODULE: Module = Module { key: "candle_fused_loss_indices", ptx: ptx::INDICES };
const THREADS: usize = 256;
const MAX_AXES: usize = 8;

/// `Axes` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Axes {
    size: [i64; MAX_AXES],
    stride: [i64; MAX_AXES],
    count: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for Axes {}

impl Axes {
    fn of(layout: &Layout) -> Result<Self> {
        let mut axes = Axes::default();
        for (&size, &stride) in layout.dims().iter().zip(layout.stride()).filter(|(size, _)| **size != 1) {
            let axis = axes.count as usize;
            if axis == MAX_AXES {
                bail!("strided class indices of shape {:?}, expected at most {MAX_AXES} axes", layout.dims());
            }
            (axes.size[axis], axes.stride[axis]) = (size as i64, stride as i64);
            axes.count += 1;
        }
        Ok(axes)
    }
}

/// The elements in row-major order. One launch.
pub(crate) fn contiguous(target: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = &target.device;
    let rows = layout.shape().elem_count();
    // SAFETY: the launch below writes all of it
    let mut copy = unsafe { device.alloc::<i32>(rows.max(1))? };
    if rows > 0 {
        let input = Input::new(target, layout)?;
        let (count, axes) = (rows as i64, Axes::of(layout)?);
        let function = MODULE.function(device, "copy_indices_i32")?;
        let stream = device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&input.bytes).arg(&mut copy).arg(&count).arg(&axes);
        // SAFETY: the arguments are those of copy_indices_i32; a thread for each row, and all rows are inside of the tensor
        unsafe { launch(&mut builder, Grid::flat(rows.div_ceil(THREADS) as u32, THREADS as u32))? };
    }
    Ok(CudaStorage { slice: CudaStorageSlice::I32(copy), device: device.clone() })
}
