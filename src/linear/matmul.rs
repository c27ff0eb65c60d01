//! A matrix product into memory that exists already, replacing what is there or added to it.
//!
//! candle's `matmul` allocates its result in the dtype of its operands. Work on chunks wants more: one buffer for all
//! chunks, and gradients that are summed over the chunks in f32, also where the operands are 16-bit. On the CPU this is
//! the `gemm` crate and on CUDA cuBLAS, both as in candle itself.

use super::place::{MatrixPlace, NAME};
use crate::custom_op::{Arg, Locked};
use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, WithDType, bail};

/// How a product changes what is there.
#[derive(Clone, Copy)]
pub(crate) enum Update<'a> {
    Replace,
    /// By the product times a scalar of the arithmetic dtype.
    ReplaceTimes(&'a Tensor),
    Add,
}

/// `to <- lhs rhs`, `to <- factor lhs rhs`, or `to <- to + lhs rhs`, for matrices of any strides on the CPU; on CUDA,
/// one stride of each is 1. What is replaced is not read.
///
/// The dtypes are the same, or on CUDA 16-bit operands and an f32 result.
pub(crate) fn product(to: &Tensor, lhs: &Tensor, rhs: &Tensor, update: Update) -> Result<()> {
    if to.elem_count() == 0 {
        return Ok(());
    }
    let factor = match update {
        Update::ReplaceTimes(factor) => Some(Locked::new(factor)),
        Update::Replace | Update::Add => None,
    };
    to.inplace_op3(lhs, rhs, &Product { accumulate: matches!(update, Update::Add), factor })
}

struct Product<'a> {
    accumulate: bool,
    factor: Option<Locked<'a>>,
}

impl Product<'_> {
    fn run_on_cpu<T: WithDType>(&self, to: &mut [T], lhs: &[T], rhs: &[T], places: [MatrixPlace; 3]) -> Result<()> {
        let factor = match &self.factor {
            Some(factor) => number(factor.arg(NAME)?)?,
            None => T::one(),
        };
        on_cpu(to, lhs, rhs, places, self.accumulate, factor);
        Ok(())
    }
}

/// The number of a scalar tensor.
fn number<T: WithDType>((storage, layout): Arg<CpuStorage>) -> Result<T> {
    match storage.as_slice::<T>()?.get(layout.start_offset()) {
        Some(&number) if layout.shape().elem_count() == 1 => Ok(number),
        _ => bail!("{NAME}: factor of shape {:?}, expected a scalar", layout.dims()),
    }
}

/// The three matrices of a product that fit together.
fn places(to: &Layout, lhs: &Layout, rhs: &Layout) -> Result<[MatrixPlace; 3]> {
    let [t, l, r] = [MatrixPlace::of(to)?, MatrixPlace::of(lhs)?, MatrixPlace::of(rhs)?];
    if (l.rows, r.columns, l.columns) != (t.rows, t.columns, r.rows) {
        bail!("{NAME}: {:?} times {:?} into {:?}", lhs.dims(), rhs.dims(), to.dims());
    }
    if !t.is_distinct() {
        bail!("{NAME}: strides {:?} of the result {:?}, expected a place for each element", to.stride(), to.dims());
    }
    Ok([t, l, r])
}

impl InplaceOp3 for Product<'_> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        to: &mut CpuStorage,
        to_layout: &Layout,
        lhs: &CpuStorage,
        lhs_layout: &Layout,
        rhs: &CpuStorage,
        rhs_layout: &Layout,
    ) -> Result<()> {
        let places = places(to_layout, lhs_layout, rhs_layout)?;
        match (to, lhs, rhs) {
            (CpuStorage::F32(to), CpuStorage::F32(lhs), CpuStorage::F32(rhs)) => self.run_on_cpu(to, lhs, rhs, places),
            (CpuStorage::F64(to), CpuStorage::F64(lhs), CpuStorage::F64(rhs)) => self.run_on_cpu(to, lhs, rhs, places),
            _ => bail!("{NAME}: dtypes that don't go together, expected f32 or f64 for all three"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        to: &mut candle_core::CudaStorage,
        to_layout: &Layout,
        lhs: &candle_core::CudaStorage,
        lhs_layout: &Layout,
        rhs: &candle_core::CudaStorage,
        rhs_layout: &Layout,
    ) -> Result<()> {
        use super::cublas::{self, Scalars};
        use candle_core::DType::{BF16, F16, F32, F64};
        use candle_core::backend::BackendStorage;
        use half::{bf16, f16};

        let places = places(to_layout, lhs_layout, rhs_layout)?;
        let factor = self.factor.as_ref().map(|factor| factor.arg(NAME)).transpose()?;
        let scalars = Scalars { accumulate: self.accumulate, factor };
        match (to.dtype(), lhs.dtype(), rhs.dtype()) {
            (F16, F16, F16) => cublas::product::<f16, f16>(to, lhs, rhs, places, scalars),
            (F32, F16, F16) => cublas::product::<f32, f16>(to, lhs, rhs, places, scalars),
            (BF16, BF16, BF16) => cublas::product::<bf16, bf16>(to, lhs, rhs, places, scalars),
            (F32, BF16, BF16) => cublas::product::<f32, bf16>(to, lhs, rhs, places, scalars),
            (F32, F32, F32) => cublas::product::<f32, f32>(to, lhs, rhs, places, scalars),
            (F64, F64, F64) => cublas::product::<f64, f64>(to, lhs, rhs, places, scalars),
            (t, l, r) => bail!("{NAME}: {l:?} times {r:?} into {t:?}"),
        }
    }
}

fn on_cpu<T: WithDType>(to: &mut [T], lhs: &[T], rhs: &[T], [t, l, r]: [MatrixPlace; 3], accumulate: bool, factor: T) {
    let (to, lhs, rhs) = (&mut to[t.range()], &lhs[l.range()], &rhs[r.range()]);
    let parallelism = match candle_core::utils::get_num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the slices end where the strides and sizes do; the result's memory is borrowed for itself alone, and
    // `places` found its elements distinct, so that threads write apart
    unsafe {
        gemm::gemm(
            t.rows,
            t.columns,
            l.columns,
            to.as_mut_ptr(),
            t.column_stride as isize,
            t.row_stride as isize,
            accumulate,
            lhs.as_ptr(),
            l.column_stride as isize,
            l.row_stride as isize,
            rhs.as_ptr(),
            r.column_stride as isize,
            r.row_stride as isize,
            // factors of what is there, and of the product
            if accumulate { T::one() } else { T::zero() },
            factor,
            false,
            false,
            false,
            parallelism,
        )
    }
}
