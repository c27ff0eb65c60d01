//! What the tests of the families' kernels share.

use super::tests::in_software;
use crate::reduction::{LossForm, Reduction};
use candle_core::{DType, Device, Result, Tensor};

pub(crate) const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F16, DType::F64];

/// Numbers in [-3, 3), the same in every run.
pub(crate) fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
        })
        .collect()
}

pub(crate) fn random(shape: &[usize], seed: u64, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &Device::Cpu)?.to_dtype(dtype)
}

pub(crate) fn indices(rows: usize, classes: usize, seed: u64) -> Result<Tensor> {
    let values = numbers(rows, seed).iter().map(|v| ((v + 3.0) / 6.0 * classes as f32) as i64).collect::<Vec<_>>();
    Tensor::from_vec(values, rows, &Device::Cpu)
}

/// Whether the device's approximate instructions have no error, as on the software GPU unless it is told otherwise.
fn instructions_are_exact() -> bool {
    in_software() && !std::env::var("SOFTGPU_ULP").is_ok_and(|ulps| ulps != "0")
}

/// The largest deviation that rounding to `dtype` and sums in another order explain. Where exponentials and quotients
/// are off by two units themselves, a soft cap multiplies that of its tanh, and a difference such as slope p - q loses
/// a digit of it.
pub(crate) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 if instructions_are_exact() => 4e-6,
        DType::F32 => 2.4e-5,
        DType::F16 => 1.2e-3,
        _ => 1e-2,
    }
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    assert_eq!(got.dtype(), expected.dtype(), "{what}");
    let values = |t: &Tensor| {
        t.to_device(&Device::Cpu)
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
    };
    let (got, expected) = (values(got), values(expected));
    let largest = expected.iter().filter(|v| v.is_finite()).fold(0f64, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        let same = g == e || (g.is_nan() && e.is_nan());
        // a difference such as slope p - q keeps the rounding of its larger operands
        let close = (g - e).abs() <= tolerance * e.abs().max(0.1 * largest);
        assert!(same || close, "{what}: element {i} is {g:e}, expected {e:e}");
    }
}

/// What becomes of the losses without a normalizer.
pub(crate) fn form_of(reduction: Reduction) -> LossForm {
    let scalar = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    LossForm::new("test", (reduction, None), &scalar, scalar.shape()).unwrap()
}
