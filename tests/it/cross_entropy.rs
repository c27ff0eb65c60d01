//! Cross-entropy against the f64 reference: options, dtypes, shapes and layouts.

use super::losses::{ABSOLUTE, CrossEntropyLoss, FUSED, Reduction};
use crate::common::{
    Check, FLOATS, INDICES, Memory, Operand, REDUCTIONS, Random, arithmetic, assert_same_bits, broadcastable, compare,
    devices, indices, is_left_out, is_slow, tensor, values, widened,
};
use crate::reference::{self, Near, Targets};
use Memory::{Contiguous, Odd, Repeated, Swapped, Window};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::RowTransform;

/// One row of the option matrix.
#[derive(Clone, Copy, Debug)]
struct Options {
    /// Class weights, every third of them 0.
    weight: bool,
    /// Row weights of this dtype, every fourth of them 0; a mask where it is u8.
    row_weight: Option<DType>,
    row_transform: Option<RowTransform>,
    ignore_index: Option<i64>,
    label_smoothing: f64,
    normalizer: Option<f64>,
    z_loss: f64,
    softcap: Option<f64>,
    logit_scale: f64,
}

const DEFAULTS: Options = Options {
    weight: false,
    row_weight: None,
    row_transform: None,
    ignore_index: None,
    label_smoothing: 0.0,
    normalizer: None,
    z_loss: 0.0,
    softcap: None,
    logit_scale: 1.0,
};

const OPTIONS: [Options; 19] = [
    DEFAULTS,
    Options { weight: true, ..DEFAULTS },
    Options { ignore_index: Some(0), ..DEFAULTS },
    Options { label_smoothing: 0.1, ..DEFAULTS },
    Options { weight: true, label_smoothing: 0.1, ignore_index: Some(0), ..DEFAULTS },
    Options { weight: true, label_smoothing: 1.0, ..DEFAULTS },
    Options { normalizer: Some(7.5), ignore_index: Some(0), ..DEFAULTS },
    Options { z_loss: 1e-2, ..DEFAULTS },
    Options { z_loss: 1e-2, weight: true, ignore_index: Some(0), ..DEFAULTS },
    Options { softcap: Some(5.0), ..DEFAULTS },
    Options { logit_scale: 0.25, ..DEFAULTS },
    Options {
        weight: true,
        ignore_index: Some(0),
        label_smoothing: 0.2,
        z_loss: 1e-3,
        softcap: Some(4.0),
        logit_scale: 1.5,
        ..DEFAULTS
    },
    Options { row_weight: Some(DType::F32), ..DEFAULTS },
    Options { row_weight: Some(DType::U8), ignore_index: Some(0), z_loss: 1e-2, ..DEFAULTS },
    Options {
        row_weight: Some(DType::BF16),
        weight: true,
        ignore_index: Some(0),
        label_smoothing: 0.2,
        z_loss: 1e-3,
        ..DEFAULTS
    },
    Options { row_transform: Some(RowTransform::Focal { gamma: 2.0 }), weight: true, ..DEFAULTS },
    Options { row_transform: Some(RowTransform::Focal { gamma: 0.5 }), label_smoothing: 0.1, z_loss: 1e-3, ..DEFAULTS },
    Options {
        row_transform: Some(RowTransform::GeneralizedCe { q: 0.7 }),
        row_weight: Some(DType::F64),
        softcap: Some(4.0),
        ..DEFAULTS
    },
    Options {
        row_transform: Some(RowTransform::Poly1 { epsilon: 2.0 }),
        weight: true,
        label_smoothing: 0.2,
        ignore_index: Some(0),
        ..DEFAULTS
    },
];

/// Weights of rows, of a shape that broadcasts to theirs; one counts, and every fourth doesn't.
fn row_weights(rows: &[usize], dtype: DType, device: &Device, random: &mut Random) -> Result<Tensor> {
    let dims = broadcastable(rows, random);
    let count = dims.iter().product();
    let weights: Vec<_> = (0..count).map(|i| if i % 4 == 1 { 0.0 } else { 0.5 + 2.0 * random.uniform() }).collect();
    tensor(&weights, &dims, DType::F64, device)?.to_dtype(dtype)
}

