//! Every loss in plain f64 loops, after the definitions, with how exact a kernel's result has to be.
//!
//! A result comes with its slack: how many epsilons of the arithmetic dtype it may be off. The slack is the sum of the
//! sizes of the terms that the result is made of, times the roundings that each goes through: an elementary function is
//! good to two units in the last place, an exponential multiplies the rounding of its argument by the size of the
//! argument, and where two terms are subtracted, the rounding of both stays. Where the definition allows relative
//! accuracy (no terms cancel), the slack is relative too, however small the result.

use candle_fused_loss::{Reduction, RowTransform};

/// A number and how many epsilons it may be off.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Near {
    pub value: f64,
    pub slack: f64,
}

fn near(value: f64, slack: f64) -> Near {
    Near { value, slack }
}

/// The loss as the reduction returns it, the gradient of the input, and the gradient of a float target.
pub struct Expected {
    pub loss: Vec<Near>,
    pub grad: Vec<Near>,
    pub target_grad: Vec<Near>,
}

/// An elementary function, and the few operations around it.
const FUNCTION: f64 = 8.0;

/// A compensated sum: the reference must not need the slack itself.
pub fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0f64, 0f64);
    for v in values {
        let next = sum + v;
        lost += if sum.abs() >= v.abs() { (sum - next) + v } else { (v - next) + sum };
        sum = next;
    }
    // infinities and NaN are their own result
    if lost.is_nan() { sum } else { sum + lost }
}

fn reduced(losses: &[Near], reduction: Reduction, denominator: f64) -> Vec<Near> {
    if reduction == Reduction::None {
        return losses.to_vec();
    }
    let value = sum(losses.iter().map(|l| l.value));
    let slack: f64 = losses.iter().map(|l| l.slack + l.value.abs()).sum();
    vec![near(value / denominator, (slack + 2.0 * value.abs()) / denominator)]
}

/// No gradient goes out of a mean over rows that weigh nothing.
fn over(upstream: f64, denominator: f64) -> f64 {
    if denominator == 0.0 { 0.0 } else { upstream / denominator }
}

fn upstream_of(upstream: &[f64], row: usize) -> f64 {
    if upstream.len() == 1 { upstream[0] } else { upstream[row] }
}

/// `factor * value`, where a factor of 0 wins over an infinite value.
fn scaled(factor: f64, value: f64) -> f64 {
    if factor == 0.0 && !value.is_nan() { 0.0 } else { factor * value }
}

/// The shape of a problem of rows: `outer x classes x inner`.
#[derive(Clone, Copy)]
pub struct Rows {
    pub outer: usize,
    pub classes: usize,
    pub inner: usize,
}

impl Rows {
    pub fn of(dims: &[usize], axis: usize) -> Self {
        Rows { outer: dims[..axis].iter().product(), classes: dims[axis], inner: dims[axis + 1..].iter().product() }
    }

    pub fn count(&self) -> usize {
        self.outer * self.inner
    }

    pub fn at(&self, row: usize, class: usize) -> usize {
        (row / self.inner * self.classes + class) * self.inner + row % self.inner
    }
}

/// A row of logits as its softmax: what the losses of a row are made of.
struct Softmax {
    /// Each logit after scale and cap, and the derivative of that.
    y: Vec<f64>,
    slope: Vec<f64>,
    max: f64,
    /// `log sum exp(y - max)`; slack for all of it.
    log_sum: Near,
    /// `y - max`, slack for its rounding.
    shifted: Vec<Near>,
    p: Vec<f64>,
    /// `1 - p`, without cancellation.
    not_p: Vec<f64>,
    /// What `1 - p` of the most probable class may be off.
    not_p_slack: f64,
}

