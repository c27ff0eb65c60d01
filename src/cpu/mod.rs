//! What the CPU kernels of all families are made of: vector mathematics, elements of any dtype and layout, stores past
//! the cache, tasks.

pub(crate) mod element;
pub(crate) mod indices;
pub(crate) mod math;
pub(crate) mod parallel;
pub(crate) mod stream;

use crate::custom_op::Arg;
use candle_core::{CpuStorage, Result, bail};
use math::Real;

/// Calls `body` with the storage's elements as a slice of their own type.
macro_rules! with_floats {
    ($name:expr, $storage:expr, $data:ident => $body:expr) => {
        match $storage {
            CpuStorage::F16($data) => $body,
            CpuStorage::BF16($data) => $body,
            CpuStorage::F32($data) => $body,
            CpuStorage::F64($data) => $body,
            other => return Err($crate::check::not_float($name, "input", other.dtype())),
        }
    };
}
pub(crate) use with_floats;

/// A tensor of this crate's own, contiguous and in the arithmetic type.
pub(crate) fn own_slice<'a, A: Real>((storage, layout): Arg<'a, CpuStorage>) -> Result<&'a [A]> {
    let data = A::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => {
            bail!("a contiguous tensor was expected, got strides {:?} of shape {:?}", layout.stride(), layout.dims())
        }
    }
}

/// The sum in an order that only the length decides.
pub(crate) fn sum_in_order<A: Real>(values: &[A]) -> f64 {
    const WIDTH: usize = 16;
    let mut lanes = [0f64; WIDTH];
    for chunk in values.chunks(WIDTH) {
        for (sum, v) in lanes.iter_mut().zip(chunk) {
            *sum += v.to_f64();
        }
    }
    lanes.iter().sum()
}
