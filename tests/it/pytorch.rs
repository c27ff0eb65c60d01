//! The public losses against PyTorch's numbers: `tests/data/pytorch.safetensors`, made by `tests/data/generate.py`,
//! which describes the file. Each case goes through `forward` and autograd, and through `loss_and_grad`.

use std::collections::{BTreeSet, HashMap};
use std::str::FromStr;
use std::sync::LazyLock;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, L1Loss, MultiLabelSoftMarginLoss, NllLoss, Reduction, RowTransform,
    SigmoidFocalLoss, log_softmax,
};
use safetensors::SafeTensors;

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/pytorch.safetensors");

static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| std::fs::read(PATH).expect(PATH));
static FILE: LazyLock<SafeTensors> = LazyLock::new(|| SafeTensors::deserialize(&BYTES).expect(PATH));
static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let (_, metadata) = SafeTensors::read_metadata(&BYTES).expect(PATH);
    let lines = &metadata.metadata().as_ref().expect("metadata")["cases"];
    lines.lines().skip(1).map(Case::parse).collect()
});

/// One line of the record: the options of a case. Its tensors are read when asked for.
struct Case {
    line: String,
    options: HashMap<String, String>,
}

impl Case {
    fn parse(line: &str) -> Self {
        let option = |pair: &str| {
            let (key, value) = pair.split_once('=').expect("key=value");
            (key.to_string(), value.to_string())
        };
        Self { line: line.to_string(), options: line.split(';').map(option).collect() }
    }

    fn option<T: FromStr>(&self, key: &str) -> Option<T> {
        let value = self.options.get(key)?;
        Some(value.parse().unwrap_or_else(|_| panic!("{key}={value}")))
    }

    fn is(&self, loss: &str) -> bool {
        self.options["loss"] == loss
    }

    fn reduction(&self) -> Reduction {
        match self.options["reduction"].as_str() {
            "none" => Reduction::None,
            "mean" => Reduction::Mean,
            "sum" => Reduction::Sum,
            "batchmean" => Reduction::BatchMean,
            other => panic!("reduction={other}"),
        }
    }

    fn maybe(&self, field: &str, device: &Device) -> Result<Option<Tensor>> {
        let name = format!("{}.{field}", self.options["id"]);
        Ok(FILE.tensor(&name).ok().map(|view| view.load(device)).transpose()?)
    }

    fn tensor(&self, field: &str, device: &Device) -> Result<Tensor> {
        self.maybe(field, device)?.with_context(|| format!("no tensor {field}"))
    }

    fn values(&self, field: &str) -> Result<Vec<f64>> {
        values(&self.tensor(field, &Device::Cpu)?)
    }

    fn dtype(&self, field: &str) -> Result<DType> {
        Ok(self.tensor(field, &Device::Cpu)?.dtype())
    }

    fn has_index_target(&self) -> Result<bool> {
        Ok((self.is("cross_entropy") || self.is("nll")) && !self.dtype("target")?.is_float())
    }

    /// The row's weight of each element of the input, if there are row weights.
    fn row_weights(&self) -> Result<Option<Vec<f64>>> {
        let Some(weight) = self.maybe("row_weight", &Device::Cpu)? else { return Ok(None) };
        let input = self.tensor("input", &Device::Cpu)?;
        let mut rows = input.dims().to_vec();
        rows.remove(rows.len().min(2) - 1);
        Ok(Some(values(&self.spread(&weight.broadcast_as(rows)?)?)?))
    }

    fn row_transform(&self) -> Option<RowTransform> {
        let parameter = self.option("parameter").unwrap_or(0.0);
        Some(match self.options.get("transform")?.as_str() {
            "focal" => RowTransform::Focal { gamma: parameter },
            "poly1" => RowTransform::Poly1 { epsilon: parameter },
            "dft" => RowTransform::Dft,
            "generalized_ce" => RowTransform::GeneralizedCe { q: parameter },
            other => panic!("transform={other}"),
        })
    }

    /// The upstream gradient of each element of the input.
    fn upstream(&self) -> Result<Vec<f64>> {
        let upstream = self.tensor("upstream", &Device::Cpu)?;
        values(&self.spread(&upstream)?)
    }

