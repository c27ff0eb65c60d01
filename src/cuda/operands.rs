//! What is done with operands ahead of a pass. The kernels are in `kernels/modules/operands.cu`.

use super::gpu::Gpu;
use super::kernels::OPERANDS;
use super::launch::{Input, Launch, alloc, output};
use crate::cuda::grid::Grid;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{Layout, Result, bail};
use cudarc::driver::DeviceRepr;

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

/// Class indices in row-major order, one after the other. One launch.
pub(crate) fn contiguous(target: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let (device, dtype) = (&target.device, target.dtype());
    let rows = layout.shape().elem_count();
    // SAFETY: the launch below writes all of it
    let mut copy = unsafe { alloc(device, dtype, rows.max(1))? };
    if rows > 0 {
        let input = Input::new(target, layout)?;
        let (count, axes) = (rows as i64, Axes::of(layout)?);
        let stream = device.cuda_stream();
        let mut bytes = output(&mut copy)?;
        let gpu = Gpu::of(device)?;
        let mut launch = Launch::new(&gpu, &stream, &OPERANDS, "copy_indices")?;
        launch.read(&input.bytes).write(&mut bytes).value(&count).value(&input.tag).value(&axes);
        // SAFETY: the parameters of copy_indices; a thread for each row, and all rows are inside of the tensor
        unsafe { launch.run(Grid::flat(rows.div_ceil(THREADS) as u32, THREADS as u32))? };
    }
    Ok(CudaStorage { slice: copy, device: device.clone() })
}
