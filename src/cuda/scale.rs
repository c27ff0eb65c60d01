//! Matrices times numbers in device memory, rounded once. The kernel is in `kernels/modules/scale.cu`.

use super::gpu::Gpu;
use super::grid::Grid;
use super::kernels::SCALE;
use super::launch::{InputView, Launch, Tag, alloc, output};
use crate::check::{arithmetic, is_float};
use crate::custom_op::Arg;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage};
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{CudaView, CudaViewMut, DeviceRepr};

const THREADS: usize = 256;
/// Elements that a thread takes in a turn, if they have 16 bits.
const ELEMENTS: usize = 16;
/// The most blocks for each multiprocessor, a few times as many as it runs at once.
const BLOCKS: usize = 16;

/// What the elements are multiplied by, in their arithmetic dtype; absent: 1.
#[derive(Clone, Copy, Default)]
pub(crate) struct ScaleFactors<'a> {
    /// One number.
    pub all: Option<Arg<'a, CudaStorage>>,
    /// A number for each row.
    pub rows: Option<Arg<'a, CudaStorage>>,
    /// A u8 for each row: where it is 0, the result is 0, whatever the row holds.
    pub mask: Option<Arg<'a, CudaStorage>>,
}

/// `ScaleParams` of the kernel.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScaleParams {
    rows: i64,
    columns: i64,
    from: Tag,
    to: Tag,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for ScaleParams {}

/// A launch of `scale_rows`.
struct ScaleLaunch<'a> {
    rows: usize,
    columns: usize,
    /// `None`: the elements are in `to`.
    from: Option<&'a CudaView<'a, u8>>,
    to: CudaViewMut<'a, u8>,
    factors: ScaleFactors<'a>,
}

impl ScaleLaunch<'_> {
    /// # Safety
    /// There are `rows x columns` elements of dtype `from` in `from`, and of dtype `to` in `to`.
    unsafe fn launch(mut self, device: &CudaDevice, from: DType, to: DType) -> Result<()> {
        let (rows, columns, arithmetic) = (self.rows, self.columns, arithmetic(to));
        if !is_float(to) || (from != to && from != arithmetic) {
            bail!("a matrix of {from:?} to scale into {to:?}, expected floats of one dtype or of its arithmetic");
        }
        let params = ScaleParams { rows: rows as i64, columns: columns as i64, from: Tag::of(from)?, to: Tag::of(to)? };
        let ScaleFactors { all, rows: of_rows, mask } = self.factors;
        let all = all.map(|all| numbers(all, 1, arithmetic)).transpose()?;
        let of_rows = of_rows.map(|of_rows| numbers(of_rows, rows, arithmetic)).transpose()?;
        let mask = mask.map(|mask| numbers(mask, rows, DType::U8)).transpose()?;
        let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
        let blocks = (rows * columns).div_ceil(THREADS * ELEMENTS).min(BLOCKS * gpu.processors as usize);
        let mut launch = Launch::new(gpu, &stream, &SCALE, "scale_rows")?;
        // scale_rows(p, from, to, all, rows, mask)
        launch.value(&params).read_if(self.from).write(&mut self.to);
        launch.read_if(all.as_ref()).read_if(of_rows.as_ref()).read_if(mask.as_ref());
        // SAFETY: the parameters of scale_rows; the elements by this function's contract, and `numbers` found one for
        // each row
        unsafe { launch.run(Grid::flat(blocks as u32, THREADS as u32)) }
    }
}

/// `count` numbers one after the other.
fn numbers<'a>((storage, layout): Arg<'a, CudaStorage>, count: usize, dtype: DType) -> Result<CudaView<'a, u8>> {
    if !layout.is_contiguous() || layout.shape().elem_count() != count || storage.dtype() != dtype {
        let (dims, of) = (layout.dims(), storage.dtype());
        bail!("factors {dims:?} of dtype {of:?}, expected {count} contiguous ones of {dtype:?}");
    }
    Ok(InputView::new(storage, layout)?.bytes)
}

/// The elements of a contiguous matrix: the first one, its rows and columns.
fn matrix(layout: &Layout) -> Result<(usize, usize, usize)> {
    match (layout.contiguous_offsets(), layout.dims()) {
        (Some((start, _)), &[rows, columns]) => Ok((start, rows, columns)),
        _ => bail!("strides {:?} of shape {:?}, expected a contiguous matrix", layout.stride(), layout.dims()),
    }
}

/// The matrix times its factors in `dtype`, which is its own or one whose arithmetic dtype that is. One launch.
pub(crate) fn scaled(of: Arg<CudaStorage>, factors: ScaleFactors, dtype: DType) -> Result<CudaStorage> {
    let (storage, layout) = of;
    let (_, rows, columns) = matrix(layout)?;
    let device = &storage.device;
    // SAFETY: the launch below writes all of it
    let mut slice = unsafe { alloc(device, dtype, (rows * columns).max(1))? };
    if rows * columns > 0 {
        let from = InputView::new(storage, layout)?;
        let launch = ScaleLaunch { rows, columns, from: Some(&from.bytes), to: output(&mut slice)?, factors };
        // SAFETY: the elements are those of the layout, and as many have been allocated
        unsafe { launch.launch(device, storage.dtype(), dtype)? };
    }
    Ok(CudaStorage { slice, device: device.clone() })
}

/// Replaces a matrix by itself times its factors. One launch.
pub(crate) fn scale_in_place(of: &mut CudaStorage, layout: &Layout, factors: ScaleFactors) -> Result<()> {
    let (start, rows, columns) = matrix(layout)?;
    if rows * columns == 0 {
        return Ok(());
    }
    let (device, dtype) = (of.device.clone(), of.dtype());
    let size = dtype.size_in_bytes();
    let mut memory = output(&mut of.slice)?;
    let to = memory.slice_mut(start * size..(start + rows * columns) * size);
    // SAFETY: the elements are those of the layout
    unsafe { ScaleLaunch { rows, columns, from: None, to, factors }.launch(&device, dtype, dtype) }
}
