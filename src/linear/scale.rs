//! Sums and rows times numbers that are known late: the upstream gradient and the mean's denominator.

use crate::check::arithmetic;
#[cfg(feature = "cuda")]
use crate::cuda::scale::{self as kernel, ScaleFactors};
use crate::custom_op::Locked;
#[cfg(feature = "cuda")]
use crate::custom_op::{Arg, DeviceStorage};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, WithDType, bail};

/// What errors call it.
const NAME: &str = "scaling of sums";

/// What a sum is multiplied by, in the arithmetic dtype.
#[derive(Clone, Copy)]
pub(super) struct Factors<'a> {
    /// A scalar.
    pub all: &'a Tensor,
    /// A number for each row.
    pub rows: Option<&'a Tensor>,
}

/// A sum times its factors, rounded once to `dtype`; in the sum's own memory if that is its dtype.
pub(super) fn scaled(sum: Tensor, factors: Factors, dtype: DType) -> Result<Tensor> {
    if sum.elem_count() == 0 {
        return Tensor::zeros(sum.shape(), dtype, sum.device());
    }
    #[cfg(feature = "cuda")]
    if sum.dtype() != dtype
        && let Some(rounded) = on_cuda(&sum, [Some(factors.all), factors.rows, None], dtype)?
    {
        return Ok(rounded);
    }
    let op = ScaleInPlace { all: Locked::new(factors.all), rows: factors.rows.map(Locked::new) };
    sum.inplace_op1(&op)?;
    sum.to_dtype(dtype)
}

/// A copy of a matrix with each row times a number in the arithmetic dtype.
pub(super) fn times_rows(matrix: &Tensor, rows: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(scaled) = on_cuda(matrix, [None, Some(rows), None], matrix.dtype())? {
        return Ok(scaled);
    }
    let wide = matrix.to_dtype(arithmetic(matrix.dtype()))?;
    (wide * rows.unsqueeze(1)?.broadcast_as(matrix.shape())?)?.to_dtype(matrix.dtype())
}

/// A copy of a matrix with zeros in the rows for which the mask `(N, 1)` has a 0, whatever they hold.
pub(super) fn masked(matrix: &Tensor, mask: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(masked) = on_cuda(matrix, [None, None, Some(mask)], matrix.dtype())? {
        return Ok(masked);
    }
    mask.broadcast_as(matrix.shape())?.where_cond(matrix, &matrix.zeros_like()?)
}

/// A copy of a matrix times its factors, [`ScaleFactors`] in their order, by the CUDA kernel; `None` for a matrix on
/// another device.
#[cfg(feature = "cuda")]
fn on_cuda(matrix: &Tensor, factors: [Option<&Tensor>; 3], dtype: DType) -> Result<Option<Tensor>> {
    if !matrix.device().is_cuda() {
        return Ok(None);
    }
    let of = Locked::new(matrix);
    let [all, rows, mask] = factors.map(|factor| factor.map(Locked::new));
    let factors = ScaleFactors { all: arg(&all)?, rows: arg(&rows)?, mask: arg(&mask)? };
    Ok(Some(kernel::scaled(of.arg(NAME)?, factors, dtype)?.into_tensor(matrix.shape())))
}

#[cfg(feature = "cuda")]
fn arg<'a>(factor: &'a Option<Locked>) -> Result<Option<Arg<'a, CudaStorage>>> {
    factor.as_ref().map(|factor| factor.arg(NAME)).transpose()
}

/// A contiguous matrix times its factors, in place.
struct ScaleInPlace<'a> {
    all: Locked<'a>,
    rows: Option<Locked<'a>>,
}

impl InplaceOp1 for ScaleInPlace<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match sum {
            CpuStorage::F32(sum) => self.on_cpu(sum, layout),
            CpuStorage::F64(sum) => self.on_cpu(sum, layout),
            _ => bail!("{NAME}: a dtype of no sum, expected f32 or f64"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, sum: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let factors = ScaleFactors { all: Some(self.all.arg(NAME)?), rows: arg(&self.rows)?, mask: None };
        kernel::scale_in_place(sum, layout, factors)
    }
}

impl ScaleInPlace<'_> {
    fn on_cpu<T: WithDType>(&self, sum: &mut [T], layout: &Layout) -> Result<()> {
        let (Some((start, end)), (rows, columns)) = (layout.contiguous_offsets(), layout.shape().dims2()?) else {
            bail!("{NAME}: strides {:?} of shape {:?}, expected contiguous ones", layout.stride(), layout.dims())
        };
        let &[all] = numbers::<T>(&self.all, 1)? else { bail!("{NAME}: no factor") };
        let of_rows = self.rows.as_ref().map(|of_rows| numbers::<T>(of_rows, rows)).transpose()?;
        if all == T::one() && of_rows.is_none() {
            return Ok(());
        }
        for (row, elements) in sum[start..end].chunks_mut(columns).enumerate() {
            let of_row = of_rows.map_or(T::one(), |of_rows| of_rows[row]);
            elements.iter_mut().for_each(|element| *element = *element * of_row * all);
        }
        Ok(())
    }
}

/// `count` factors one after the other.
fn numbers<'a, T: WithDType>(of: &'a Locked, count: usize) -> Result<&'a [T]> {
    let (storage, layout) = of.arg::<CpuStorage>(NAME)?;
    match layout.contiguous_offsets() {
        Some((start, end)) if end - start == count => Ok(&storage.as_slice::<T>()?[start..end]),
        _ => bail!("{NAME}: factors {:?}, expected {count} contiguous ones", layout.dims()),
    }
}
