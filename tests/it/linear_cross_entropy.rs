//! Linear cross-entropy against the composed loss in f64, and against cross-entropy of all logits at once.

use crate::common::{FLOATS, Random, devices, indices, tensor, values};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    CrossEntropyLoss, LinearCrossEntropyLoss, Reduction, cross_entropy, linear_cross_entropy, unfused,
};

const REDUCTIONS: [Reduction; 3] = [Reduction::None, Reduction::Mean, Reduction::Sum];

/// The options of a case, for every kind of loss that takes them.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    weight: bool,
    smoothing: f64,
    z_loss: f64,
    softcap: Option<f64>,
    scale: Option<f64>,
    normalizer: Option<f64>,
    ignore: Option<i64>,
    reduction: Reduction,
    chunk_rows: Option<usize>,
}

macro_rules! with_options {
    ($loss:expr, $options:expr, $weight:expr) => {{
        let (mut loss, o) = ($loss, $options);
        if o.weight {
            loss = loss.with_weight($weight.clone());
        }
        if let Some(cap) = o.softcap {
            loss = loss.with_softcap(cap);
        }
        if let Some(scale) = o.scale {
            loss = loss.with_logit_scale(scale);
        }
        if let (Some(normalizer), Reduction::Mean) = (o.normalizer, o.reduction) {
            loss = loss.with_normalizer(normalizer);
        }
        if let Some(ignore) = o.ignore {
            loss = loss.with_ignore_index(ignore);
        }
        loss.with_label_smoothing(o.smoothing).with_z_loss(o.z_loss).with_reduction(o.reduction)
    }};
}

impl Options {
    fn linear(&self, class_weight: &Tensor) -> LinearCrossEntropyLoss {
        let loss = with_options!(LinearCrossEntropyLoss::new(), self, class_weight);
        match self.chunk_rows {
            Some(rows) => loss.with_chunk_rows(rows),
            None => loss,
        }
    }

    fn composed(&self, class_weight: &Tensor) -> LinearCrossEntropyLoss {
        with_options!(LinearCrossEntropyLoss::new().with_fused(false), self, class_weight)
    }

    fn unchunked(&self, class_weight: &Tensor) -> CrossEntropyLoss {
        with_options!(CrossEntropyLoss::new(), self, class_weight)
    }
}

/// Random inputs, as f64 values that the dtype holds exactly.
struct Data {
    rows: Vec<usize>,
    features: usize,
    classes: usize,
    hidden: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    target: Vec<i64>,
    class_weight: Vec<f64>,
    upstream: Vec<f64>,
}

impl Data {
    fn new(seed: u64, rows: &[usize], features: usize, classes: usize, dtype: DType) -> Result<Self> {
        let mut random = Random::new(seed);
        let n = rows.iter().product::<usize>();
        let mut exact =
            |count: usize, scale: f64| values(&tensor(&random.normals(count, scale), &[count], dtype, &Device::Cpu)?);
        Ok(Data {
            hidden: exact(n * features, 1.0)?,
            weight: exact(classes * features, 1.5 / (features as f64).sqrt())?,
            bias: exact(classes, 0.5)?,
            upstream: exact(n, 1.0)?,
            target: random.classes(n, classes),
            class_weight: random.uniforms(classes),
            rows: rows.to_vec(),
            features,
            classes,
        })
    }

    fn ignoring(mut self, value: i64, rows: impl IntoIterator<Item = usize>) -> Self {
        rows.into_iter().for_each(|row| self.target[row] = value);
        self
    }

    fn inputs(&self, dtype: DType, device: &Device) -> Result<[Var; 3]> {
        let hidden_shape = [&self.rows[..], &[self.features]].concat();
        Ok([
            Var::from_tensor(&tensor(&self.hidden, &hidden_shape, dtype, device)?)?,
            Var::from_tensor(&tensor(&self.weight, &[self.classes, self.features], dtype, device)?)?,
            Var::from_tensor(&tensor(&self.bias, &[self.classes], dtype, device)?)?,
        ])
    }

    fn target(&self, device: &Device) -> Result<Tensor> {
        indices(&self.target, &self.rows, DType::I64, device)
    }

