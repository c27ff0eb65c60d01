//! Every loss: this crate's kernels against the same loss in candle's tensor ops and against `candle_nn`'s.
//!
//!     cargo bench --bench losses                                  everything, about an hour on two cores
//!     cargo bench --bench losses -- --quick cross_entropy/f32     what matches
//!
//! Throughput is the pass's minimum of bytes (of a linear layer's loss: of operations) over its time, whatever an
//! implementation really does. On a GPU (`--features
//! cuda`) the times are the device's own. `report` is the bench that interleaves what it compares and writes a table.

mod common;

use common::case::{Case, FORWARD, GRADIENT, Implementation, Pass, Unit, cases};
use common::machine::{Freed, Machine};
use common::work::Inputs;
use criterion::{BenchmarkId, Criterion, Throughput};
use std::time::Duration;

/// The logits that `--quick` still takes.
const ENDLESS: usize = 1 << 23;

fn bench(criterion: &mut Criterion, machine: &Machine, case: Case) {
    let mut inputs = None;
    let mut group = criterion.benchmark_group(case.to_string());
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (implementation, pass) in FORWARD.into_iter().chain(GRADIENT) {
        if !case.exists(implementation, pass, machine.device.is_cuda()) {
            continue;
        }
        let id = BenchmarkId::new(implementation.name(), pass.name());
        let least = case.minimum(pass);
        group.throughput(match least.unit {
            Unit::Bytes => Throughput::Bytes(least.amount as u64),
            Unit::Operations => Throughput::Elements(least.amount as u64),
        });
        group.bench_function(id, |b| {
            // only what the filter lets through needs data
            let inputs = inputs.get_or_insert_with(|| Inputs::new(case, machine).expect("inputs of the bench"));
            inputs.prepare(pass).expect("inputs of the bench");
            let mut next = 0;
            b.iter_custom(|iterations| {
                let count = iterations as usize;
                let time = time(machine, inputs, implementation, pass, next, count);
                next += count;
                time
            });
        });
    }
    group.finish();
}

/// The time of `count` calls; on a GPU each is flushed and timed for itself, as far as that is bearable.
fn time(
    machine: &Machine,
    inputs: &Inputs,
    implementation: Implementation,
    pass: Pass,
    first: usize,
    count: usize,
) -> Duration {
    let run = |first, count| inputs.time(machine, implementation, pass, first, count).expect("the bench ran");
    if machine.device.is_cpu() {
        return run(first, count);
    }
    let timed = count.min(200);
    let total: Duration = (first..first + timed).map(|i| run(i, 1)).sum();
    total.mul_f64(count as f64 / timed as f64)
}

fn main() {
    // before criterion starts threads
    let machine = Machine::best(Freed::Kept, false).expect("a device");
    let mut criterion = Criterion::default().configure_from_args();
    eprintln!("{}", machine.name);
    let quick = std::env::args().any(|arg| arg == "--quick");
    for case in cases(machine.device.is_cuda(), false) {
        if !quick || case.elements() <= ENDLESS {
            bench(&mut criterion, &machine, case);
        }
    }
    criterion.final_summary();
}
