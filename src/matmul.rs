//! A matrix product into memory that exists already, replacing what is there or added to it.
//!
//! candle's `matmul` allocates its result in the dtype of its operands. Work on chunks wants more: one buffer for all
//! chunks, and gradients that are summed over the chunks in f32, also where the operands are 16-bit. On the CPU this is the
//! `gemm` crate and on CUDA cuBLAS, both as in candle itself.

use candle_core::{CpuStorage, InplaceOp3, Layout, Result, Tensor, WithDType, bail};

const NAME: &str = "matrix product";

/// `to <- lhs rhs`, or `to <- to + lhs rhs`, for matrices of any strides on the CPU; on CUDA, one stride of each is 1.
///
/// The dtypes are the same, or on CUDA 16-bit operands and an f32 result.
pub(crate) fn product(to: &Tensor, lhs: &Tensor, rhs: &Tensor, accumulate: bool) -> Result<()> {
    if to.elem_count() == 0 {
        return Ok(());
    }
    to.inplace_op3(lhs, rhs, &Product { accumulate })
}

struct Product {
    accumulate: bool,
}

/// Where a matrix begins, and the strides of its rows and columns.
#[derive(Clone, Copy)]
struct Place {
    start: usize,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Place {
    fn of(layout: &Layout) -> Result<Self> {
        let ((rows, columns), &[row_stride, column_stride]) = (layout.shape().dims2()?, layout.stride()) else {
            bail!("{NAME}: strides {:?} of shape {:?}", layout.stride(), layout.dims())
        };
        Ok(Place { start: layout.start_offset(), rows, columns, row_stride, column_stride })
    }

    /// From the first element to behind the last.
    fn range(&self) -> std::ops::Range<usize> {
        if self.rows == 0 || self.columns == 0 {
            return self.start..self.start;
        }
        self.start..self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// The three matrices of a product that fit together.
fn places(to: &Layout, lhs: &Layout, rhs: &Layout) -> Result<[Place; 3]> {
    let [t, l, r] = [Place::of(to)?, Place::of(lhs)?, Place::of(rhs)?];
    if (l.rows, r.columns, l.columns) != (t.rows, t.columns, r.rows) {
        bail!("{NAME}: {:?} times {:?} into {:?}", lhs.dims(), rhs.dims(), to.dims());
    }
    Ok([t, l, r])
}

impl InplaceOp3 for Product {
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
            (CpuStorage::F32(to), CpuStorage::F32(lhs), CpuStorage::F32(rhs)) => {
                on_cpu(to, lhs, rhs, places, self.accumulate)
            }
            (CpuStorage::F64(to), CpuStorage::F64(lhs), CpuStorage::F64(rhs)) => {
                on_cpu(to, lhs, rhs, places, self.accumulate)
            }
            _ => bail!("{NAME}: dtypes that don't go together, expected f32 or f64 for all three"),
        }
        Ok(())
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
        use candle_core::DType::{BF16, F16, F32, F64};
        use candle_core::backend::BackendStorage;
        use half::{bf16, f16};

        let places = places(to_layout, lhs_layout, rhs_layout)?;
        match (to.dtype(), lhs.dtype(), rhs.dtype()) {
            (F16, F16, F16) => cuda::product::<f16, f16>(to, lhs, rhs, places, self.accumulate),
            (F32, F16, F16) => cuda::product::<f32, f16>(to, lhs, rhs, places, self.accumulate),
            (BF16, BF16, BF16) => cuda::product::<bf16, bf16>(to, lhs, rhs, places, self.accumulate),
            (F32, BF16, BF16) => cuda::product::<f32, bf16>(to, lhs, rhs, places, self.accumulate),
            (F32, F32, F32) => cuda::product::<f32, f32>(to, lhs, rhs, places, self.accumulate),
            (F64, F64, F64) => cuda::product::<f64, f64>(to, lhs, rhs, places, self.accumulate),
            (t, l, r) => bail!("{NAME}: {l:?} times {r:?} into {t:?}"),
        }
    }
}

fn on_cpu<T: WithDType + From<i8>>(to: &mut [T], lhs: &[T], rhs: &[T], [t, l, r]: [Place; 3], accumulate: bool) {
    let (to, lhs, rhs) = (&mut to[t.range()], &lhs[l.range()], &rhs[r.range()]);
    let parallelism = match candle_core::utils::get_num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the slices end where the strides and sizes do, and the result's memory is borrowed for itself alone
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
            T::from(accumulate as i8),
            T::from(1),
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{NAME, Place};
    use candle_core::cuda_backend::cudarc::cublas::result::{dgemm_strided_batched, gemm_strided_batched_ex};
    use candle_core::cuda_backend::cudarc::cublas::sys::{
        cublasComputeType_t as Compute, cublasGemmAlgo_t, cublasOperation_t as Transpose, cudaDataType_t,
    };
    use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
    use candle_core::cuda_backend::{CudaDType, WrapErr, gemm_reduced_precision_bf16, gemm_reduced_precision_f32};
    use candle_core::{CudaStorage, Result, bail};
    use half::{bf16, f16};
    use std::ffi::c_void;

    static ONE: f32 = 1.0;

    pub(super) trait Element: CudaDType + DeviceRepr {
        const TYPE: cudaDataType_t;

        /// How sums of products of these are computed: never in less than f32 but where candle was told so.
        fn compute() -> Compute {
            Compute::CUBLAS_COMPUTE_32F
        }
    }

    impl Element for f16 {
        const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16F;
    }

    impl Element for bf16 {
        const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;

        fn compute() -> Compute {
            match gemm_reduced_precision_bf16() {
                true => Compute::CUBLAS_COMPUTE_32F_FAST_16BF,
                false => Compute::CUBLAS_COMPUTE_32F,
            }
        }
    }

    impl Element for f32 {
        const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_32F;

        fn compute() -> Compute {
            match gemm_reduced_precision_f32() {
                true => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
                false => Compute::CUBLAS_COMPUTE_32F,
            }
        }
    }

    impl Element for f64 {
        const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_64F;

        fn compute() -> Compute {
            Compute::CUBLAS_COMPUTE_64F
        }
    }

    impl Place {
        /// The matrix as cuBLAS takes it: its columns are our rows. Whether it has to be transposed, and the distance of
        /// its columns.
        fn leading(&self) -> Result<(Transpose, i32)> {
            // the stride of an axis with one position means nothing
            if self.column_stride == 1 || self.columns == 1 && self.row_stride != 1 {
                let distance = if self.rows == 1 { self.columns } else { self.row_stride };
                return Ok((Transpose::CUBLAS_OP_N, small(distance.max(self.columns))?));
            }
            if self.row_stride == 1 || self.rows == 1 {
                let distance = if self.columns == 1 { self.rows } else { self.column_stride };
                return Ok((Transpose::CUBLAS_OP_T, small(distance.max(self.rows))?));
            }
            bail!("{NAME}: strides ({}, {}), expected one of them to be 1", self.row_stride, self.column_stride)
        }
    }

    fn small(size: usize) -> Result<i32> {
        match i32::try_from(size) {
            Ok(size) => Ok(size),
            Err(_) => bail!("{NAME}: size {size}, expected at most {}", i32::MAX),
        }
    }

    pub(super) fn product<To: Element, Of: Element>(
        to: &mut CudaStorage,
        lhs: &CudaStorage,
        rhs: &CudaStorage,
        [t, l, r]: [Place; 3],
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
        // SAFETY: the views hold every element that the sizes and distances lead to, on the handle's stream
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
}