    fn class_weight(&self, device: &Device) -> Result<Tensor> {
        tensor(&self.class_weight, &[self.classes], DType::F64, device)
    }

    /// Loss and gradients for an upstream gradient that is different in each row, or 0.75.
    fn through_autograd(&self, inputs: &[Var; 3], loss: &Tensor) -> Result<Results> {
        let upstream = match loss.rank() {
            0 => &[0.75][..],
            _ => &self.upstream,
        };
        let upstream = tensor(upstream, loss.dims(), loss.dtype(), loss.device())?;
        let grads = (loss * upstream)?.sum_all()?.backward()?;
        Results::new(loss, inputs.each_ref().map(|input| grads.get(input).cloned()))
    }

    /// The composed loss in f64 on the CPU.
    fn expected(&self, options: &Options) -> Result<Results> {
        let device = Device::Cpu;
        let inputs @ [hidden, weight, bias] = &self.inputs(DType::F64, &device)?;
        let loss = options.composed(&self.class_weight(&device)?);
        self.through_autograd(inputs, &loss.forward(hidden, weight, Some(bias), &self.target(&device)?)?)
    }
}

#[derive(Debug)]
struct Results {
    loss: Vec<f64>,
    grads: [Vec<f64>; 3],
}

impl Results {
    fn new(loss: &Tensor, grads: [Option<Tensor>; 3]) -> Result<Self> {
        let [hidden, weight, bias] = grads.map(|grad| grad.map_or(Ok(vec![]), |grad| values(&grad)));
        Ok(Results { loss: values(loss)?, grads: [hidden?, weight?, bias?] })
    }

    /// Compares with the tolerances of a dtype; prints the first mismatch.
    fn assert_near(&self, want: &Results, tolerance: Tolerance, case: &str) {
        tolerance.sum.assert_near(&self.loss, &want.loss, &format!("{case}: loss"));
        for (what, (got, want)) in ["hidden", "weight", "bias"].iter().zip(self.grads.iter().zip(&want.grads)) {
            tolerance.gradient.assert_near(got, want, &format!("{case}: gradient of {what}"));
        }
    }
}

/// `|got - want| <= each |want| + all max|want| + least`
#[derive(Clone, Copy)]
struct Bound {
    each: f64,
    all: f64,
    least: f64,
}

impl Bound {
    fn assert_near(&self, got: &[f64], want: &[f64], case: &str) {
        assert_eq!(got.len(), want.len(), "{case}: lengths");
        let largest = want.iter().filter(|v| v.is_finite()).fold(0f64, |a, v| a.max(v.abs()));
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let near = (got - want).abs() <= self.each * want.abs() + self.all * largest + self.least;
            assert!(near || got.is_nan() && want.is_nan(), "{case} [{i}]: {got}, expected {want} (largest {largest})");
        }
    }
}

#[derive(Clone, Copy)]
struct Tolerance {
    sum: Bound,
    gradient: Bound,
}

impl Tolerance {
    /// f32 and f64: sums of some hundred products. 16-bit gradients: one rounding of such a sum, where the logits are
    /// f32 (CPU); where they are 16-bit too (CUDA) an error of half a unit in each logit and in its gradient.
    fn of(dtype: DType, device: &Device) -> Self {
        let (unit, sum) = match dtype {
            DType::F64 => (0.0, 1e-13),
            DType::F32 => (0.0, 3e-6),
            DType::F16 => (2f64.powi(-11), 3e-6),
            _ => (2f64.powi(-8), 3e-6),
        };
        let logits = if device.is_cuda() { 4.0 * unit } else { 0.0 };
        Tolerance {
            sum: Bound { each: 0.0, all: sum + logits, least: 0.0 },
            // half the spacing of f16 below its smallest normal number
            gradient: Bound {
                each: 1.01 * unit,
                all: sum + logits,
                least: if dtype == DType::F16 { 2f64.powi(-25) } else { 0.0 },
            },
        }
    }
}

fn option_grid() -> Vec<Options> {
    let default = Options::default();
    vec![
        default,
        Options { weight: true, ..default },
        Options { smoothing: 0.1, ..default },
        Options { weight: true, smoothing: 0.2, ignore: Some(3), ..default },
        Options { z_loss: 1e-2, ..default },
        Options { softcap: Some(2.0), ..default },
        Options { scale: Some(0.5), softcap: Some(3.0), ..default },
        Options { normalizer: Some(5.0), ..default },
        Options { weight: true, smoothing: 0.1, z_loss: 1e-3, softcap: Some(4.0), scale: Some(1.5), ..default },
    ]
}

