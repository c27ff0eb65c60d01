//! The CPU kernels: one parallel pass over the input for each forward, backward or `loss_and_grad`.

pub(crate) mod element;
pub(crate) mod logistic;
pub(crate) mod math;
pub(crate) mod softmax;
mod terms;

use math::Real;
use rayon::prelude::*;
use std::ops::Range;

/// Elements a task takes: 256 KB of f32, which outlives the cost of a task many times and leaves enough of them.
const TASK_ELEMENTS: usize = 64 * 1024;
/// Up to here waking other threads costs more than they save.
const SERIAL_ELEMENTS: usize = 16 * 1024;

/// Covers `0..units` with ranges, in parallel where there is enough work. Every unit is independent of every other.
fn for_each_task(units: usize, elements_per_unit: usize, task: impl Fn(Range<usize>) + Sync) {
    if units == 0 {
        return;
    }
    if units == 1 || units.saturating_mul(elements_per_unit) <= SERIAL_ELEMENTS {
        return task(0..units);
    }
    let step = (TASK_ELEMENTS / elements_per_unit.max(1)).clamp(1, units.div_ceil(2));
    (0..units.div_ceil(step)).into_par_iter().for_each(|i| task(i * step..((i + 1) * step).min(units)));
}

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
