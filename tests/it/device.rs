//! What a CUDA device is told.

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys::CUmemPool_attribute};
use candle_fused_loss::keep_memory;

#[test]
fn the_pool_keeps_all_memory() -> Result<()> {
    keep_memory(&crate::common::cuda())?;
    let mut threshold = 0u64;
    // SAFETY: the device is 0 and the attribute's value a u64
    unsafe {
        let pool = result::device::get_mem_pool(0).w()?;
        let threshold = (&raw mut threshold).cast();
        result::mem_pool::get_attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, threshold).w()?;
    }
    assert_eq!(threshold, u64::MAX);
    Ok(())
}
