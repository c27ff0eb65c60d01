//! Matrix products by cuBLAS: called as candle calls it, but the result may have a dtype of its own, and may be added
//! to.

use super::place::{MatrixPlace, NAME};
use candle_core::cuda_backend::{CudaDType, WrapErr, gemm_reduced_precision_bf16, gemm_reduced_precision_f32};
use candle_core::{CudaStorage, Result, bail};
use cudarc::cublas::result::{dgemm_strided_batched, gemm_strided_batched_ex};
use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasGemmAlgo_t, cublasOperation_t as Transpose, cudaDataType_t,
};
use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use half::{bf16, f16};
use std::ffi::c_void;

static ONE: f32 = 1.0;

pub(crate) trait BlasElement: CudaDType + DeviceRepr {
    const TYPE: cudaDataType_t;

    /// The arithmetic of sums of products of these: at least f32, unless candle was told that less is enough.
    fn compute() -> Compute {
        Compute::CUBLAS_COMPUTE_32F
    }
}

impl BlasElement for f16 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16F;
}

impl BlasElement for bf16 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;

    fn compute() -> Compute {
        match gemm_reduced_precision_bf16() {
            true => Compute::CUBLAS_COMPUTE_32F_FAST_16BF,
            false => Compute::CUBLAS_COMPUTE_32F,
        }
    }
}

impl BlasElement for f32 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_32F;

    fn compute() -> Compute {
        match gemm_reduced_precision_f32() {
            true => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => Compute::CUBLAS_COMPUTE_32F,
        }
    }
}

impl BlasElement for f64 {
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_64F;

    fn compute() -> Compute {
        Compute::CUBLAS_COMPUTE_64F
    }
}

impl MatrixPlace {
    /// The matrix as cuBLAS takes it, with our rows as its columns: whether it has to be transposed, and the distance
    /// between its columns.
    fn leading(&self) -> Result<(Transpose, i32)> {
        // the stride of an axis with one position means nothing
        if self.column_stride == 1 || self.columns == 1 && self.row_stride != 1 {
            let distance = if self.rows == 1 { self.columns } else { self.row_stride };
            if distance >= self.columns {
                return Ok((Transpose::CUBLAS_OP_N, small(distance.max(1))?));
            }
        }
        if self.row_stride == 1 || self.rows == 1 {
            let distance = if self.columns == 1 { self.rows } else { self.column_stride };
            if distance >= self.rows {
                return Ok((Transpose::CUBLAS_OP_T, small(distance.max(1))?));
            }
        }
        let (strides, sizes) = ((self.row_stride, self.column_stride), (self.rows, self.columns));
        bail!(
            "{NAME}: strides {strides:?} of {sizes:?}, expected one to be 1, the other no shorter than what is adjacent"
        )
    }
}

fn small(size: usize) -> Result<i32> {
    match i32::try_from(size) {
        Ok(size) => Ok(size),
        Err(_) => bail!("{NAME}: size {size}, expected at most {}", i32::MAX),
    }
}

pub(crate) fn product<To: BlasElement, Of: BlasElement>(
    to: &mut CudaStorage,
    lhs: &CudaStorage,
    rhs: &CudaStorage,
    [t, l, r]: [MatrixPlace; 3],
    accumulate: bool,
) -> Result<()> {
    let blas = to.device.cublas_handle();
    let stream = to.device.cuda_stream();
    let (Transpose::CUBLAS_OP_N, to_distance) = t.leading()? else {
        bail!("{NAME}: strides ({}, {}) of the result, expected adjacent columns", t.row_stride, t.column_stride)
    };
    let (lhs_transpose, lhs_distance) = l.leading()?;
    let (rhs_transpose, rhs_distance) = r.leading()?;
    let mut to = to.as_cuda_slice_mut::<To>()?.slice_mut(t.range());
    let (lhs, rhs) = (lhs.as_cuda_slice::<Of>()?.slice(l.range()), rhs.as_cuda_slice::<Of>()?.slice(r.range()));
    let (to, _to) = to.device_ptr_mut(&stream);
    let (lhs, _lhs) = lhs.device_ptr(&stream);
    let (rhs, _rhs) = rhs.device_ptr(&stream);
    let (columns, rows, inner) = (small(t.columns)?, small(t.rows)?, small(l.columns)?);
    let handle = *blas.handle();
    // SAFETY: the views hold every element that the sizes and distances lead to, as a distance is the matrix's own
    // stride or there is one column (or row); the result's elements are distinct (`places`); all on the handle's stream
    unsafe {
        if matches!(Of::compute(), Compute::CUBLAS_COMPUTE_64F) {
            let (rhs, lhs, to) = (rhs as *const f64, lhs as *const f64, to as *mut f64);
            let kept = if accumulate { &1.0 } else { &0.0 };
            return dgemm_strided_batched(
                handle,
                rhs_transpose,
                lhs_transpose,
                columns,
                rows,
                inner,
                &1.0,
                rhs,
                rhs_distance,
                0,
                lhs,
                lhs_distance,
                0,
                kept,
                to,
                to_distance,
                0,
                1,
            )
            .w();
        }
        let kept: &f32 = if accumulate { &1.0 } else { &0.0 };
        gemm_strided_batched_ex(
            handle,
            rhs_transpose,
            lhs_transpose,
            columns,
            rows,
            inner,
            (&raw const ONE).cast(),
            rhs as *const c_void,
            Of::TYPE,
            rhs_distance,
            0,
            lhs as *const c_void,
            Of::TYPE,
            lhs_distance,
            0,
            std::ptr::from_ref(kept).cast(),
            to as *mut c_void,
            To::TYPE,
            to_distance,
            0,
            1,
            Of::compute(),
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
        .w()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_strides() {
        let place = |(rows, columns), (row_stride, column_stride)| {
            let place = MatrixPlace { start: 0, rows, columns, row_stride, column_stride };
            place.leading().map(|(transpose, distance)| (transpose == Transpose::CUBLAS_OP_T, distance))
        };
        for (sizes, strides, expected) in [
            ((3, 4), (4, 1), (false, 4)),
            ((3, 4), (9, 1), (false, 9)),
            ((3, 4), (1, 3), (true, 3)),
            ((3, 4), (1, 5), (true, 5)),
            ((1, 4), (0, 1), (false, 4)),
            ((1, 4), (0, 7), (true, 7)),
            ((3, 1), (7, 0), (false, 7)),
        ] {
            assert_eq!(place(sizes, strides).unwrap(), expected, "{sizes:?} {strides:?}");
        }
        // a row that stands for several, rows that overlap, and no stride of 1
        for (sizes, strides) in [((3, 4), (0, 1)), ((3, 4), (3, 1)), ((3, 4), (1, 2)), ((3, 4), (8, 2))] {
            assert!(place(sizes, strides).is_err(), "{sizes:?} {strides:?}");
        }
    }
}