impl Softmax {
    fn new(x: &[f64], scale: f64, softcap: Option<f64>) -> Self {
        let transformed = scale != 1.0 || softcap.is_some();
        let capped = |x: f64| match softcap {
            Some(cap) => (cap * (scale * x / cap).tanh(), scale / (scale * x / cap).cosh().powi(2)),
            None => (scale * x, scale),
        };
        let (y, slope): (Vec<f64>, Vec<f64>) =
            x.iter().map(|&x| if transformed { capped(x) } else { (x, 1.0) }).unzip();
        let max =
            y.iter().fold(f64::NEG_INFINITY, |m: f64, &y| if m.is_nan() || y.is_nan() { f64::NAN } else { m.max(y) });
        let top = y.iter().position(|&y| y == max).unwrap_or(0);
        let shifted: Vec<_> = y
            .iter()
            .map(|&y| {
                let rounded = if transformed && y != max { FUNCTION * (y.abs() + max.abs()) } else { 0.0 };
                near(y - max, (y - max).abs() + rounded)
            })
            .collect();
        let others = || shifted.iter().enumerate().filter(|(c, _)| *c != top).map(|(_, s)| s);
        let rest = sum(others().map(|s| s.value.exp()));
        let finite = others().filter(|s| s.value > f64::NEG_INFINITY);
        let rest_slack: f64 = finite.map(|s| s.value.exp() * (s.slack + FUNCTION)).sum();
        let log_sum = rest.ln_1p();
        let log_sum = near(log_sum, rest_slack / (1.0 + rest) + FUNCTION * log_sum.abs());
        let p: Vec<_> = shifted.iter().map(|s| s.value.exp() / (1.0 + rest)).collect();
        let not_p = (0..y.len()).map(|c| if c == top { rest / (1.0 + rest) } else { 1.0 - p[c] }).collect();
        Softmax { y, slope, max, log_sum, shifted, p, not_p, not_p_slack: rest_slack / (1.0 + rest) + FUNCTION * rest }
    }

    fn lse(&self) -> Near {
        near(self.max + self.log_sum.value, FUNCTION * self.max.abs() + self.log_sum.slack + self.log_sum.value)
    }

    fn minus_log_p(&self, class: usize) -> Near {
        let value = self.log_sum.value - self.shifted[class].value;
        near(value, self.log_sum.slack + self.shifted[class].slack + 2.0 * value.abs())
    }
}

/// The targets of rows.
#[derive(Clone, Copy)]
pub enum Targets<'a> {
    Classes(&'a [i64]),
    Probabilities(&'a [f64]),
}

/// The options of cross-entropy and NLL.
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    pub weight: Option<Vec<f64>>,
    /// One for each row.
    pub row_weight: Option<Vec<f64>>,
    pub row_transform: Option<RowTransform>,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub reduction: Reduction,
    pub normalizer: Option<f64>,
    pub z_loss: f64,
    pub softcap: Option<f64>,
    pub logit_scale: f64,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        CrossEntropy {
            weight: None,
            row_weight: None,
            row_transform: None,
            ignore_index: -100,
            label_smoothing: 0.0,
            reduction: Reduction::Mean,
            normalizer: None,
            z_loss: 0.0,
            softcap: None,
            logit_scale: 1.0,
        }
    }
}

/// The own class of a row whose negative log-likelihood is transformed: its part of the loss, and of q in the gradient.
struct Transformed {
    class: usize,
    loss: Near,
    q: Near,
}

/// What `statistics` returns of each row.
pub struct Statistics {
    pub loss: Vec<Near>,
    pub lse: Vec<Near>,
    pub z_loss: Vec<Near>,
    pub entropy: Vec<Near>,
    pub argmax: Vec<f64>,
    pub correct: Vec<f64>,
    pub counted: Vec<f64>,
}

impl CrossEntropy {
    fn weight(&self, class: usize) -> f64 {
        self.weight.as_ref().map_or(1.0, |w| w[class])
    }

    fn row_weight(&self, row: usize) -> f64 {
        self.row_weight.as_ref().map_or(1.0, |w| w[row])
    }

    fn ignored(&self, targets: Targets, row: usize) -> bool {
        self.row_weight(row) == 0.0 || matches!(targets, Targets::Classes(t) if t[row] == self.ignore_index)
    }

    pub fn denominator(&self, rows: Rows, targets: Targets) -> f64 {
        match (self.reduction, self.normalizer, targets) {
            (Reduction::None | Reduction::Sum, ..) => 1.0,
            (Reduction::Mean, Some(normalizer), _) => normalizer,
            (Reduction::BatchMean, ..) => rows.outer as f64,
            (Reduction::Mean, None, _) => {
                let class_weight = |row: usize| match targets {
                    Targets::Classes(t) => self.weight(t[row] as usize),
                    Targets::Probabilities(_) => 1.0,
                };
                let counted = (0..rows.count()).filter(|&row| !self.ignored(targets, row));
                counted.map(|row| self.row_weight(row) * class_weight(row)).sum()
            }
        }
    }

