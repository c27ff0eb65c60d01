//! Matrix products by cuBLAS: called as candle calls it, but the result may have a dtype of its own, may be added to,
//! or be multiplied by a number that only the device knows.

use super::place::{MatrixPlace, NAME};
use crate::custom_op::Arg;
use candle_core::cuda_backend::{
    CudaDType, CudaDevice, WrapErr, gemm_reduced_precision_bf16, gemm_reduced_precision_f32,
};
use candle_core::{CudaStorage, Result, bail};
use cudarc::cublas::CudaBlas;
use cudarc::cublas::result::{dgemm_strided_batched, gemm_strided_batched_ex};
use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasGemmAlgo_t, cublasOperation_t as Transpose, cublasPointerMode_t,
    cudaDataType_t,
};
use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub(crate) trait BlasElement: CudaDType + DeviceRepr {
    const TYPE: cudaDataType_t;
    /// What sums of products of these are multiplied by.
    type Scalar: CudaDType + DeviceRepr + ValidAsZeroBits + From<u8>;

    /// The arithmetic of sums of products of these: at least f32, unless candle was told that less is enough.
    fn compute() -> Compute {
        Compute::CUBLAS_COMPUTE_32F
    }
}

impl BlasElement for f16 {
    type Scalar = f32;
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16F;
}

impl BlasElement for bf16 {
    type Scalar = f32;
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;

    fn compute() -> Compute {
        match gemm_reduced_precision_bf16() {
            true => Compute::CUBLAS_COMPUTE_32F_FAST_16BF,
            false => Compute::CUBLAS_COMPUTE_32F,
        }
    }
}

impl BlasElement for f32 {
    type Scalar = f32;
    const TYPE: cudaDataType_t = cudaDataType_t::CUDA_R_32F;

    fn compute() -> Compute {
        match gemm_reduced_precision_f32() {
            true => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => Compute::CUBLAS_COMPUTE_32F,
        }
    }
}

impl BlasElement for f64 {
    type Scalar = f64;
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

/// How a product is put where it goes.
#[derive(Clone, Copy)]
pub(crate) struct Scalars<'a> {
    /// Whether it is added to what is there, or replaces it.
    pub accumulate: bool,
    /// A factor of a product that replaces what is there, in device memory.
    pub factor: Option<Arg<'a, CudaStorage>>,
}

/// A handle for products whose scalars are in device memory. candle's own stays in the other mode, as any thread may
/// use it at any time.
struct DeviceScalars {
    /// candle's handle, of the same stream.
    of: Weak<CudaBlas>,
    blas: Arc<CudaBlas>,
}

/// The handle beside that of a device, made for its first such product. Those of devices that are gone go then.
fn with_device_scalars(device: &CudaDevice) -> Result<Arc<CudaBlas>> {
    static HANDLES: Mutex<Vec<DeviceScalars>> = Mutex::new(Vec::new());
    let of = device.cublas_handle();
    let mut handles = HANDLES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = handles.iter().find(|handle| handle.of.as_ptr() == Arc::as_ptr(&of)) {
        return Ok(found.blas.clone());
    }
    let blas = Arc::new(CudaBlas::new(device.cuda_stream()).w()?);
    blas.set_pointer_mode(cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE).w()?;
    handles.retain(|handle| handle.of.strong_count() > 0);
    handles.push(DeviceScalars { of: Arc::downgrade(&of), blas: blas.clone() });
    Ok(blas)
}

pub(crate) fn product<To: BlasElement, Of: BlasElement>(
    to: &mut CudaStorage,
    lhs: &CudaStorage,
    rhs: &CudaStorage,
    places: [MatrixPlace; 3],
    Scalars { accumulate, factor }: Scalars,
) -> Result<()> {
    let device = to.device.clone();
    let Some((factor, layout)) = factor else {
        let (one, kept) = (Of::Scalar::from(1u8), Of::Scalar::from(accumulate as u8));
        let scalars = [(&raw const one).cast(), (&raw const kept).cast()];
        // SAFETY: a handle of scalars of the host, which live until the call is over
        return unsafe { gemm::<To, Of>(&device.cublas_handle(), to, lhs, rhs, places, scalars) };
    };
    if accumulate || layout.shape().elem_count() != 1 {
        bail!("{NAME}: a factor of shape {:?}, expected a scalar, for a product that replaces", layout.dims());
    }
    let blas = with_device_scalars(&device)?;
    let stream = device.cuda_stream();
    let factor = factor.as_cuda_slice::<Of::Scalar>()?.slice(layout.start_offset()..);
    let zero = stream.alloc_zeros::<Of::Scalar>(1).w()?;
    let ((factor, _factor), (zero, _zero)) = (factor.device_ptr(&stream), zero.device_ptr(&stream));
    // SAFETY: a handle of scalars of the device, which are freed behind the product in its stream
    unsafe { gemm::<To, Of>(&blas, to, lhs, rhs, places, [factor as *const c_void, zero as *const c_void]) }
}

/// `to <- alpha lhs rhs + beta to`. Where `beta` is 0, cuBLAS doesn't read `to`.
///
/// # Safety
/// The scalars are numbers of the type `Of::Scalar` where the handle takes them from. The handle's stream is that of
/// the matrices.
unsafe fn gemm<To: BlasElement, Of: BlasElement>(
    blas: &CudaBlas,
    to: &mut CudaStorage,
    lhs: &CudaStorage,
    rhs: &CudaStorage,
    [t, l, r]: [MatrixPlace; 3],
    [alpha, beta]: [*const c_void; 2],
) -> Result<()> {
    #[cfg(test)]
    PRODUCTS.set(PRODUCTS.get() + 1);
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
    // stride or there is one column (or row); the result's elements are distinct (`places`); all on the handle's
    // stream, and the scalars, by this function's contract
    unsafe {
        if matches!(Of::compute(), Compute::CUBLAS_COMPUTE_64F) {
            let (rhs, lhs, to) = (rhs as *const f64, lhs as *const f64, to as *mut f64);
            return dgemm_strided_batched(
                handle,
                rhs_transpose,
                lhs_transpose,
                columns,
                rows,
                inner,
                alpha.cast(),
                rhs,
                rhs_distance,
                0,
                lhs,
                lhs_distance,
                0,
                beta.cast(),
                to,
                to_distance,
                0,
                1,
            )
            .w();
        }
        gemm_strided_batched_ex(
            handle,
            rhs_transpose,
            lhs_transpose,
            columns,
            rows,
            inner,
            alpha,
            rhs as *const c_void,
            Of::TYPE,
            rhs_distance,
            0,
            lhs as *const c_void,
            Of::TYPE,
            lhs_distance,
            0,
            beta,
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
thread_local! {
    /// The products that this thread has asked for.
    pub(crate) static PRODUCTS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
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
