//! The goals for a GPU, and the table that holds a file's rows against them.

use crate::common::case::{Case, Loss, Pass, SMALL, Unit, image, linear, rows, shifted};
use crate::first;
use crate::series::{EVENTLESS, GRAPH};
use crate::table::Row;
use candle_core::DType::{BF16, F32};

#[derive(Clone, Copy)]
enum Goal {
    /// The minimum of bytes over time, as a share of the copy's rate: at least.
    Share(f64),
    /// Another share on the card of this name.
    ShareOn(f64, &'static str, f64),
    /// Microseconds: at most.
    Time(f64),
    /// The time over that of the operations at the matrix product's rate: at most.
    Products(f64),
}

/// This crate's kernels, launched by the host.
const FUSED: &str = "fused";
/// Everything that is not a peer.
const OURS: [&str; 7] = [FUSED, GRAPH, EVENTLESS, "unfused", "candle", "memory", "matmul"];

struct Line {
    case: Case,
    implementation: &'static str,
    pass: Pass,
    goal: Goal,
}

fn lines() -> Vec<Line> {
    use Goal::{Products, Share, ShareOn, Time};
    use Pass::{Backward, Forward, HostCall, LossAndGrad, TargetGradient};
    let mut lines = vec![];
    let mut add = |case, passes: Vec<(Pass, Goal)>| {
        lines.extend(passes.into_iter().map(|(pass, goal)| Line { case, implementation: FUSED, pass, goal }));
    };
    let ce = |n, v| rows(Loss::CrossEntropy, BF16, n, v);
    for (n, v) in [(4096, 32000), (16384, 16384), (8192, 65536), (8192, 128_256), (8192, 262_144)] {
        add(ce(n, v), vec![(Forward, Share(1.0)), (LossAndGrad, Share(0.95)), (Backward, Share(0.95))]);
    }
    add(ce(16384, 50257), vec![(Forward, Share(1.0)), (LossAndGrad, Share(0.93)), (Backward, Share(0.93))]);
    add(ce(32768, 4096), vec![(LossAndGrad, Share(0.95)), (Backward, Share(0.95))]);
    add(shifted(BF16, 8, 2047, 50257), vec![(LossAndGrad, Share(0.9)), (Backward, Share(0.9))]);
    add(shifted(BF16, 8, 2047, 50256), vec![(LossAndGrad, Share(0.95)), (Backward, Share(0.95))]);
    add(
        rows(Loss::CrossEntropySoftcap, BF16, 4096, 256_000),
        vec![(Forward, Share(0.9)), (LossAndGrad, Share(0.8)), (Backward, Share(0.8))],
    );
    let all = |share: f64| [Forward, LossAndGrad, Backward].map(|pass| (pass, Share(share))).to_vec();
    let mut probabilities = all(0.8);
    probabilities.push((TargetGradient, Share(0.8)));
    add(rows(Loss::CrossEntropyProbabilities, BF16, 4096, 32000), probabilities);
    for (n, v) in [(4096, 32000), (8192, 128_256)] {
        add(rows(Loss::LogSoftmax, BF16, n, v), vec![(Forward, Share(0.95)), (Backward, Share(0.93))]);
    }
    let short = ShareOn(0.85, "H200", 0.75);
    add(rows(Loss::LogSoftmax, BF16, 65536, 1000), vec![(Forward, short), (Backward, short)]);
    for loss in [Loss::CrossEntropy, Loss::CrossEntropySmoothing] {
        add(rows(loss, BF16, 65536, 1000), vec![(Forward, short), (LossAndGrad, short)]);
    }
    add(image(Loss::CrossEntropy, BF16, 16, 21, 512), all(0.8));
    add(rows(Loss::BceWithLogits, F32, 8192, 8192), vec![(LossAndGrad, Share(0.95))]);
    add(rows(Loss::BceWithLogits, BF16, 8192, 8192), vec![(LossAndGrad, Share(0.9))]);
    add(linear(BF16, 8192, 4096, 128_256), vec![(LossAndGrad, Products(1.06))]);
    add(linear(BF16, 8192, 4096, 50257), vec![(LossAndGrad, Products(1.15))]);
    add(SMALL, vec![(HostCall, Time(10.0))]);
    for (case, implementation, pass, us) in
        [(SMALL, EVENTLESS, HostCall, 10.0), (ce(32768, 256), GRAPH, Forward, 9.0), (SMALL, GRAPH, LossAndGrad, 5.0)]
    {
        lines.push(Line { case, implementation, pass, goal: Time(us) });
    }
    lines
}

/// A peer's pass that does the same.
fn of_peers(pass: Pass) -> &'static str {
    match pass {
        Pass::LossAndGrad => Pass::ForwardBackward.name(),
        pass => pass.name(),
    }
}