    /// What the own class of a row adds to its loss beyond its part in q, and to q beyond that part for the gradient.
    fn transformed(&self, softmax: &Softmax, targets: Targets, row: usize) -> Option<Transformed> {
        let (transform, Targets::Classes(t)) = (self.row_transform?, targets) else { return None };
        let class = t[row] as usize;
        let own = self.weight(class) * (1.0 - self.label_smoothing);
        let n = softmax.minus_log_p(class);
        let (p, u) = ((-n.value).exp(), -(-n.value).exp_m1());
        let over = |a: f64, b: f64| if b == 0.0 { 1.0 } else { a / b };
        let pn = if p == 0.0 { 0.0 } else { p * n.value };
        let (value, slope, order) = match transform {
            RowTransform::Focal { gamma } => {
                let slope = u.powf(gamma) + gamma * u.powf(gamma) * over(pn, u);
                (u.powf(gamma) * n.value, slope, gamma)
            }
            RowTransform::Poly1 { epsilon } => (n.value + epsilon * u, 1.0 + epsilon * p, epsilon.abs()),
            RowTransform::Dft => (pn, p, 1.0),
            RowTransform::GeneralizedCe { q } => ((1.0 - (-q * n.value).exp()) / q, (-q * n.value).exp(), 1.0),
        };
        // as relative to n as its own slack is, once for each order of the function
        let relative = (1.0 + order) * (FUNCTION + over(n.slack, n.value.abs().max(f64::MIN_POSITIVE)));
        // a sum of terms that may differ in sign
        let terms = n.value.abs().min(2.0 + order) + value.abs();
        Some(Transformed {
            class,
            loss: near(scaled(own, value), scaled(own.abs(), slope.abs() * n.slack + FUNCTION * (1.0 + order) * terms)),
            q: near(own * slope, own.abs() * relative * (slope.abs() + order * p)),
        })
    }

    /// The weighted and smoothed target of each class of a row; without the own class where that is transformed.
    fn row_target(&self, rows: Rows, targets: Targets, row: usize) -> Vec<f64> {
        let (keep, spread) = (1.0 - self.label_smoothing, self.label_smoothing / rows.classes as f64);
        let target = |class: usize| match targets {
            Targets::Classes(_) if self.row_transform.is_some() => 0.0,
            Targets::Classes(t) => (t[row] == class as i64) as u8 as f64,
            Targets::Probabilities(t) => t[rows.at(row, class)],
        };
        (0..rows.classes).map(|c| self.weight(c) * (keep * target(c) + spread)).collect()
    }

    fn softmax(&self, rows: Rows, x: &[f64], row: usize) -> Softmax {
        let row: Vec<_> = (0..rows.classes).map(|c| x[rows.at(row, c)]).collect();
        Softmax::new(&row, self.logit_scale, self.softcap)
    }

    fn row_loss(&self, softmax: &Softmax, q: &[f64]) -> Near {
        let value = sum(q.iter().enumerate().map(|(c, &q)| scaled(q, softmax.minus_log_p(c).value)));
        let mut loss = near(value, 0.0);
        for (c, &q) in q.iter().enumerate() {
            let minus_log_p = softmax.minus_log_p(c);
            // also of the sum, in which a large term may follow a large term of the other sign
            loss.slack += scaled(q.abs(), minus_log_p.slack + FUNCTION * minus_log_p.value.abs());
            let several = q != 0.0 && softmax.y[c] != softmax.max;
            loss.slack += if several { q.abs() * FUNCTION * softmax.shifted[c].value.abs() } else { 0.0 };
        }
        let z_loss = self.row_z_loss(softmax);
        // a row without a softmax is NaN whatever its target
        let nan = 0.0 * softmax.log_sum.value;
        near(loss.value + z_loss.value + nan, loss.slack + z_loss.slack)
    }

    /// With the row transform and the row's weight.
    fn weighted_row_loss(&self, softmax: &Softmax, (targets, q): (Targets, &[f64]), row: usize) -> Near {
        let mut loss = self.row_loss(softmax, q);
        if let Some(own) = self.transformed(softmax, targets, row) {
            loss = near(loss.value + own.loss.value, loss.slack + own.loss.slack);
        }
        match &self.row_weight {
            None => loss,
            Some(weights) => {
                let value = weights[row] * loss.value;
                near(value, weights[row].abs() * loss.slack + 2.0 * value.abs())
            }
        }
    }