    /// Repeats what is one number a row for each of the row's classes.
    fn spread(&self, rows: &Tensor) -> Result<Tensor> {
        let input = self.tensor("input", &Device::Cpu)?;
        let rows = match rows.rank() {
            0 => rows.clone(),
            rank if rank == input.rank() => rows.clone(),
            rank if self.is("multi_label_soft_margin") => rows.unsqueeze(rank)?,
            _ => rows.unsqueeze(1)?,
        };
        Ok(rows.broadcast_as(input.shape())?)
    }

    /// For each element of the input, whether an ignored row or the mask takes it out.
    fn ignored(&self) -> Result<Vec<bool>> {
        if self.has_index_target()? {
            let index = self.option("ignore_index").unwrap_or(-100.0);
            let target = self.tensor("target", &Device::Cpu)?;
            let mut ignored: Vec<_> = values(&self.spread(&target)?)?.iter().map(|&t| t == index).collect();
            if let Some(weight) = self.row_weights()? {
                ignored.iter_mut().zip(weight).for_each(|(ignored, weight)| *ignored |= weight == 0.0);
            }
            return Ok(ignored);
        }
        match self.maybe("ignore_mask", &Device::Cpu)? {
            Some(mask) => {
                let mask = mask.broadcast_as(self.tensor("input", &Device::Cpu)?.shape())?;
                Ok(values(&mask)?.iter().map(|&kept| kept == 0.0).collect())
            }
            None => Ok(vec![false; self.values("input")?.len()]),
        }
    }

    /// With one class the terms of cross-entropy's gradient cancel altogether: these are their sizes, up to weights.
    fn cancelling(&self) -> Result<Vec<f64>> {
        let input = self.tensor("input", &Device::Cpu)?;
        let classes = input.dim(input.rank().min(2) - 1)?;
        if self.is("cross_entropy") && classes == 1 { self.upstream() } else { Ok(Vec::new()) }
    }

    /// How far arithmetic may lead away from the record. Rounding of the result is apart, see [`compare`].
    fn tolerance(&self) -> Result<Tolerance> {
        let input = self.values("input")?;
        let largest = |values: &[f64]| values.iter().filter(|v| v.is_finite()).fold(0.0, |m: f64, v| m.max(v.abs()));
        let size = largest(&input).max(1.0);
        let epsilon = match self.dtype("input")? {
            DType::F64 => f64::EPSILON,
            _ => f32::EPSILON as f64,
        };
        let given = |key: &str| self.options.contains_key(key);

        // The record is f64 arithmetic as well: PyTorch's formulas cancel terms as large as the logits.
        let record = 4.0 * f64::EPSILON * size * largest(&self.values("upstream")?).max(1.0);

        // A loss is a sum of terms of one sign. Each is an exponential or a logarithm (2 ulp) of a difference whose own
        // rounding the exponential multiplies by the size of its argument.
        let loss_relative = 16.0 * epsilon;
        // Logits that are rounded before the loss begins, or a log-sum-exp as a value of its own, are off by an ulp of
        // their size; log-softmax by an ulp of the 1 whose logarithm it takes.
        let moved = given("softcap") || given("logit_scale") || given("z_loss");
        let loss_absolute = match moved {
            true => 2.0 * epsilon * size,
            false if self.is("log_softmax") => 2.0 * epsilon,
            false => 0.0,
        };

        // The gradient has one more exponential. Wherever it is a difference of two terms (softmax and smoothed target,
        // sigmoid and soft label), what is left carries their rounding; plain cross-entropy, NLL and BCE have none.
        // PyTorch's smallest x (1 - x) in BCE is 1e-12 as an f32 in f64 too, 4e-9 off.
        let clamped = self.is("binary_cross_entropy") && self.options.get("note").is_some_and(|n| n == "extremes");
        let grad_relative = if clamped { (32.0 * epsilon).max(5e-9) } else { 32.0 * epsilon };
        let single_term = self.has_index_target()? && !given("label_smoothing") && !moved;
        let cancels = !single_term && !self.is("binary_cross_entropy");
        Ok(Tolerance {
            loss: (loss_relative, loss_absolute + record),
            grad: (grad_relative, record),
            grad_of_largest: if cancels { 4.0 * epsilon } else { 0.0 },
            target_grad_of_largest: 4.0 * epsilon,
        })
    }
}

