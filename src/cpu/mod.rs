//! The CPU kernels: one parallel pass over the input for each forward, backward or `loss_and_grad`.

pub(crate) mod element;
pub(crate) mod math;
pub(crate) mod parallel;

use math::Real;

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