/// What the target is: class indices, or probabilities of a dtype in a layout.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Classes(DType),
    Probabilities(DType, Memory),
}

struct Case<'a> {
    dims: &'a [usize],
    dtype: DType,
    memory: Memory,
    target: Kind,
    target_memory: Memory,
    options: Options,
}

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        if is_left_out(device, FUSED, random) {
            return Ok(());
        }
        let Case { dims, dtype, options, .. } = *self;
        let axis = if dims.len() == 1 { 0 } else { 1 };
        let (classes, n) = (dims[axis], dims.iter().product::<usize>());
        let mut row_dims = dims.to_vec();
        row_dims.remove(axis);
        let what =
            format!("{dims:?} {dtype:?} {:?} {:?} {:?} {options:?}", self.memory, self.target, self.target_memory);

        let logits = Operand::new(&random.normals(n, 3.0), dims, dtype, device, self.memory)?;
        let target = match self.target {
            Kind::Classes(index) => {
                let mut target: Vec<_> = random.classes(n / classes, classes.min(200));
                if options.ignore_index.is_none() && matches!(index, DType::I32 | DType::I64) {
                    target.iter_mut().for_each(|t| *t = if random.below(4) == 0 { -100 } else { *t });
                }
                // at least one row counts, with a weight
                if let Some(last) = target.last_mut() {
                    *last = 1.min(classes as i64 - 1);
                }
                let target: Vec<_> = target.iter().map(|&t| t as f64).collect();
                Operand::new(&target, &row_dims, index, device, self.target_memory)?
            }
            Kind::Probabilities(dtype, memory) => {
                // rows that do not sum to 1, with zeros
                let target: Vec<_> = random.labels(n).iter().map(|t| t * 4.0 / classes as f64).collect();
                Operand::new(&target, dims, dtype, device, memory)?
            }
        };
        let weight: Vec<_> = (0..classes).map(|c| if c % 3 == 2 { 0.0 } else { 0.5 + random.uniform() }).collect();
        let weight_dtype = random.pick(&FLOATS);
        let weight = options.weight.then(|| tensor(&weight, &[classes], weight_dtype, device)).transpose()?;

        let row_weight = options.row_weight.map(|dtype| row_weights(&row_dims, dtype, device, random)).transpose()?;

        let (x, t) = (logits.values()?, target.values()?);
        let classes: Vec<_> = t.iter().map(|&t| t as i64).collect();
        let targets = match self.target {
            Kind::Classes(_) => Targets::Classes(&classes),
            Kind::Probabilities(..) => Targets::Probabilities(&t),
        };
        // candle adds up a row's exponentials one after the other, in a few lanes
        let absolute = ABSOLUTE * (1.0 + self.dims[axis] as f64 / 250.0);
        for reduction in REDUCTIONS {
            let what = format!("{what} {reduction:?}");
            let mut loss = CrossEntropyLoss::new()
                .with_label_smoothing(options.label_smoothing)
                .with_z_loss(options.z_loss)
                .with_logit_scale(options.logit_scale)
                .with_reduction(reduction);
            let mut reference = reference::CrossEntropy {
                label_smoothing: options.label_smoothing,
                z_loss: options.z_loss,
                softcap: options.softcap,
                logit_scale: options.logit_scale,
                normalizer: options.normalizer.filter(|_| reduction == Reduction::Mean),
                reduction,
                ..Default::default()
            };
            if let Some(weight) = &weight {
                loss = loss.with_weight(weight.clone());
                reference.weight = Some(values(weight)?);
            }
            if let (Some(index), Kind::Classes(_)) = (options.ignore_index, self.target) {
                loss = loss.with_ignore_index(index);
                reference.ignore_index = index;
            }
            if let Some(cap) = options.softcap {
                loss = loss.with_softcap(cap);
            }
            if let Some(weight) = &row_weight {
                loss = loss.with_row_weight(weight.clone());
                let counts = |w: f64| if weight.dtype() == DType::U8 { (w != 0.0) as u8 as f64 } else { w };
                let weights = values(&weight.broadcast_as(row_dims.clone())?.contiguous()?)?;
                reference.row_weight = Some(weights.into_iter().map(counts).collect());
            }
            if let (Some(transform), Kind::Classes(_)) = (options.row_transform, self.target) {
                loss = loss.with_row_transform(transform);
                reference.row_transform = Some(transform);
            }
            if let Some(normalizer) = reference.normalizer {
                loss = loss.with_normalizer(normalizer);
            }
            let check = Check {
                what: what.clone(),
                input: &logits,
                target: &target,
                loss_dims: if reduction == Reduction::None { row_dims.clone() } else { vec![] },
                forward: &|x, t| loss.forward(x, t),
                loss_and_grad: &|x, t| loss.loss_and_grad(x, t),
                absolute,
                expected: &|upstream| reference.expected(dims, axis, &x, targets, upstream),
            };
            check.run(random)?;

            // in place: the same gradient in the logits' memory, and nothing around it touched
            let in_place = |x: &Tensor, t: &Tensor| -> Result<(Tensor, Tensor)> {
                let memory = x.copy()?.contiguous()?;
                Ok((loss.loss_and_grad_inplace(&memory, t)?, memory))
            };
            let (what_in_place, loss_dims) = (format!("{what} in place"), check.loss_dims.clone());
            Check { what: what_in_place, loss_and_grad: &in_place, loss_dims, ..check }.run_loss_and_grad()?;
            let mut contiguous = logits.detached()?.copy()?.contiguous()?;
            if device.is_cuda() {
                // the order of a row's sum depends on where in a word of 16 bytes its gradient begins: at the start of
                // the memory for either
                contiguous = contiguous.force_contiguous()?;
            }
            let (one_loss, one_grad) = loss.loss_and_grad(&contiguous, &target.detached()?)?;
            let in_place = loss.loss_and_grad_inplace(&contiguous, &target.detached()?)?;
            assert_same_bits(&format!("{what}: in-place loss"), &in_place, &one_loss)?;
            assert_same_bits(&format!("{what}: in-place gradient"), &contiguous, &one_grad)?;

            // the loss beside the statistics, whose kernels are others, for some of the cases
            if random.below(if is_slow(device) { 9 } else { 3 }) == 0 {
                let with_statistics = |x: &Tensor, t: &Tensor| Ok(loss.forward_with_statistics(x, t)?.0);
                let what = format!("{what} beside statistics");
                Check { what, forward: &with_statistics, ..check }.run(random)?;
            }

            if reduction == Reduction::None {
                let got = loss.statistics(&logits.detached()?, &target.detached()?)?;
                let want = reference.statistics(dims, axis, &x, targets);
                let exact = |values: &[f64]| values.iter().map(|&value| Near { value, slack: 0.0 }).collect();
                for (name, got, want) in [
                    ("loss", got.loss, want.loss),
                    ("lse", got.lse, want.lse),
                    ("z_loss", got.z_loss, want.z_loss),
                    ("entropy", got.entropy, want.entropy),
                    ("argmax", got.argmax, exact(&want.argmax)),
                    ("correct", got.correct, exact(&want.correct)),
                    ("counted", got.counted, exact(&want.counted)),
                ] {
                    assert_eq!(got.dims(), row_dims, "{what}: shape of {name}");
                    compare(&format!("{what} {name}"), &got, &widened(&want, absolute), arithmetic(dtype))?;
                }
            }
        }
        Ok(())
    }
}