/// Relative and absolute bounds; for gradients also a bound relative to the largest of the tensor.
struct Tolerance {
    loss: (f64, f64),
    grad: (f64, f64),
    grad_of_largest: f64,
    target_grad_of_largest: f64,
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// Half the distance between `value` and its neighbours in `dtype`: what one rounding may cost. Nothing for a zero,
/// which every dtype holds, and for f64, where it is part of the arithmetic.
fn half_ulp(dtype: DType, value: f64) -> f64 {
    let (digits, least) = match dtype {
        DType::F16 => (11, -14),
        DType::BF16 => (8, -126),
        DType::F32 => (24, -126),
        _ => return 0.0,
    };
    if value == 0.0 {
        return 0.0;
    }
    let exponent = (value.abs().log2().floor() as i32).max(least);
    2f64.powi(exponent - digits)
}

/// `value` as `dtype` holds it, for the sake of its range.
fn stored(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_f64(),
        DType::BF16 => half::bf16::from_f64(value).to_f64(),
        _ => value,
    }
}

/// Elementwise `|got - want| <= tolerance(index)` plus one rounding to `got`'s dtype; the first mismatch is the error.
fn compare(what: &str, got: &Tensor, want: &[f64], tolerance: impl Fn(usize) -> f64) -> Result<()> {
    let dtype = got.dtype();
    let got = values(got)?;
    ensure!(got.len() == want.len(), "{what}: {} elements, expected {}", got.len(), want.len());
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let tolerance = tolerance(i);
        let off = (got - want).abs();
        let near = off <= tolerance + half_ulp(dtype, want.abs() + tolerance);
        let same = got == stored(dtype, want) || (got.is_nan() && want.is_nan());
        ensure!(near || same, "{what}[{i}]: got {got:e}, expected {want:e}, off by {off:e}");
    }
    Ok(())
}

