//! The CPU kernels: one parallel pass over the input for each forward, backward or `loss_and_grad`.

pub(crate) mod element;
pub(crate) mod logistic;
pub(crate) mod math;
mod parallel;
pub(crate) mod softmax;
mod terms;

use math::Real;
use parallel::for_each_task;

/// The sum in an order that only the length decides.
fn sum_in_order<A: Real>(values: &[A]) -> f64 {
    const WIDTH: usize = 16;
    let mut lanes = [0f64; WIDTH];
    for chunk in values.chunks(WIDTH) {
        for (sum, v) in lanes.iter_mut().zip(chunk) {
            *sum += v.to_f64();
        }
    }
    lanes.iter().sum()
}