/// Every option with every dtype, for both kinds of targets.
#[test]
fn options_and_dtypes() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(1);
        for (options, dtype) in OPTIONS.iter().flat_map(|o| FLOATS.map(|d| (*o, d))) {
            for dims in [&[5, 7][..], &[3, 130]] {
                let index = random.pick(&INDICES);
                let probabilities = random.pick(&FLOATS);
                for target in [Kind::Classes(index), Kind::Probabilities(probabilities, Contiguous)] {
                    Case { dims, dtype, memory: Contiguous, target, target_memory: Contiguous, options }
                        .check(&device, &mut random)?;
                }
            }
        }
    }
    Ok(())
}

/// Every number of classes at which a kernel changes its way, and one off; the options take turns.
#[test]
fn numbers_of_classes() -> Result<()> {
    const CLASSES: [usize; 15] = [1, 2, 3, 31, 32, 33, 63, 64, 65, 1000, 1001, 2048, 2049, 4095, 5003];
    for device in devices() {
        let mut random = Random::new(2);
        for (i, (classes, dtype)) in CLASSES.iter().flat_map(|c| FLOATS.map(|d| (*c, d))).enumerate() {
            // 17 rows do not fill a whole number of tiles
            let n = if classes < 100 { 17 } else { 2 };
            let probabilities = Kind::Probabilities(FLOATS[i / 3 % 4], Contiguous);
            for target in [Kind::Classes(DType::I64), Kind::Classes(DType::U32), probabilities] {
                // an odd number of classes behind an odd offset: no row is aligned as the one before
                for memory in [Contiguous, Odd] {
                    let options = OPTIONS[random.below(OPTIONS.len())];
                    Case { dims: &[n, classes], dtype, memory, target, target_memory: Contiguous, options }
                        .check(&device, &mut random)?;
                }
            }
        }
    }
    Ok(())
}