#[test]
fn every_option_equals_the_composed_loss_in_f64() -> Result<()> {
    for device in devices() {
        for dtype in FLOATS {
            let data = Data::new(1, &[3, 5], 8, 37, dtype)?.ignoring(-100, [4, 9]).ignoring(3, [0, 7, 14]);
            let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            let target = data.target(&device)?;
            for options in option_grid() {
                // -100 is a class out of range where another index is ignored
                let target = match options.ignore {
                    Some(_) => target.eq(-100i64)?.where_cond(&target.ones_like()?, &target)?,
                    None => target.clone(),
                };
                let data = &Data { target: target.flatten_all()?.to_vec1()?, ..copy(&data) };
                for reduction in REDUCTIONS {
                    let options = Options { reduction, chunk_rows: Some(4), ..options };
                    let case = format!("{dtype:?} on {:?}, {options:?}", device.location());
                    let loss = options.linear(&data.class_weight(&device)?);
                    let loss = loss.forward(hidden, weight, Some(bias), &target)?;
                    let shape = if reduction == Reduction::None { &data.rows[..] } else { &[] };
                    assert_eq!(loss.dims(), shape, "{case}");
                    let got = data.through_autograd(inputs, &loss)?;
                    got.assert_near(&data.expected(&options)?, Tolerance::of(dtype, &device), &case);
                }
            }
        }
    }
    Ok(())
}

fn copy(data: &Data) -> Data {
    Data {
        rows: data.rows.clone(),
        hidden: data.hidden.clone(),
        weight: data.weight.clone(),
        bias: data.bias.clone(),
        target: data.target.clone(),
        class_weight: data.class_weight.clone(),
        upstream: data.upstream.clone(),
        ..*data
    }
}