fn compare_loss(what: &str, case: &Case, loss: &Tensor) -> Result<()> {
    let want = case.tensor("loss", &Device::Cpu)?;
    ensure!(loss.dims() == want.dims(), "{what}: shape {:?}, expected {:?}", loss.dims(), want.dims());
    let dtype = match case.dtype("input")? {
        dtype if case.is("log_softmax") => dtype,
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    ensure!(loss.dtype() == dtype, "{what}: dtype {:?}, expected {dtype:?}", loss.dtype());
    let want = values(&want)?;
    let (relative, absolute) = case.tolerance()?.loss;
    let compared = compare(what, loss, &want, |i| relative * want[i].abs() + absolute);
    match case.maybe("loss32", &Device::Cpu)? {
        Some(pytorch) => {
            let pytorch = values(&pytorch)?;
            let shown = &pytorch[..pytorch.len().min(8)];
            compared.map_err(|error| anyhow!("{error} (PyTorch in f32, the first 8: {shown:?})"))
        }
        None => compared,
    }
}

/// Compares with the gradient of `like`, "input" or "target"; `want` is in f64.
fn compare_grad(what: &str, case: &Case, like: &str, grad: &Tensor, want: &[f64]) -> Result<()> {
    let like_tensor = case.tensor(like, &Device::Cpu)?;
    ensure!(grad.dims() == like_tensor.dims(), "{what}: shape {:?}, expected {:?}", grad.dims(), like_tensor.dims());
    ensure!(grad.dtype() == like_tensor.dtype(), "{what}: dtype {:?}", grad.dtype());
    let tolerance = case.tolerance()?;
    let (relative, absolute) = tolerance.grad;
    let largest = want.iter().chain(&case.cancelling()?).fold(0.0, |m: f64, v| m.max(v.abs()));
    let of_largest = if like == "target" { tolerance.target_grad_of_largest } else { tolerance.grad_of_largest };
    let ignored = case.ignored()?;
    compare(what, grad, want, |i| {
        if ignored[i] {
            return 0.0;
        }
        relative * want[i].abs() + absolute + of_largest * largest
    })
}

/// `forward`, then `backward` with the recorded upstream gradient.
fn check_autograd(
    case: &Case,
    device: &Device,
    forward: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let input = Var::from_tensor(&case.tensor("input", device)?)?;
    let target = case.maybe("target", device)?;
    let tracked = match case.maybe("target_grad", device)? {
        Some(_) => target.as_ref().map(Var::from_tensor).transpose()?,
        None => None,
    };
    let target = match (&tracked, &target) {
        (Some(tracked), _) => tracked.as_tensor(),
        (None, Some(target)) => target,
        (None, None) => input.as_tensor(), // log_softmax: not looked at
    };
    let loss = forward(&input, target)?;
    compare_loss("forward", case, &loss)?;

    let upstream = case.tensor("upstream", device)?;
    let grads = (loss * upstream)?.sum_all()?.backward()?;
    let grad = grads.get(&input).context("no gradient for the input")?;
    compare_grad("gradient", case, "input", grad, &case.values("grad")?)?;
    if let Some(tracked) = &tracked {
        let grad = grads.get(tracked).context("no gradient for the target")?;
        compare_grad("target's gradient", case, "target", grad, &case.values("target_grad")?)?;
    }
    Ok(())
}

/// `loss_and_grad`, whose upstream gradient is 1: the record's gradient divided by its upstream gradient.
fn check_one_pass(
    case: &Case,
    device: &Device,
    loss_and_grad: impl Fn(&Tensor, &Tensor) -> candle_core::Result<(Tensor, Tensor)>,
) -> Result<()> {
    let (loss, grad) = loss_and_grad(&case.tensor("input", device)?, &case.tensor("target", device)?)?;
    compare_loss("loss_and_grad's loss", case, &loss)?;
    let want: Vec<f64> = case.values("grad")?.iter().zip(case.upstream()?).map(|(grad, up)| grad / up).collect();
    compare_grad("loss_and_grad's gradient", case, "input", &grad, &want)
}

/// Runs every case of one loss on every device and reports the first that fails.
fn check(loss: &str, run: impl Fn(&Case, &Device) -> Result<()>) {
    for device in crate::common::devices() {
        let cases: Vec<_> = CASES.iter().filter(|case| case.is(loss)).collect();
        let failed: Vec<_> = cases
            .iter()
            .filter_map(|case| run(case, &device).err().map(|error| format!("{}: {error:#}", case.line)))
            .collect();
        assert!(failed.is_empty(), "{device:?}: {} of {} cases; first {}", failed.len(), cases.len(), failed[0]);
    }
}

/// Applies a setter where the case has the option.
fn set<L, V>(loss: L, value: Option<V>, setter: impl FnOnce(L, V) -> L) -> L {
    match value {
        Some(value) => setter(loss, value),
        None => loss,
    }
}

#[test]
fn cross_entropy_agrees() {
    check("cross_entropy", |case, device| {
        let loss = CrossEntropyLoss::new().with_reduction(case.reduction());
        let loss = set(loss, case.maybe("weight", device)?, CrossEntropyLoss::with_weight);
        let loss = set(loss, case.maybe("row_weight", device)?, CrossEntropyLoss::with_row_weight);
        let loss = set(loss, case.row_transform(), CrossEntropyLoss::with_row_transform);
        let loss = set(loss, case.option("ignore_index"), CrossEntropyLoss::with_ignore_index);
        let loss = set(loss, case.option("label_smoothing"), CrossEntropyLoss::with_label_smoothing);
        let loss = set(loss, case.option::<f64>("normalizer"), CrossEntropyLoss::with_normalizer);
        let loss = set(loss, case.option("z_loss"), CrossEntropyLoss::with_z_loss);
        let loss = set(loss, case.option("softcap"), CrossEntropyLoss::with_softcap);
        let loss = set(loss, case.option("logit_scale"), CrossEntropyLoss::with_logit_scale);
        check_autograd(case, device, |x, t| loss.forward(x, t))?;
        check_one_pass(case, device, |x, t| loss.loss_and_grad(x, t))?;
        check_one_pass(case, device, |x, t| Ok((loss.loss_and_grad_inplace(x, t)?, x.clone()))).context("in place")
    });
}

#[test]
fn nll_agrees() {
    check("nll", |case, device| {
        let loss = NllLoss::new().with_reduction(case.reduction());
        let loss = set(loss, case.maybe("weight", device)?, NllLoss::with_weight);
        let loss = set(loss, case.maybe("row_weight", device)?, NllLoss::with_row_weight);
        let loss = set(loss, case.option("ignore_index"), NllLoss::with_ignore_index);
        check_autograd(case, device, |x, t| loss.forward(x, t))?;
        check_one_pass(case, device, |x, t| loss.loss_and_grad(x, t))
    });
}

#[test]
fn log_softmax_agrees() {
    check("log_softmax", |case, device| {
        let dim: usize = case.option("dim").context("dim")?;
        check_autograd(case, device, |x, _| log_softmax(x, dim))
    });
}

/// Runs a case of a loss of elements, of which `$loss` has the options that not all of them have. A normalizer is given
/// as a number and as a tensor.
macro_rules! check_elements {
    ($case:ident, $device:ident, $loss:expr) => {{
        let loss = $loss.with_reduction($case.reduction());
        let loss = set(loss, $case.maybe("weight", $device)?, |loss, weight| loss.with_weight(weight));
        let loss = set(loss, $case.maybe("ignore_mask", $device)?, |loss, mask| loss.with_mask(mask));
        let mut losses = vec![loss];
        if let Some(normalizer) = $case.option::<f64>("normalizer") {
            let tensor = Tensor::new(normalizer, $device)?;
            losses.push(losses[0].clone().with_normalizer(tensor));
            losses[0] = losses[0].clone().with_normalizer(normalizer);
        }
        for loss in losses {
            check_autograd($case, $device, |x, t| loss.forward(x, t))?;
            check_one_pass($case, $device, |x, t| loss.loss_and_grad(x, t))?;
        }
        Ok(())
    }};
}

#[test]
fn binary_cross_entropy_agrees() {
    check("binary_cross_entropy", |case, device| check_elements!(case, device, BceLoss::new()));
}

#[test]
fn binary_cross_entropy_with_logits_agrees() {
    check("binary_cross_entropy_with_logits", |case, device| {
        let loss = BceWithLogitsLoss::new();
        let loss = set(loss, case.maybe("pos_weight", device)?, BceWithLogitsLoss::with_pos_weight);
        let loss = set(loss, case.option("label_smoothing"), BceWithLogitsLoss::with_label_smoothing);
        check_elements!(case, device, loss)
    });
}

#[test]
fn multi_label_soft_margin_agrees() {
    check("multi_label_soft_margin", |case, device| check_elements!(case, device, MultiLabelSoftMarginLoss::new()));
}

#[test]
fn sigmoid_focal_agrees() {
    check("sigmoid_focal", |case, device| {
        let loss = set(SigmoidFocalLoss::new(), case.option("alpha"), SigmoidFocalLoss::with_alpha);
        let loss = set(loss, case.option("gamma"), SigmoidFocalLoss::with_gamma);
        check_elements!(case, device, loss)
    });
}

#[test]
fn l1_agrees() {
    check("l1", |case, device| check_elements!(case, device, L1Loss::new()));
}

/// Nothing is skipped silently: each loss has a test above, and the record holds every combination of what matters.
#[test]
fn the_record_is_complete() -> Result<()> {
    const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
    const INDICES: [DType; 4] = [DType::U8, DType::U32, DType::I32, DType::I64];
    const LOSSES: [&str; 8] = [
        "cross_entropy",
        "nll",
        "log_softmax",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "multi_label_soft_margin",
        "sigmoid_focal",
        "l1",
    ];
    let mut seen = BTreeSet::new();
    for case in CASES.iter() {
        let option = |key: &str, default: &str| case.options.get(key).cloned().unwrap_or(default.to_string());
        let (loss, reduction) = (option("loss", ""), option("reduction", "none"));
        let dtype = case.dtype("input")?;
        let weighted = case.maybe("weight", &Device::Cpu)?.is_some();
        let smoothing = option("label_smoothing", "0");
        let masked = case.maybe("ignore_mask", &Device::Cpu)?.is_some();
        let normalized = case.options.contains_key("normalizer");
        let of_rows = case.maybe("row_weight", &Device::Cpu)?.is_some();
        seen.insert(loss.clone());
        seen.insert(format!("{loss} {} {dtype:?} {reduction}", option("transform", "no transform")));
        seen.insert(format!("{loss} {dtype:?} {reduction}"));
        seen.insert(format!("{loss} {dtype:?} {reduction} weighted {weighted} masked {masked} {normalized}"));
        if case.has_index_target()? {
            let ignore = match case.option::<i64>("ignore_index") {
                Some(_) => "class",
                None if case.values("target")?.contains(&-100.0) => "rows",
                None => "no",
            };
            seen.insert(format!("{loss} {dtype:?} {reduction} {weighted} {ignore} {smoothing}"));
            seen.insert(format!("{loss} {dtype:?} {reduction} {weighted} {ignore} {smoothing} of rows: {of_rows}"));
            seen.insert(format!("{loss} {:?} {ignore}", case.dtype("target")?));
            seen.insert(format!("{loss} rank {}", case.tensor("input", &Device::Cpu)?.rank()));
        } else if loss == "cross_entropy" {
            seen.insert(format!("{loss} probabilities {dtype:?} {reduction} {weighted} {smoothing}"));
            seen.insert(format!("{loss} probabilities {dtype:?} {reduction} of rows: {of_rows}"));
        }
    }

    let mut wanted: BTreeSet<String> = LOSSES.iter().map(|loss| loss.to_string()).collect();
    for dtype in FLOATS {
        wanted.insert(format!("log_softmax {dtype:?} none"));
        for reduction in ["none", "mean", "sum"] {
            for loss in LOSSES.iter().filter(|&&loss| loss != "log_softmax") {
                wanted.insert(format!("{loss} {dtype:?} {reduction}"));
            }
            wanted.insert(format!("cross_entropy probabilities {dtype:?} {reduction} of rows: true"));
            for transform in ["focal", "poly1", "dft", "generalized_ce"] {
                wanted.insert(format!("cross_entropy {transform} {dtype:?} {reduction}"));
            }
            for weighted in [false, true] {
                for ignore in ["no", "rows", "class"] {
                    let weighed = |loss: &str, e: &str| {
                        format!("{loss} {dtype:?} {reduction} {weighted} {ignore} {e} of rows: true")
                    };
                    wanted.extend(
                        [("cross_entropy", "0"), ("cross_entropy", "0.1"), ("nll", "0")].map(|(l, e)| weighed(l, e)),
                    );
                }
                for smoothing in ["0", "0.1", "1.0"] {
                    wanted.insert(format!("cross_entropy probabilities {dtype:?} {reduction} {weighted} {smoothing}"));
                    for ignore in ["no", "rows", "class"] {
                        wanted.insert(format!("cross_entropy {dtype:?} {reduction} {weighted} {ignore} {smoothing}"));
                        wanted.insert(format!("nll {dtype:?} {reduction} {weighted} {ignore} 0"));
                    }
                }
            }
        }
    }
    for (loss, dtype) in LOSSES[3..].iter().flat_map(|loss| FLOATS.map(|dtype| (loss, dtype))) {
        let options = |reduction, weighted, masked, normalized| {
            format!("{loss} {dtype:?} {reduction} weighted {weighted} masked {masked} {normalized}")
        };
        wanted.extend(["none", "mean", "sum", "batchmean"].map(|reduction| options(reduction, true, true, false)));
        wanted.extend([options("batchmean", false, false, false), options("mean", false, true, false)]);
        wanted.extend([false, true].map(|all| options("mean", all, all, true)));
    }
    for loss in ["cross_entropy", "nll"] {
        wanted.extend((1..=4).map(|rank| format!("{loss} rank {rank}")));
        for dtype in INDICES {
            wanted.extend(["no", "class"].map(|ignore| format!("{loss} {dtype:?} {ignore}")));
        }
    }
    let missing: Vec<_> = wanted.difference(&seen).collect();
    ensure!(missing.is_empty(), "not in the record: {missing:?}");
    let untested: Vec<_> = seen.iter().filter(|key| !key.contains(' ') && !LOSSES.contains(&key.as_str())).collect();
    ensure!(untested.is_empty(), "no test runs {untested:?}");
    ensure!(CASES.len() >= 900, "{} cases", CASES.len());
    Ok(())
}