    fn row_z_loss(&self, softmax: &Softmax) -> Near {
        if self.z_loss == 0.0 {
            return near(0.0, 0.0);
        }
        let lse = softmax.lse();
        let value = self.z_loss * lse.value * lse.value;
        near(value, 2.0 * self.z_loss * lse.value.abs() * lse.slack + FUNCTION * value)
    }

    /// Cross-entropy of logits along an axis.
    pub fn expected(&self, dims: &[usize], axis: usize, x: &[f64], targets: Targets, upstream: &[f64]) -> Expected {
        let rows = Rows::of(dims, axis);
        let denominator = self.denominator(rows, targets);
        let mut losses = vec![near(0.0, 0.0); rows.count()];
        let (mut grad, mut target_grad) = (vec![near(0.0, 0.0); x.len()], vec![near(0.0, 0.0); x.len()]);
        for row in 0..rows.count() {
            if self.ignored(targets, row) {
                continue;
            }
            let softmax = self.softmax(rows, x, row);
            let q = self.row_target(rows, targets, row);
            losses[row] = self.weighted_row_loss(&softmax, (targets, &q), row);
            let transformed = self.transformed(&softmax, targets, row);
            let mut q = q;
            if let Some(own) = &transformed {
                q[own.class] += own.q.value;
            }
            let mass = sum(q.iter().copied());
            // with a single class in the target nothing cancels
            let single = q.iter().filter(|&&q| q != 0.0).count() <= 1;
            let g = self.row_weight(row) * over(upstream_of(upstream, row), denominator);
            for c in 0..rows.classes {
                let (value, mut slack) = self.logit_gradient(&softmax, &q, mass, single, c);
                if let Some(own) = &transformed {
                    slack += own.q.slack * if c == own.class { softmax.not_p[c] } else { softmax.p[c] };
                }
                let factor = g * softmax.slope[c];
                // NaN from an infinite logit under a cap's slope of 0 is none of the definition's
                let value = if softmax.slope[c] == 0.0 { 0.0 } else { factor * value };
                grad[rows.at(row, c)] = near(value, factor.abs() * slack + FUNCTION * value.abs());
                let keep = g * self.weight(c) * (1.0 - self.label_smoothing);
                let minus_log_p = softmax.minus_log_p(c);
                target_grad[rows.at(row, c)] = near(
                    scaled(keep, minus_log_p.value),
                    scaled(keep.abs(), minus_log_p.slack + 4.0 * minus_log_p.value),
                );
            }
        }
        Expected { loss: reduced(&losses, self.reduction, denominator), grad, target_grad }
    }

    /// `p_c sum_j q_j - q_c`, written as `p_c sum_(j != c) q_j - q_c (1 - p_c)`, and the part of the z-loss.
    fn logit_gradient(&self, softmax: &Softmax, q: &[f64], mass: f64, single: bool, c: usize) -> (f64, f64) {
        let p = softmax.p[c];
        let mut value = p * (mass - q[c]) - q[c] * softmax.not_p[c] + 0.0 * softmax.log_sum.value;
        let p_slack = if p == 0.0 { 0.0 } else { p * (softmax.shifted[c].slack + softmax.log_sum.slack + FUNCTION) };
        let mut slack = if softmax.y[c] == softmax.max {
            mass * softmax.not_p_slack + if single { 0.0 } else { FUNCTION * mass }
        } else {
            mass * p_slack + FUNCTION * q[c]
        };
        if self.z_loss != 0.0 {
            let lse = softmax.lse();
            value += 2.0 * self.z_loss * lse.value * p;
            slack += 2.0 * self.z_loss * (lse.value.abs() * (p_slack + FUNCTION * p) + p * lse.slack);
            slack += FUNCTION * mass * p;
        }
        (value, slack)
    }

