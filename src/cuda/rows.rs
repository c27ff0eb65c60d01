//! What every kernel over rows with targets takes: `kernels/targets.cuh`.

use super::launch::{Tag, to_host};
use crate::check;
use crate::custom_op::Arg;
use crate::reduction::Reduction;
use crate::row_options::RowOptions;
use crate::rows::Rows;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{DType, Result, bail};
use cudarc::driver::DeviceRepr;

/// `Strides` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Strides {
    pub inner: i64,
    pub outer_stride: i64,
    pub inner_stride: i64,
    pub class_stride: i64,
}

impl Strides {
    pub fn of(rows: &Rows) -> Self {
        Strides {
            inner: rows.inner as i64,
            outer_stride: rows.outer_stride as i64,
            inner_stride: rows.inner_stride as i64,
            class_stride: rows.class_stride as i64,
        }
    }
}

/// `RowParams` of the kernels, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RowParams {
    pub rows: i64,
    pub ignore_index: i64,
    pub keep: f64,
    pub normalizer: f64,
    pub classes: i32,
    pub target: Tag,
    pub counted: i32,
    pub counts: i32,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for RowParams {}

impl RowParams {
    /// Of rows without targets.
    pub fn untargeted(name: &str, rows: &Rows) -> Result<Self> {
        let Ok(classes) = i32::try_from(rows.classes) else {
            bail!("{name}: {} classes, expected fewer than 2^31 on CUDA", rows.classes)
        };
        Ok(RowParams {
            rows: rows.count() as i64,
            ignore_index: 0,
            keep: 1.0,
            normalizer: 1.0,
            classes,
            target: Tag::U32,
            counted: 0,
            counts: 0,
        })
    }

    /// Of rows with targets of `dtype`.
    pub fn new(name: &str, rows: &Rows, options: &RowOptions, dtype: DType) -> Result<Self> {
        let (counted, normalizer) = match (options.reduction, options.normalizer) {
            (Reduction::Mean, Some(normalizer)) => (false, normalizer),
            (Reduction::Mean, None) if dtype.is_float() => (false, rows.count() as f64),
            (Reduction::Mean, None) => (true, 1.0),
            (Reduction::None | Reduction::Sum, _) => (false, 1.0),
        };
        Ok(RowParams {
            ignore_index: options.ignore_index,
            target: Tag::of(dtype)?,
            counted: counted as i32,
            normalizer,
            ..Self::untargeted(name, rows)?
        })
    }
}

/// Class indices as the kernels read them, checked where the options ask for it: at the price of waiting for the device.
pub(crate) fn check_indices(
    name: &str,
    options: &RowOptions,
    (target, layout): Arg<CudaStorage>,
    rows: &Rows,
) -> Result<()> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{name}: contiguous class indices were expected, got strides {:?}", layout.stride())
    };
    if !options.target_check || rows.count() == 0 {
        return Ok(());
    }
    let device = &target.device;
    let indices: Vec<i64> = match &target.slice {
        CudaStorageSlice::U8(s) => to_host(device, &s.slice(start..end))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::U32(s) => to_host(device, &s.slice(start..end))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I32(s) => to_host(device, &s.slice(start..end))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I64(s) => to_host(device, &s.slice(start..end))?,
        _ => return Err(check::not_class_indices(name, target.dtype())),
    };
    let classes = 0..rows.classes as i64;
    let bad = |(_, class): &(usize, &i64)| **class != options.ignore_index && !classes.contains(class);
    match indices.iter().enumerate().find(bad) {
        Some((row, &class)) => Err(check::class_out_of_range(name, class, row, rows.classes, options.ignore_index)),
        None => Ok(()),
    }
}