/// Every layout of logits with every layout of targets.
#[test]
fn layouts() -> Result<()> {
    let shapes: [(&[usize], &[Memory]); 7] = [
        (&[6], &[Contiguous, Odd, Window(0), Repeated(0)]),
        (&[9, 5], &[Contiguous, Odd, Window(0), Window(1), Swapped(0, 1), Repeated(0), Repeated(1)]),
        (&[3, 70], &[Contiguous, Odd, Window(0), Window(1), Swapped(0, 1), Repeated(0), Repeated(1)]),
        (
            &[4, 6, 5],
            &[Contiguous, Odd, Window(0), Window(1), Window(2), Swapped(1, 2), Swapped(0, 2), Repeated(2), Repeated(0)],
        ),
        (&[2, 67, 3], &[Contiguous, Window(2), Swapped(1, 2), Swapped(0, 1), Repeated(1)]),
        // windows of inner axes: their strides do not merge
        (&[2, 3, 4, 5], &[Contiguous, Window(3), Window(2), Swapped(1, 3), Swapped(2, 3), Swapped(0, 3), Repeated(2)]),
        (&[2, 66, 2, 3], &[Window(3), Swapped(1, 3), Swapped(1, 2)]),
    ];
    for device in devices() {
        let mut random = Random::new(3);
        for (dims, memories) in shapes {
            for &memory in memories {
                for &target_memory in memories {
                    let dtype = random.pick(&FLOATS);
                    let target = Kind::Probabilities(random.pick(&FLOATS), target_memory);
                    let options = random.pick(&OPTIONS);
                    Case { dims, dtype, memory, target, target_memory: Contiguous, options }
                        .check(&device, &mut random)?;
                }
                let rank = dims.len() - 1;
                let mut target_memories = vec![Contiguous, Odd];
                target_memories.extend((0..rank).flat_map(|axis| [Window(axis), Repeated(axis)]));
                target_memories.extend((1..rank).map(|axis| Swapped(0, axis)));
                for target_memory in target_memories {
                    let dtype = random.pick(&FLOATS);
                    let options = random.pick(&OPTIONS);
                    let target = Kind::Classes(random.pick(&INDICES));
                    Case { dims, dtype, memory, target, target_memory, options }.check(&device, &mut random)?;
                }
            }
        }
    }
    Ok(())
}

/// A few rows that are split among threads, and rows of one class over a long inner axis. On the CPU alone: a device in
/// software takes too long.
#[test]
fn long_rows() -> Result<()> {
    let mut random = Random::new(4);
    for dtype in FLOATS {
        for (dims, options) in
            [(&[1, 100_000][..], OPTIONS[0]), (&[3, 20_000], OPTIONS[11]), (&[1, 5, 9000], OPTIONS[4])]
        {
            for target in [Kind::Classes(DType::I64), Kind::Probabilities(DType::F32, Contiguous)] {
                Case { dims, dtype, memory: Odd, target, target_memory: Contiguous, options }
                    .check(&Device::Cpu, &mut random)?;
            }
        }
    }
    Ok(())
}