    pub fn statistics(&self, dims: &[usize], axis: usize, x: &[f64], targets: Targets) -> Statistics {
        let rows = Rows::of(dims, axis);
        let zeros = || vec![near(0.0, 0.0); rows.count()];
        let mut s = Statistics {
            loss: zeros(),
            lse: zeros(),
            z_loss: zeros(),
            entropy: zeros(),
            argmax: vec![0.0; rows.count()],
            correct: vec![0.0; rows.count()],
            counted: vec![0.0; rows.count()],
        };
        let first_largest = |values: &[f64]| {
            let better = |best: usize, c: usize| if values[c] > values[best] { c } else { best };
            (0..values.len()).fold(0, better)
        };
        for row in 0..rows.count() {
            let softmax = self.softmax(rows, x, row);
            let argmax = first_largest(&softmax.y);
            s.argmax[row] = argmax as f64;
            if self.ignored(targets, row) {
                continue;
            }
            let q = self.row_target(rows, targets, row);
            let target: Vec<_> = match targets {
                Targets::Classes(t) => (0..rows.classes).map(|c| (t[row] == c as i64) as u8 as f64).collect(),
                Targets::Probabilities(t) => (0..rows.classes).map(|c| t[rows.at(row, c)]).collect(),
            };
            s.counted[row] = 1.0;
            s.loss[row] = self.weighted_row_loss(&softmax, (targets, &q), row);
            s.lse[row] = softmax.lse();
            s.z_loss[row] = self.row_z_loss(&softmax);
            s.correct[row] = (argmax == first_largest(&target)) as u8 as f64;
            let entropy = sum((0..rows.classes).map(|c| scaled(softmax.p[c], softmax.minus_log_p(c).value)));
            s.entropy[row].value = entropy + 0.0 * softmax.log_sum.value;
            for c in 0..rows.classes {
                let log_p = softmax.minus_log_p(c);
                let p_slack = softmax.shifted[c].slack + softmax.log_sum.slack + FUNCTION;
                s.entropy[row].slack += scaled(softmax.p[c], log_p.slack + p_slack * (1.0 + log_p.value));
            }
        }
        s
    }

    /// NLL of log-probabilities along an axis.
    pub fn expected_nll(&self, dims: &[usize], axis: usize, x: &[f64], t: &[i64], upstream: &[f64]) -> Expected {
        let rows = Rows::of(dims, axis);
        let denominator = self.denominator(rows, Targets::Classes(t));
        let mut losses = vec![near(0.0, 0.0); rows.count()];
        let mut grad = vec![near(0.0, 0.0); x.len()];
        for (row, &class) in t.iter().enumerate().filter(|&(row, _)| !self.ignored(Targets::Classes(t), row)) {
            let at = rows.at(row, class as usize);
            let weight = self.weight(class as usize) * self.row_weight(row);
            let loss = -scaled(weight, x[at]);
            // one more rounding for a weight of the row
            let more = if self.row_weight.is_some() { 2.0 } else { 0.0 };
            losses[row] = near(loss, (2.0 + more) * loss.abs());
            let g = -weight * over(upstream_of(upstream, row), denominator);
            grad[at] = near(g, (4.0 + more) * g.abs());
        }
        Expected { loss: reduced(&losses, self.reduction, denominator), grad, target_grad: vec![] }
    }
}

/// Log-softmax along an axis.
pub fn log_softmax(dims: &[usize], axis: usize, x: &[f64], upstream: &[f64]) -> Expected {
    let rows = Rows::of(dims, axis);
    let (mut loss, mut grad) = (vec![near(0.0, 0.0); x.len()], vec![near(0.0, 0.0); x.len()]);
    for row in 0..rows.count() {
        let softmax = CrossEntropy::default().softmax(rows, x, row);
        let total = sum((0..rows.classes).map(|c| upstream[rows.at(row, c)]));
        let sizes: f64 = (0..rows.classes).map(|c| upstream[rows.at(row, c)].abs()).sum();
        for c in 0..rows.classes {
            let (at, p) = (rows.at(row, c), softmax.p[c]);
            let minus_log_p = softmax.minus_log_p(c);
            loss[at] = near(-minus_log_p.value, minus_log_p.slack);
            let value = upstream[at] - p * total;
            let p_slack = if p == 0.0 { 0.0 } else { p * (minus_log_p.slack + FUNCTION) };
            grad[at] = near(value, upstream[at].abs() + p_slack * total.abs() + FUNCTION * p * sizes);
        }
    }
    Expected { loss, grad, target_grad: vec![] }
}

