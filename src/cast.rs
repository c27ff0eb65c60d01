//! Numbers in a dtype that candle computes with: on CUDA it has neither conversions nor comparisons of i16 and i32.

use crate::check::is_index;
#[cfg(feature = "cuda")]
use crate::custom_op::DeviceStorage;
#[cfg(feature = "cuda")]
use candle_core::Storage;
use candle_core::{DType, Result, Tensor};

/// Class indices, or other integers, one after the other as i64.
pub(crate) fn indices_as_i64(target: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Storage::Cuda(storage) = &*target.storage_and_layout().0 {
        // its copy of the others can't be recorded in a CUDA graph
        return Ok(crate::cuda::indices::as_i64(storage, target.layout())?.into_tensor(target.shape()));
    }
    target.contiguous()?.to_dtype(DType::I64)
}

/// The numbers themselves, integers as i64.
pub(crate) fn computable(numbers: &Tensor) -> Result<Tensor> {
    if is_index(numbers.dtype()) { indices_as_i64(numbers) } else { Ok(numbers.clone()) }
}