/// The table: at most 60 lines. `rehearsed`: of rows that a rehearsal wrote, whose cases are shrunk.
pub fn table(rows: &[Row], rehearsed: bool) -> Vec<String> {
    let mut lines = lines();
    if rehearsed {
        lines.iter_mut().for_each(|line| line.case = line.case.shrunk());
    }
    let rate = |pass: &str| rows.iter().find(|row| row.loss == "-" && row.pass == pass).map(|row| row.gb_per_s);
    let (copy, read, product) = (rate("copy"), rate("read"), rate("product"));
    let shown = |rate: Option<f64>, unit: f64| rate.map_or("?".to_string(), |rate| format!("{:.1}", rate / unit));
    let mut table = vec![];
    if let Some(row) = rows.first() {
        let mhz = rows.iter().filter_map(|row| row.sm_mhz).fold(None, |range: Option<(f64, f64)>, mhz| {
            Some(range.map_or((mhz, mhz), |(low, high)| (low.min(mhz), high.max(mhz))))
        });
        let mhz = mhz.map_or("unknown".to_string(), |(low, high)| format!("{low:.0} to {high:.0} MHz"));
        table.push(format!("{}, driver {}, {}; clock {mhz}", row.device, row.driver, row.date));
    }
    table.push(format!(
        "copy {} GB/s, read {} GB/s, bf16 product {} TFLOP/s",
        shown(copy, 1.0),
        shown(read, 1.0),
        shown(product, 1e3)
    ));
    table.push(format!(
        "{:<51} {:<20} {:>9} {:>9} {:>6} {:>8}  best peer (its time over ours)",
        "case", "pass", "floor us", "median", "R", "goal"
    ));
    table.extend(lines.iter().map(|line| line.text(rows, copy, product)));
    table.push(first_call(rows));
    table
}

impl Line {
    fn text(&self, rows: &[Row], copy: Option<f64>, product: Option<f64>) -> String {
        let minimum = self.case.minimum(self.pass);
        let rate = match minimum.unit {
            Unit::Bytes => copy,
            Unit::Operations => product,
        };
        let floor = rate.map(|rate| minimum.amount as f64 / rate / 1e3);
        let shape = self.case.shape.to_string();
        let is_case = |row: &&Row| {
            row.loss == self.case.loss.name() && row.dtype == self.case.dtype.as_str() && row.shape == shape
        };
        let own = rows.iter().filter(is_case);
        let own = own.clone().find(|row| row.implementation == self.implementation && row.pass == self.pass.name());
        let device = rows.first().map_or("", |row| row.device.as_str());
        let name = self.case.to_string();
        let how = self.implementation.strip_prefix("fused-").map_or(String::new(), |how| format!(", {how}"));
        let pass = format!("{}{how}", self.pass.name());
        let (Some(row), Some(floor)) = (own, floor) else {
            return format!("{name:<51} {pass:<20} not measured");
        };
        let share = floor / row.p50_us;
        let (reached, r, goal) = match self.goal {
            Goal::Share(goal) => (share >= goal, format!("{share:.2}"), format!(">= {goal:.2}")),
            Goal::ShareOn(goal, card, other) => {
                let goal = if device.contains(card) { other } else { goal };
                (share >= goal, format!("{share:.2}"), format!(">= {goal:.2}"))
            }
            Goal::Time(us) => (row.p50_us <= us, format!("{share:.2}"), format!("<= {us} us")),
            Goal::Products(goal) => (1.0 / share <= goal, format!("{:.2}x", 1.0 / share), format!("<= {goal:.2}x")),
        };
        let is_peer = |row: &&Row| !OURS.contains(&row.implementation.as_str()) && row.pass == of_peers(self.pass);
        let best = rows.iter().filter(is_case).filter(is_peer).min_by(|a, b| a.p50_us.total_cmp(&b.p50_us));
        let best = best.map_or("-".to_string(), |peer| {
            format!("{} {:.1} ({:.2})", peer.implementation, peer.p50_us, peer.p50_us / row.p50_us)
        });
        let mark = if reached { ' ' } else { '!' };
        format!("{name:<51} {pass:<20} {floor:>9.1} {:>9.1} {r:>6} {goal:>8}{mark} {best}", row.p50_us)
    }
}

/// What the first loss takes beyond candle's own first operation, at most 0.3 s.
fn first_call(rows: &[Row]) -> String {
    const GOAL: f64 = 0.3e6;
    let of = |what: &str| rows.iter().find(|row| row.pass == first::PASS && row.loss == what).map(|row| row.p50_us);
    let name = "first loss of a process, against candle's affine";
    let (Some(candle), Some(ours)) = (of(first::OPERATION), of(first::LOSS)) else {
        return format!("{name:<51} {:<20} not measured", first::PASS);
    };
    let beyond = (ours - candle) / 1e6;
    let mark = if ours - candle <= GOAL { ' ' } else { '!' };
    format!("{name:<51} {:<20} {candle:>9.0} {ours:>9.0} {beyond:>5.2}s <= 0.30s{mark}", first::PASS)
}