/// Class indices with any strides give the bits of contiguous ones, on every way to a loss.
#[test]
fn class_indices_of_any_layout() -> Result<()> {
    type View = fn(&Tensor) -> Result<Tensor>;
    // what is stored, and the view of it with the rows' shape
    let layouts: [(&[usize], View); 9] = [
        (&[7, 2], |t| t.narrow(1, 1, 1)?.squeeze(1)),
        (&[1], |t| t.broadcast_as(5)),
        (&[5, 3], |t| t.t()),
        (&[4, 6], |t| t.narrow(1, 1, 5)),
        (&[4, 3, 2], |t| t.permute((2, 1, 0))),
        (&[4, 3, 2], |t| t.permute((1, 2, 0))),
        (&[4, 3, 6], |t| t.narrow(2, 1, 4)?.narrow(0, 1, 3)?.transpose(0, 1)),
        (&[2, 1, 3], |t| t.broadcast_as((2, 4, 3))),
        (&[3, 2, 2, 5], |t| t.permute((3, 1, 0, 2))),
    ];
    let classes = 9;
    for device in devices() {
        let mut random = Random::new(17);
        for (stored, view) in layouts {
            let stored_classes = random.classes(stored.iter().product(), classes);
            for index in INDICES {
                let strided = view(&indices(&stored_classes, stored, index, &device)?)?;
                assert!(!strided.is_contiguous());
                let target: Vec<_> = values(&strided)?.iter().map(|&t| t as i64).collect();
                let contiguous = indices(&target, strided.dims(), index, &device)?;
                let mut dims = strided.dims().to_vec();
                dims.insert(1, classes);
                let logits = tensor(&random.normals(target.len() * classes, 2.0), &dims, DType::F32, &device)?;
                let logits = Var::from_tensor(&logits)?;
                let both = |what: &str, of: &dyn Fn(&Tensor) -> Result<Vec<Tensor>>| -> Result<()> {
                    for (got, want) in of(&strided)?.iter().zip(&of(&contiguous)?) {
                        assert_same_bits(&format!("{what}, {index:?} indices from {stored:?}"), got, want)?;
                    }
                    Ok(())
                };
                let loss = CrossEntropyLoss::new().with_reduction(Reduction::None).with_ignore_index(3);
                both("autograd", &|target| {
                    let loss = loss.forward(&logits, target)?;
                    let grads = loss.backward()?;
                    Ok(vec![loss, grads.get(&logits).unwrap().clone()])
                })?;
                both("loss_and_grad", &|target| {
                    let (loss, grad) =
                        CrossEntropyLoss::new().with_label_smoothing(0.1).loss_and_grad(&logits, target)?;
                    Ok(vec![loss, grad])
                })?;
                both("statistics", &|target| {
                    let statistics = loss.statistics(&logits, target)?;
                    Ok(vec![statistics.loss, statistics.correct])
                })?;
                both("nll", &|target| Ok(vec![super::losses::nll(&logits, target)?]))?;
                both("linear", &|target| {
                    let mut rows = target.dims().to_vec();
                    rows.push(1);
                    let hidden = Tensor::ones(rows, DType::F32, &device)?;
                    let weight = Tensor::arange(0f32, classes as f32, &device)?.reshape((classes, 1))?;
                    Ok(vec![candle_fused_loss::linear_cross_entropy(&hidden, &weight, target)?])
                })?;
                // the row that an error names is counted in the rows' order
                let few = logits.detach().narrow(1, 0, 1)?;
                let check = CrossEntropyLoss::new().with_target_check(true);
                let bad = target.iter().position(|&t| t != 0);
                let error = check.forward(&few, &strided).err().map(|e| e.to_string());
                let expected = bad.map(|row| format!("target {} at row {row} ", target[row]));
                match (&error, &expected) {
                    (Some(error), Some(expected)) => assert!(error.contains(expected), "{error}: {expected}"),
                    _ => assert_eq!(error, expected),
                }
            }
        }
    }
    Ok(())
}