/// The formula of one element.
#[derive(Clone, Copy, Debug)]
pub enum Term {
    Bce,
    BceWithLogits,
    Focal { alpha: Option<f64>, gamma: f64 },
    L1,
}

/// The losses of elements, with the optional operands already of the input's shape.
#[derive(Clone, Debug)]
pub struct Elements {
    pub term: Term,
    pub weight: Option<Vec<f64>>,
    pub pos_weight: Option<Vec<f64>>,
    pub mask: Option<Vec<f64>>,
    pub label_smoothing: f64,
    /// How many adjacent elements are averaged before the reduction.
    pub group: usize,
    pub reduction: Reduction,
    /// What `Mean` divides by in place of what counts, and `BatchMean` always.
    pub divisor: Option<f64>,
}

impl Elements {
    pub fn new(term: Term) -> Self {
        let (reduction, divisor) = (Reduction::Mean, None);
        Elements {
            term,
            weight: None,
            pos_weight: None,
            mask: None,
            label_smoothing: 0.0,
            group: 1,
            reduction,
            divisor,
        }
    }

    fn counts(&self, element: usize) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask[element] != 0.0)
    }

    /// How many elements of each group of `len` elements the mask leaves.
    fn left(&self, len: usize) -> Vec<usize> {
        let group = |first: usize| (first..first + self.group).filter(|&i| self.counts(i)).count();
        (0..len).step_by(self.group).map(group).collect()
    }

    /// What the mean of `len` elements is divided by: the groups of which the mask leaves anything.
    pub fn count(&self, len: usize) -> f64 {
        self.divisor.unwrap_or_else(|| self.left(len).iter().filter(|&&left| left > 0).count() as f64)
    }

    pub fn expected(&self, x: &[f64], t: &[f64], upstream: &[f64]) -> Expected {
        let left = self.left(x.len());
        let denominator = match self.reduction {
            Reduction::Mean | Reduction::BatchMean => self.count(x.len()),
            Reduction::None | Reduction::Sum => 1.0,
        };
        let mut losses = vec![near(0.0, 0.0); x.len() / self.group];
        let (mut grad, mut target_grad) = (vec![near(0.0, 0.0); x.len()], vec![near(0.0, 0.0); x.len()]);
        for i in (0..x.len()).filter(|&i| self.counts(i)) {
            let e = self.label_smoothing;
            let t = if e == 0.0 { t[i] } else { (1.0 - e) * t[i] + e / 2.0 };
            let pos_weight = self.pos_weight.as_ref().map_or(1.0, |p| p[i]);
            let [loss, slope, target_slope] = match self.term {
                Term::Bce => bce(x[i], t),
                Term::BceWithLogits => bce_with_logits(x[i], t, pos_weight),
                Term::Focal { alpha, gamma } => focal(x[i], t, alpha, gamma),
                Term::L1 => l1(x[i], t),
            };
            let share = self.weight.as_ref().map_or(1.0, |w| w[i]) / left[i / self.group] as f64;
            losses[i / self.group].value += share * loss.value;
            losses[i / self.group].slack += share.abs() * (loss.slack + 4.0 * loss.value.abs());
            let factor = share * over(upstream_of(upstream, i / self.group), denominator);
            let chained = |v: Near, f: f64| near(f * v.value, f.abs() * (v.slack + 6.0 * v.value.abs()));
            grad[i] = chained(slope, factor);
            target_grad[i] = chained(target_slope, factor * (1.0 - e));
        }
        Expected { loss: reduced(&losses, self.reduction, denominator), grad, target_grad }
    }
}

/// Loss, gradient and target gradient of a difference that the arithmetic dtype can hold.
fn l1(x: f64, t: f64) -> [Near; 3] {
    let difference = x - t;
    let sign = if difference == 0.0 { 0.0 } else { difference.signum() };
    [near(difference.abs(), 0.0), near(sign, 0.0), near(-sign, 0.0)]
}

/// What the rounding of a target to the arithmetic dtype costs; 0 and 1 are exact.
fn soft(t: f64) -> f64 {
    if t == 0.0 || t == 1.0 { 0.0 } else { 2.0 * t.abs() }
}

