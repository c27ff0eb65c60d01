//! A contiguous copy of strided class indices. The kernels are in `kernels/indices.cu`.

use super::launch::{Input, Module, alloc, launch, output};
use super::ptx;
use crate::plan::Grid;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Layout, Result, bail};
use cudarc::driver::{DeviceRepr, PushKernelArg};

const MODULE: Module = Module { key: "candle_fused_loss_indices", ptx: ptx::INDICES };
const THREADS: usize = 256;
const MAX_AXES: usize = 8;

/// `Axes` of the kernels.
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
    let (device, dtype) = (&target.device, target.dtype());
    let rows = layout.shape().elem_count();
    // SAFETY: the launch below writes all of it
    let mut copy = unsafe { alloc(device, dtype, rows.max(1))? };
    if rows > 0 {
        let input = Input::new(target, layout)?;
        let (count, axes) = (rows as i64, Axes::of(layout)?);
        let function = MODULE.function(device, &format!("copy_indices_{}", dtype.as_str()))?;
        let stream = device.cuda_stream();
        let mut bytes = output(&mut copy)?;
        let mut builder = stream.launch_builder(&function);
        builder.arg(&input.bytes).arg(&mut bytes).arg(&count).arg(&axes);
        // SAFETY: the arguments are those of copy_indices_*; a thread for each row, and all rows are inside of the tensor
        unsafe { launch(&mut builder, Grid::flat(rows.div_ceil(THREADS) as u32, THREADS as u32))? };
    }
    Ok(CudaStorage { slice: copy, device: device.clone() })
}
