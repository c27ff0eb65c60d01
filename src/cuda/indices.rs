//! Class indices: put one after the other and widened, or checked, ahead of a pass that reads them. The kernel is in
//! `kernels/modules/indices.cu`.

use super::gpu::Gpu;
use super::grid::Grid;
use super::kernels::INDICES;
use super::launch::{InputView, Launch, Tag, alloc, output};
use candle_core::cuda_backend::CudaStorage;
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use std::ops::Range;
use std::sync::Arc;

const THREADS: usize = 256;
const MAX_AXES: usize = 8;

/// `IndexAxes` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IndexAxes {
    size: [i64; MAX_AXES],
    stride: [i64; MAX_AXES],
    count: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for IndexAxes {}

impl IndexAxes {
    fn of(layout: &Layout) -> Result<Self> {
        let mut axes = IndexAxes::default();
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

/// A launch of `copy_indices`.
struct CopyIndicesLaunch<'a> {
    from: &'a CudaView<'a, u8>,
    to: CudaViewMut<'a, u8>,
    rows: usize,
    dtype: Tag,
    axes: IndexAxes,
}

impl CopyIndicesLaunch<'_> {
    /// # Safety
    /// All indices that the axes lead to are inside of `from`, and `to` has room for `rows` of them.
    unsafe fn launch(mut self, gpu: &Gpu, stream: &Arc<CudaStream>) -> Result<()> {
        let rows = self.rows as i64;
        let mut launch = Launch::new(gpu, stream, &INDICES, "copy_indices")?;
        // copy_indices(from, to, rows, dtype, axes)
        launch.read(self.from).write(&mut self.to).value(&rows).value(&self.dtype).value(&self.axes);
        // SAFETY: the parameters of copy_indices, a thread for each row, and memory by this function's contract
        unsafe { launch.run(Grid::flat(self.rows.div_ceil(THREADS) as u32, THREADS as u32)) }
    }
}

/// Class indices in row-major order, one after the other, as i64. One launch.
pub(crate) fn as_i64(target: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let device = &target.device;
    let rows = layout.shape().elem_count();
    let axes = if layout.is_contiguous() { &Layout::contiguous(rows) } else { layout };
    // SAFETY: the launch below writes all of it
    let mut copy = unsafe { alloc(device, DType::I64, rows.max(1))? };
    if rows > 0 {
        let input = InputView::new(target, layout)?;
        let to = output(&mut copy)?;
        let copying = CopyIndicesLaunch { from: &input.bytes, to, rows, dtype: input.tag, axes: IndexAxes::of(axes)? };
        // SAFETY: the axes are those of the layout, which stays inside of its tensor, and the copy has `rows` elements
        unsafe { copying.launch(Gpu::of(device)?, &device.cuda_stream())? };
    }
    Ok(CudaStorage { slice: copy, device: device.clone() })
}

/// The elements of contiguous class indices, as the kernels read them.
pub(crate) fn index_range(name: &str, layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("{name}: contiguous class indices were expected, got strides {:?}", layout.stride()),
    }
}