/// Loss, gradient and target gradient of a probability.
fn bce(x: f64, t: f64) -> [Near; 3] {
    let (log_x, log_not_x) = (x.ln().max(-100.0), (-x).ln_1p().max(-100.0));
    let terms = (t * log_x).abs() + ((1.0 - t) * log_not_x).abs();
    let variance = (x * (1.0 - x)).max(1e-12);
    let slope = (x - t) / variance;
    [
        near(-(t * log_x + (1.0 - t) * log_not_x), FUNCTION * terms + soft(t) * (log_x.abs() + log_not_x.abs())),
        near(slope, FUNCTION * slope.abs() + soft(t) / variance),
        near(log_not_x - log_x, FUNCTION * (log_x.abs() + log_not_x.abs())),
    ]
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x > 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// Loss, gradient and target gradient of a logit.
fn bce_with_logits(x: f64, t: f64, p: f64) -> [Near; 3] {
    let (positive, negative) = (scaled(p * t, softplus(-x)), scaled(1.0 - t, softplus(x)));
    let (rise, fall) = ((1.0 - t) * sigmoid(x), p * t * sigmoid(-x));
    // the exponential multiplies the rounding of a logit's conversion only, which is exact
    let per_term = 2.0 * FUNCTION;
    [
        near(positive + negative, per_term * (positive.abs() + negative.abs()) + scaled(soft(t), softplus(x))),
        near(rise - fall, per_term * (rise.abs() + fall.abs()) + soft(t) * sigmoid(x)),
        near(p * softplus(-x) - softplus(x), per_term * (p.abs() * softplus(-x) + softplus(x))),
    ]
}

/// `a u^gamma ce` with `u = t sigmoid(-x) + (1 - t) sigmoid(x)`: loss, gradient and target gradient.
fn focal(x: f64, t: f64, alpha: Option<f64>, gamma: f64) -> [Near; 3] {
    let hard = t == 0.0 || t == 1.0;
    let (rise, fall) = (sigmoid(x), sigmoid(-x));
    let u = t * fall + (1.0 - t) * rise;
    // of a hard label the logarithm of a sigmoid, which goes on where the sigmoid has become 0
    let log_u = if t == 0.0 {
        -softplus(-x)
    } else if t == 1.0 {
        -softplus(x)
    } else {
        u.ln()
    };
    let a = alpha.map_or(1.0, |alpha| alpha * t + (1.0 - alpha) * (1.0 - t));
    let a_slope = alpha.map_or(0.0, |alpha| 2.0 * alpha - 1.0);
    let modulation = if gamma == 0.0 { 1.0 } else { (gamma * log_u).exp() };
    let cross_entropy = scaled(t, softplus(-x)) + scaled(1.0 - t, softplus(x));
    // u^gamma multiplies the rounding of log u and of gamma log u
    let per_term = 4.0 * FUNCTION + gamma * (if hard { 0.0 } else { 4.0 * FUNCTION } + 4.0 * log_u.abs());

    let loss = a * scaled(modulation, cross_entropy);
    // u'/u is rise or fall itself for a hard label
    let relative_slope = match t {
        0.0 => fall,
        1.0 => -rise,
        _ => rise * fall * (1.0 - 2.0 * t) / u,
    };
    let direct = (1.0 - t) * rise - t * fall;
    let slope = a * modulation * (direct + gamma * scaled(relative_slope, cross_entropy));
    let slope_terms = (1.0 - t) * rise + t * fall + gamma * scaled(relative_slope.abs(), cross_entropy);
    let soft_terms = soft(t) * (1.0 + 2.0 * gamma * scaled(rise * fall, cross_entropy / if hard { 1.0 } else { u }));

    // ce / u -> 1 where both vanish
    let per_u = if u == 0.0 { 1.0 } else { cross_entropy / u };
    let target_terms = [a_slope * cross_entropy, a * softplus(-x), -a * softplus(x), a * gamma * per_u * (fall - rise)];
    let target_size: f64 = target_terms.iter().map(|v| v.abs()).sum::<f64>() + a.abs() * gamma * per_u;
    [
        near(loss, per_term * loss.abs() + scaled(modulation, soft(t) * softplus(x.abs()))),
        near(slope, (a * modulation).abs() * (per_term * slope_terms + soft_terms)),
        near(
            scaled(modulation, target_terms.iter().sum()),
            scaled(modulation, per_term * target_size + soft(t) * 4.0 * softplus(x.abs())),
        ),
    ]
}