#[test]
fn chunks_of_any_size_equal_all_logits_at_once() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64] {
            let data = Data::new(2, &[13], 16, 300, dtype)?.ignoring(-100, [12]);
            let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            let target = data.target(&device)?;
            for reduction in REDUCTIONS {
                let options = Options { reduction, weight: true, smoothing: 0.1, ..Options::default() };
                let class_weight = data.class_weight(&device)?;
                let logits = hidden.matmul(&weight.t()?)?.broadcast_add(bias)?;
                let want =
                    data.through_autograd(inputs, &options.unchunked(&class_weight).forward(&logits, &target)?)?;
                // one row, divisors of the 12 rows that count, what leaves a remainder, all, and more than there are
                for chunk_rows in [None, Some(1), Some(4), Some(5), Some(6), Some(12), Some(13), Some(1000)] {
                    let options = Options { chunk_rows, ..options };
                    let loss = options.linear(&class_weight).forward(hidden, weight, Some(bias), &target)?;
                    let case = format!("{dtype:?} on {:?}, {options:?}", device.location());
                    data.through_autograd(inputs, &loss)?.assert_near(&want, Tolerance::of(dtype, &device), &case);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn loss_and_grad_is_forward_and_backward() -> Result<()> {
    for device in devices() {
        for dtype in FLOATS {
            let mut data = Data::new(3, &[9], 8, 50, dtype)?.ignoring(-100, [2, 3]);
            data.upstream.fill(1.0);
            let [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            let target = data.target(&device)?;
            for reduction in REDUCTIONS {
                let loss = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(4);
                let forward = loss.forward(hidden, weight, Some(bias), &target)?;
                let want = forward.sum_all()?.backward()?;
                let (value, got) = loss.loss_and_grad(hidden, weight, Some(bias), &target)?;
                let case = format!("{dtype:?} {reduction:?} on {:?}", device.location());
                assert_eq!(values(&value)?, values(&forward)?, "{case}");
                assert!(!value.track_op() && !got.weight.track_op(), "{case}: tracked");
                for (got, of) in [(got.hidden, hidden), (got.weight, weight), (got.bias.expect("bias"), bias)] {
                    assert_eq!((got.dims(), got.dtype()), (of.dims(), dtype), "{case}");
                    let want = values(want.get(of).expect("gradient"))?;
                    Tolerance::of(dtype, &device).gradient.assert_near(&values(&got)?, &want, &case);
                }
                let (_, got) = loss.loss_and_grad(hidden, weight, None, &target)?;
                assert!(got.bias.is_none());
            }
        }
    }
    Ok(())
}

#[test]
fn the_composed_twin_agrees() -> Result<()> {
    for device in devices() {
        let data = Data::new(4, &[2, 4], 8, 20, DType::F32)?.ignoring(-100, [1]);
        let [hidden, weight, bias] = &data.inputs(DType::F32, &device)?;
        let target = data.target(&device)?;
        for reduction in REDUCTIONS {
            let fused = LinearCrossEntropyLoss::new().with_reduction(reduction);
            let composed = LinearCrossEntropyLoss::new().with_fused(false).with_reduction(reduction);
            let (loss, got) = fused.loss_and_grad(hidden, weight, Some(bias), &target)?;
            let (want_loss, want) = composed.loss_and_grad(hidden, weight, Some(bias), &target)?;
            assert_eq!(loss.dims(), want_loss.dims());
            let got = Results::new(&loss, [Some(got.hidden), Some(got.weight), got.bias])?;
            let want = Results::new(&want_loss, [Some(want.hidden), Some(want.weight), want.bias])?;
            got.assert_near(&want, Tolerance::of(DType::F32, &device), &format!("{reduction:?}"));
        }
        let mean = linear_cross_entropy(hidden, weight, &target)?;
        let logits = hidden.reshape((8, 8))?.matmul(&weight.t()?)?;
        let want = cross_entropy(&logits, &target.flatten_all()?)?;
        Tolerance::of(DType::F32, &device).sum.assert_near(&values(&mean)?, &values(&want)?, "mean");
        let composed = unfused::linear_cross_entropy(hidden, weight, &target)?;
        Tolerance::of(DType::F32, &device).sum.assert_near(&values(&composed)?, &values(&want)?, "composed mean");
    }
    Ok(())
}

#[test]
fn backward_twice_gives_the_same_gradients() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::BF16] {
            let data = Data::new(5, &[11], 8, 30, dtype)?.ignoring(-100, [5]);
            let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            for reduction in REDUCTIONS {
                let loss = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(3);
                let loss = loss.forward(hidden, weight, Some(bias), &data.target(&device)?)?;
                let first = data.through_autograd(inputs, &loss)?;
                for again in [data.through_autograd(inputs, &loss)?, data.through_autograd(inputs, &loss)?] {
                    assert_eq!(first.grads, again.grads, "{dtype:?} {reduction:?} on {:?}", device.location());
                }
            }
        }
    }
    Ok(())
}

/// Inputs that are results themselves, so that a missing gradient would stop the backward; and each one tracked alone.
#[test]
fn gradients_flow_through_whatever_is_tracked() -> Result<()> {
    for device in devices() {
        let dtype = DType::F64;
        let data = Data::new(6, &[7], 5, 12, dtype)?;
        let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
        let target = data.target(&device)?;
        for reduction in REDUCTIONS {
            let options = Options { reduction, ..Options::default() };
            let want = data.expected(&options)?;
            let loss = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(2);
            for tracked in 1..8 {
                let of = |i: usize| -> Result<Tensor> {
                    let input = (inputs[i].as_tensor() * 2.0)?;
                    if tracked >> i & 1 == 1 { input / 2.0 } else { Ok((input / 2.0)?.detach()) }
                };
                let loss = loss.forward(&of(0)?, &of(1)?, Some(&of(2)?), &target)?;
                let got = data.through_autograd(inputs, &loss)?;
                for i in 0..3 {
                    let case = format!("{reduction:?}, tracked {tracked:b}, input {i} on {:?}", device.location());
                    let want = if tracked >> i & 1 == 1 { &want.grads[i][..] } else { &[] };
                    Tolerance::of(dtype, &device).gradient.assert_near(&got.grads[i], want, &case);
                }
            }
            let loss = loss.forward(&hidden.detach(), &weight.detach(), Some(&bias.detach()), &target)?;
            assert!(!loss.track_op(), "nothing tracked");
            Tolerance::of(dtype, &device).sum.assert_near(&values(&loss)?, &want.loss, "nothing tracked");
        }
    }
    Ok(())
}

/// The hidden state of an ignored row may hold anything: no product turns it into a NaN elsewhere.
#[test]
fn ignored_rows_leak_nothing() -> Result<()> {
    for device in devices() {
        for dtype in FLOATS {
            let mut data = Data::new(7, &[10], 4, 20, dtype)?.ignoring(-100, [0, 3, 9]);
            for reduction in REDUCTIONS {
                data.hidden[3 * 4..4 * 4].fill(0.0);
                let want = data.expected(&Options { reduction, ..Options::default() })?;
                data.hidden[3 * 4..4 * 4].copy_from_slice(&[f64::NAN, f64::INFINITY, 1.0, f64::NEG_INFINITY]);
                let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
                let loss = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(4);
                let loss = loss.forward(hidden, weight, Some(bias), &data.target(&device)?)?;
                let got = data.through_autograd(inputs, &loss)?;
                let case = format!("{dtype:?} {reduction:?} on {:?}", device.location());
                got.assert_near(&want, Tolerance::of(dtype, &device), &case);
                for row in [0, 3, 9] {
                    assert_eq!(got.grads[0][row * 4..(row + 1) * 4], [0.0; 4], "{case}: row {row}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_counts_and_nothing_there() -> Result<()> {
    for device in devices() {
        for rows in [0, 6] {
            let data = Data::new(8, &[rows], 4, 9, DType::F32)?.ignoring(-100, 0..rows);
            let inputs @ [hidden, weight, bias] = &data.inputs(DType::F32, &device)?;
            let target = data.target(&device)?;
            for reduction in REDUCTIONS {
                for normalizer in [None, Some(2.0)] {
                    let options = Options { reduction, normalizer, ..Options::default() };
                    let loss = options.linear(&data.class_weight(&device)?);
                    let (alone, grads) = loss.loss_and_grad(hidden, weight, Some(bias), &target)?;
                    let loss = loss.forward(hidden, weight, Some(bias), &target)?;
                    let case = format!("{rows} rows, {options:?} on {:?}", device.location());
                    let want = match (reduction, normalizer) {
                        (Reduction::None, _) => vec![0.0; rows],
                        (Reduction::Mean, None) => vec![f64::NAN],
                        _ => vec![0.0],
                    };
                    let same = |got: &Tensor| -> Result<bool> {
                        let got = values(got)?;
                        Ok(got.len() == want.len()
                            && got.iter().zip(&want).all(|(a, b)| a == b || a.is_nan() && b.is_nan()))
                    };
                    assert!(same(&loss)? && same(&alone)?, "{case}: {loss} and {alone}");
                    for (grad, of) in [grads.hidden, grads.weight, grads.bias.expect("bias")].iter().zip(inputs) {
                        assert_eq!(grad.dims(), of.dims(), "{case}");
                        assert!(values(grad)?.iter().all(|&g| g == 0.0), "{case}: {grad}");
                    }
                    if rows > 0 {
                        let got = data.through_autograd(inputs, &loss)?;
                        assert!(got.grads.iter().flatten().all(|&g| g == 0.0), "{case}: {got:?}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Sums over many rows with 16-bit inputs: as good as an f32 sum that is rounded once, however small the chunks.
#[test]
fn sixteen_bit_gradients_are_rounded_once() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            let data = Data::new(9, &[512], 8, 16, dtype)?;
            let inputs @ [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            let loss = LinearCrossEntropyLoss::new().with_chunk_rows(8);
            let loss = loss.forward(hidden, weight, Some(bias), &data.target(&device)?)?;
            let got = data.through_autograd(inputs, &loss)?;
            got.assert_near(&data.expected(&Options::default())?, Tolerance::of(dtype, &device), &format!("{dtype:?}"));
        }
    }
    Ok(())
}

/// Loss scaling: upstream gradients beyond what f16 holds, on losses whose gradients are below it.
#[test]
fn large_upstream_gradients_of_f16() -> Result<()> {
    for device in devices() {
        let mut data = Data::new(10, &[64], 4, 10, DType::F16)?;
        data.upstream.iter_mut().for_each(|u| *u *= 1e5);
        for reduction in [Reduction::None, Reduction::Mean] {
            let options = Options { reduction, normalizer: Some(1e5), ..Options::default() };
            let inputs @ [hidden, weight, bias] = &data.inputs(DType::F16, &device)?;
            let loss = options.linear(&data.class_weight(&device)?);
            let loss = loss.forward(hidden, weight, Some(bias), &data.target(&device)?)?;
            let scaled = |loss: &Tensor| loss * if reduction == Reduction::None { 1e-4 } else { 1e5 };
            let got = data.through_autograd(inputs, &scaled(&loss)?)?;
            let exact @ [hidden, weight, bias] = &data.inputs(DType::F64, &Device::Cpu)?;
            let composed = options.composed(&data.class_weight(&Device::Cpu)?);
            let loss = composed.forward(hidden, weight, Some(bias), &data.target(&Device::Cpu)?)?;
            let want = data.through_autograd(exact, &scaled(&loss)?)?;
            got.assert_near(&want, Tolerance::of(DType::F16, &device), &format!("{reduction:?}"));
        }
    }
    Ok(())
}

#[test]
fn any_layout_and_index_dtype() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::BF16] {
            let data = Data::new(11, &[3, 4], 6, 14, dtype)?;
            let [hidden, weight, bias] = &data.inputs(dtype, &device)?;
            let target = data.target(&device)?;
            let loss = LinearCrossEntropyLoss::new().with_chunk_rows(5);
            let (want, want_grads) = loss.loss_and_grad(hidden, weight, Some(bias), &target)?;
            // the same values: a weight stored the other way around, hidden states and targets of strided rows, and
            // windows
            let weight_t = weight.t()?.contiguous()?.t()?;
            let hidden_t = hidden.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
            let window = |t: &Tensor| Tensor::cat(&[t, t, t], 0)?.narrow(0, t.dim(0)?, t.dim(0)?);
            let columns = |t: &Tensor| Tensor::cat(&[t, t, t], 1)?.narrow(1, t.dim(1)?, t.dim(1)?);
            let target_t = target.t()?.contiguous()?.t()?;
            for (hidden, weight, bias, target) in [
                (hidden.as_tensor(), &weight_t, bias.as_tensor(), &target_t),
                (&hidden_t, &columns(weight)?, &window(bias)?, &target),
                (&window(hidden)?, &window(weight)?, bias, &window(&target)?),
            ] {
                let (got, grads) = loss.loss_and_grad(hidden, weight, Some(bias), target)?;
                let close = |a: &Tensor, b: &Tensor| -> Result<()> {
                    let each = if dtype == DType::BF16 { 0.01 } else { 0.0 };
                    let bound = Bound { each, all: 1e-5, least: 0.0 };
                    bound.assert_near(&values(a)?, &values(b)?, "layouts");
                    Ok(())
                };
                close(&got, &want)?;
                close(&grads.hidden, &want_grads.hidden)?;
                close(&grads.weight, &want_grads.weight)?;
                close(&grads.bias.unwrap(), want_grads.bias.as_ref().unwrap())?;
            }
            for index in [DType::U8, DType::U32, DType::I32] {
                let target = indices(&data.target, &data.rows, index, &device)?;
                let (got, _) = loss.loss_and_grad(hidden, weight, Some(bias), &target)?;
                assert_eq!(values(&got)?, values(&want)?, "{index:?}");
            }
        }
    }
    Ok(())
}

/// A class at -inf through the bias, as a mask of the vocabulary.
#[test]
fn masked_classes() -> Result<()> {
    for device in devices() {
        let mut data = Data::new(12, &[6], 4, 8, DType::F32)?;
        data.target.iter_mut().for_each(|t| *t %= 6);
        data.bias[6..].fill(f64::NEG_INFINITY);
        let inputs @ [hidden, weight, bias] = &data.inputs(DType::F32, &device)?;
        let loss = LinearCrossEntropyLoss::new().forward(hidden, weight, Some(bias), &data.target(&device)?)?;
        let got = data.through_autograd(inputs, &loss)?;
        got.assert_near(&data.expected(&Options::default())?, Tolerance::of(DType::F32, &device), "masked");
        assert_eq!(got.grads[2][6..], [0.0; 2]);
    }
    Ok(())
}

#[test]
fn classes_out_of_range() -> Result<()> {
    for device in devices() {
        for bad in [-1i64, 9, (1 << 32) + 1] {
            let mut data = Data::new(13, &[5], 4, 9, DType::F32)?.ignoring(-100, [0]);
            data.target[3] = bad;
            let [hidden, weight, bias] = &data.inputs(DType::F32, &device)?;
            let target = data.target(&device)?;
            for reduction in REDUCTIONS {
                let loss = LinearCrossEntropyLoss::new().with_reduction(reduction).with_chunk_rows(2);
                let error = loss.clone().with_target_check(true).forward(hidden, weight, Some(bias), &target);
                let message = error.expect_err("a class out of range").to_string();
                for part in ["linear_cross_entropy", &format!("target {bad} at row 3"), "0..9"] {
                    assert!(message.contains(part), "{message}: without {part}");
                }
                if device.is_cpu() {
                    assert!(loss.forward(hidden, weight, Some(bias), &target).is_err());
                } else {
                    let (value, grads) = loss.loss_and_grad(hidden, weight, Some(bias), &target)?;
                    assert!(values(&value)?.iter().any(|v| v.is_nan()), "{bad}: {value}");
                    let hidden = values(&grads.hidden)?;
                    assert!(hidden[3 * 4..4 * 4].iter().all(|g| g.is_nan()), "{bad}: {hidden:?}");
                    if reduction == Reduction::None {
                        assert!(hidden[4 * 4..].iter().all(|g| g.is_finite()), "{bad}: {hidden:?}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn errors_name_what_does_not_fit() -> Result<()> {
    for device in devices() {
        let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &device);
        let (f, u) = (DType::F32, DType::U32);
        let (hidden, weight, target) = (zeros(&[5, 4], f)?, zeros(&[9, 4], f)?, zeros(&[5], u)?);
        let loss = LinearCrossEntropyLoss::new;
        let check = |result: Result<Tensor>, parts: &[&str]| {
            let message = result.expect_err("an error").to_string();
            for part in ["linear_cross_entropy", "expected"].iter().chain(parts) {
                assert!(message.contains(part), "{message}: without {part}");
            }
        };
        let on = |hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, target: &Tensor, parts: &[&str]| {
            check(loss().forward(hidden, weight, bias, target), parts);
        };
        on(&zeros(&[5, 3], f)?, &weight, None, &target, &["weight", "[9, 4]", "(V, 3)"]);
        on(&zeros(&[5, 0], f)?, &weight, None, &target, &["[5, 0]"]);
        on(&zeros(&[], f)?, &weight, None, &target, &["scalar"]);
        on(&zeros(&[5, 4], u)?, &weight, None, &target, &["U32", "f16"]);
        on(&hidden, &zeros(&[4], f)?, None, &target, &["weight", "[4]"]);
        on(&hidden, &zeros(&[0, 4], f)?, None, &target, &["[0, 4]"]);
        on(&hidden, &zeros(&[9, 4], DType::BF16)?, None, &target, &["weight", "BF16", "F32"]);
        on(&hidden, &weight, Some(&zeros(&[8], f)?), &target, &["bias", "[8]", "(9)"]);
        on(&hidden, &weight, Some(&zeros(&[9], DType::F64)?), &target, &["bias", "F64", "F32"]);
        on(&hidden, &weight, None, &zeros(&[4], u)?, &["target", "[4]", "[5]"]);
        on(&hidden, &weight, None, &zeros(&[5, 9], f)?, &["target", "[5, 9]", "[5]"]);
        on(&hidden, &weight, None, &zeros(&[5], f)?, &["F32", "i64"]);
        check(loss().with_chunk_rows(0).forward(&hidden, &weight, None, &target), &["chunk rows 0"]);
        check(loss().with_label_smoothing(1.5).forward(&hidden, &weight, None, &target), &["1.5"]);
        check(loss().with_weight(zeros(&[3], f)?).forward(&hidden, &weight, None, &target), &["[3]", "(9)"]);
    }
    Ok(())
}
