//! The cases: which loss of which shape and dtype, and the least work that each of its passes is.

use candle_core::DType;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    CrossEntropy,
    /// Cross-entropy of logits that are soft-capped at [`SOFTCAP`].
    CrossEntropySoftcap,
    /// Cross-entropy with [`LABEL_SMOOTHING`].
    CrossEntropySmoothing,
    /// Cross-entropy with a probability for each class as the target.
    CrossEntropyProbabilities,
    Nll,
    LogSoftmax,
    Bce,
    BceWithLogits,
    MultiLabel,
    Focal,
    /// Cross-entropy of a linear layer's output.
    LinearCrossEntropy,
}

/// Gemma's.
pub const SOFTCAP: f64 = 30.0;
/// ImageNet's.
pub const LABEL_SMOOTHING: f64 = 0.1;

impl Loss {
    pub fn name(self) -> &'static str {
        match self {
            Loss::CrossEntropy => "cross_entropy",
            Loss::CrossEntropySoftcap => "cross_entropy_softcap",
            Loss::CrossEntropySmoothing => "cross_entropy_smoothing",
            Loss::CrossEntropyProbabilities => "cross_entropy_probabilities",
            Loss::Nll => "nll",
            Loss::LogSoftmax => "log_softmax",
            Loss::Bce => "binary_cross_entropy",
            Loss::BceWithLogits => "binary_cross_entropy_with_logits",
            Loss::MultiLabel => "multi_label_soft_margin",
            Loss::Focal => "sigmoid_focal",
            Loss::LinearCrossEntropy => "linear_cross_entropy",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// The gradient from a loss that is there, without what candle's `backward()` adds.
    Backward,
    /// The gradient of the target alone, likewise.
    TargetGradient,
    /// The loss and `backward()`.
    ForwardBackward,
    LossAndGrad,
    LossAndGradInplace,
    /// What candle's `backward()` does with each gradient that an operation returns, and nothing else: zeros, and a
    /// sum.
    Accumulate,
    /// The time that a call of the forward takes on the host, which does not wait for the device.
    HostCall,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::TargetGradient => "target_gradient",
            Pass::ForwardBackward => "forward+backward",
            Pass::LossAndGrad => "loss_and_grad",
            Pass::LossAndGradInplace => "loss_and_grad_inplace",
            Pass::Accumulate => "accumulate",
            Pass::HostCall => "host_call",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implementation {
    /// This crate's kernels.
    Fused,
    /// `candle_fused_loss::unfused`.
    Unfused,
    /// `candle_nn`.
    Candle,
}

impl Implementation {
    pub fn name(self) -> &'static str {
        match self {
            Implementation::Fused => "fused",
            Implementation::Unfused => "unfused",
            Implementation::Candle => "candle",
        }
    }
}

/// What is compared in one interleaved series: everything that computes a loss, everything that computes its gradient
/// too, and what a call costs the host.
pub const FORWARD: [(Implementation, Pass); 3] = [
    (Implementation::Fused, Pass::Forward),
    (Implementation::Unfused, Pass::Forward),
    (Implementation::Candle, Pass::Forward),
];
pub const GRADIENT: [(Implementation, Pass); 8] = [
    (Implementation::Fused, Pass::LossAndGrad),
    (Implementation::Fused, Pass::LossAndGradInplace),
    (Implementation::Fused, Pass::Backward),
    (Implementation::Fused, Pass::TargetGradient),
    (Implementation::Fused, Pass::ForwardBackward),
    (Implementation::Unfused, Pass::ForwardBackward),
    (Implementation::Candle, Pass::ForwardBackward),
    (Implementation::Candle, Pass::Accumulate),
];
#[allow(dead_code)]
pub const HOST: [(Implementation, Pass); 2] =
    [(Implementation::Fused, Pass::HostCall), (Implementation::Candle, Pass::HostCall)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Rows of adjacent classes.
    Rows { rows: usize, classes: usize },
    /// Sequences of one position more, which has no target: the logits of a language model that predicts the next word.
    /// Between two sequences lies a row that is not read, but the gradient has no such gaps. So where a row's length is
    /// no multiple of 16 bytes, logits and gradient begin at different places of a word in most sequences.
    Shifted { batch: usize, length: usize, classes: usize },
    /// A class for each pixel, the classes an image apart.
    Image { images: usize, classes: usize, height: usize, width: usize },
    /// A linear layer's input.
    Linear { rows: usize, features: usize, classes: usize },
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match *self {
            Shape::Rows { rows, classes } => write!(f, "{rows}x{classes}"),
            Shape::Shifted { batch, length, classes } => write!(f, "{batch}x{length}+1x{classes}"),
            Shape::Image { images, classes, height, width } => write!(f, "{images}x{classes}x{height}x{width}"),
            Shape::Linear { rows, features, classes } => write!(f, "{rows}x{features}x{classes}"),
        }
    }
}

impl Shape {
    /// Its name to `peers.py`, and its numbers.
    #[allow(dead_code)]
    pub fn layout(&self) -> (&'static str, Vec<usize>) {
        match *self {
            Shape::Rows { rows, classes } => ("rows", vec![rows, classes]),
            Shape::Shifted { batch, length, classes } => ("shifted", vec![batch, length, classes]),
            Shape::Image { images, classes, height, width } => ("image", vec![images, classes, height, width]),
            Shape::Linear { rows, features, classes } => ("linear", vec![rows, features, classes]),
        }
    }

    pub fn rows(&self) -> usize {
        match *self {
            Shape::Rows { rows, .. } | Shape::Linear { rows, .. } => rows,
            Shape::Shifted { batch, length, .. } => batch * length,
            Shape::Image { images, height, width, .. } => images * height * width,
        }
    }

    pub fn classes(&self) -> usize {
        match *self {
            Shape::Rows { classes, .. }
            | Shape::Shifted { classes, .. }
            | Shape::Image { classes, .. }
            | Shape::Linear { classes, .. } => classes,
        }
    }

    /// The same with so few numbers that anything can compute them; an odd number of classes stays odd.
    fn shrunk(self) -> Self {
        let few = |classes: usize| classes.min(512 | classes & 1);
        match self {
            Shape::Rows { rows, classes } => Shape::Rows { rows: rows.min(2), classes: few(classes) },
            Shape::Shifted { classes, .. } => Shape::Shifted { batch: 2, length: 1, classes: few(classes) },
            Shape::Image { classes, .. } => Shape::Image { images: 1, classes, height: 4, width: 4 },
            Shape::Linear { classes, .. } => Shape::Linear { rows: 8, features: 16, classes: 64 | classes & 1 },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub loss: Loss,
    pub dtype: DType,
    pub shape: Shape,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}/{}", self.loss.name(), self.dtype.as_str(), self.shape)
    }
}

/// The least work of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Minimum {
    pub amount: usize,
    /// How it is counted.
    #[allow(dead_code)]
    pub formula: &'static str,
    pub unit: Unit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Of memory traffic: compared with the rate of a copy.
    Bytes,
    /// Floating-point operations: compared with the rate of a matrix product.
    Operations,
}

impl Case {
    pub fn elements(&self) -> usize {
        self.shape.rows() * self.shape.classes()
    }

    #[allow(dead_code)]
    pub fn shrunk(self) -> Self {
        Case { shape: self.shape.shrunk(), ..self }
    }

    /// The bytes of one pass over the logits, or over a linear layer's input and weight.
    pub fn input_bytes(&self) -> usize {
        let elements = match self.shape {
            Shape::Linear { rows, features, classes } => (rows + classes) * features,
            _ => self.elements(),
        };
        elements * self.dtype.size_in_bytes()
    }

    /// The least that a pass has to do. E is the logits' bytes, N the rows. `backward()` reads everything a second
    /// time, because the forward has ended. Losses and row statistics are left out; nothing is granted to what candle's
    /// autograd adds.
    pub fn minimum(&self, pass: Pass) -> Minimum {
        if let Shape::Linear { rows, features, classes } = self.shape {
            let product = 2 * rows * features * classes;
            let (amount, formula) = match pass {
                Pass::Forward | Pass::HostCall => (product, "2NDV flop"),
                Pass::Backward => (2 * product, "4NDV flop"),
                _ => (3 * product, "6NDV flop"),
            };
            return Minimum { amount, formula, unit: Unit::Operations };
        }
        let e = self.input_bytes();
        let index = self.shape.rows() * size_of::<u32>();
        let picked = self.shape.rows() * self.dtype.size_in_bytes();
        let of_rows = matches!(self.loss, Loss::CrossEntropy | Loss::CrossEntropySoftcap | Loss::CrossEntropySmoothing);
        let (amount, formula) = match (self.loss, pass) {
            (_, Pass::Accumulate) => (4 * e, "4E"),
            (_, Pass::Forward | Pass::HostCall) if of_rows => (e + index, "E+4N"),
            (_, Pass::ForwardBackward) if of_rows => (3 * e + 2 * index, "3E+8N"),
            (_, _) if of_rows => (2 * e + index, "2E+4N"),
            (Loss::Nll, Pass::Forward | Pass::HostCall) => (picked + index, "E/V+4N"),
            (Loss::Nll, Pass::Backward) => (e + index, "E+4N"),
            (Loss::Nll, Pass::ForwardBackward) => (e + picked + 2 * index, "E+E/V+8N"),
            (Loss::Nll, _) => (e + picked + index, "E+E/V+4N"),
            // what a target's gradient is made of are the logits
            (_, Pass::TargetGradient) => (2 * e, "2E"),
            // both the logits and an equally large target, or an equally large result
            (_, Pass::Forward | Pass::HostCall) => (2 * e, "2E"),
            (_, Pass::ForwardBackward) => (5 * e, "5E"),
            (_, _) => (3 * e, "3E"),
        };
        Minimum { amount, formula, unit: Unit::Bytes }
    }

    /// Whether an implementation has this pass, and a device can time it.
    pub fn exists(&self, implementation: Implementation, pass: Pass, cuda: bool) -> bool {
        let in_candle = match self.loss {
            Loss::CrossEntropy | Loss::LinearCrossEntropy => !matches!(self.shape, Shape::Image { .. }),
            Loss::Nll | Loss::LogSoftmax | Loss::BceWithLogits => true,
            _ => false,
        };
        let of_rows = matches!(self.shape, Shape::Rows { .. });
        match (implementation, pass) {
            (Implementation::Candle, Pass::Accumulate) => of_rows,
            (Implementation::Candle, _) => in_candle,
            // on the CPU the difference of two times is one of how the allocator was found
            (_, Pass::Backward) => cuda && self.loss != Loss::LinearCrossEntropy,
            (_, Pass::TargetGradient) => cuda && self.loss == Loss::CrossEntropyProbabilities,
            (_, Pass::LossAndGradInplace) => {
                let has = [
                    Loss::CrossEntropy,
                    Loss::CrossEntropySoftcap,
                    Loss::CrossEntropySmoothing,
                    Loss::CrossEntropyProbabilities,
                ];
                of_rows && has.contains(&self.loss)
            }
            (_, Pass::LossAndGrad) => self.loss != Loss::LogSoftmax,
            _ => true,
        }
    }
}

pub const fn rows(loss: Loss, dtype: DType, rows: usize, classes: usize) -> Case {
    Case { loss, dtype, shape: Shape::Rows { rows, classes } }
}

pub const fn linear(dtype: DType, rows: usize, features: usize, classes: usize) -> Case {
    Case { loss: Loss::LinearCrossEntropy, dtype, shape: Shape::Linear { rows, features, classes } }
}

pub const fn shifted(dtype: DType, batch: usize, length: usize, classes: usize) -> Case {
    Case { loss: Loss::CrossEntropy, dtype, shape: Shape::Shifted { batch, length, classes } }
}

pub const fn image(loss: Loss, dtype: DType, images: usize, classes: usize, side: usize) -> Case {
    Case { loss, dtype, shape: Shape::Image { images, classes, height: side, width: side } }
}

/// The small problem whose calls are timed on the host.
pub const SMALL: Case = rows(Loss::CrossEntropy, DType::BF16, 64, 1000);

/// What a device is asked, what matters most first; or a few small cases, to see that everything runs.
pub fn cases(cuda: bool, quick: bool) -> Vec<Case> {
    match (quick, cuda) {
        (true, _) => quick_cases(),
        (false, true) => cuda_cases(),
        (false, false) => cpu_cases(),
    }
}

fn quick_cases() -> Vec<Case> {
    use Loss::*;
    let losses = [CrossEntropy, BceWithLogits, LogSoftmax, Nll, CrossEntropyProbabilities, Focal, Bce, MultiLabel];
    let mut cases: Vec<Case> = losses
        .into_iter()
        .flat_map(|loss| [rows(loss, DType::F32, 64, 10), rows(loss, DType::F32, 16, 1000)])
        .collect();
    cases.extend([
        SMALL,
        rows(BceWithLogits, DType::BF16, 16, 1000),
        rows(CrossEntropySoftcap, DType::BF16, 16, 1000),
        rows(CrossEntropySmoothing, DType::BF16, 16, 1000),
        shifted(DType::BF16, 2, 15, 257),
        image(CrossEntropy, DType::BF16, 2, 21, 16),
        image(CrossEntropyProbabilities, DType::BF16, 2, 21, 16),
        image(LogSoftmax, DType::BF16, 2, 21, 16),
        linear(DType::BF16, 64, 64, 1000),
    ]);
    cases
}

fn cuda_cases() -> Vec<Case> {
    use DType::{BF16, F16, F32};
    use Loss::*;
    let mut cases = vec![
        rows(CrossEntropy, BF16, 8192, 128_256),
        rows(CrossEntropy, BF16, 65536, 1000),
        linear(BF16, 8192, 4096, 128_256),
        rows(CrossEntropy, BF16, 4096, 32000),
        rows(CrossEntropy, BF16, 16384, 50257),
        shifted(BF16, 8, 2047, 50257),
        // as large, with rows that all begin on 16 bytes: what the place of a row costs is the difference
        shifted(BF16, 8, 2047, 50256),
        rows(CrossEntropySoftcap, BF16, 4096, 256_000),
        rows(BceWithLogits, F32, 8192, 8192),
        rows(CrossEntropy, BF16, 32768, 256),
        SMALL,
        rows(LogSoftmax, BF16, 4096, 32000),
        image(CrossEntropy, BF16, 16, 21, 512),
        rows(CrossEntropyProbabilities, BF16, 4096, 32000),
        linear(BF16, 8192, 4096, 50257),
        rows(BceWithLogits, BF16, 8192, 8192),
        rows(LogSoftmax, BF16, 8192, 128_256),
        rows(LogSoftmax, BF16, 65536, 1000),
        rows(CrossEntropySmoothing, BF16, 65536, 1000),
        rows(CrossEntropy, BF16, 32768, 4096),
        rows(CrossEntropy, BF16, 16384, 16384),
        rows(CrossEntropy, BF16, 8192, 65536),
        rows(CrossEntropy, F32, 4096, 32000),
        rows(CrossEntropy, BF16, 32768, 1024),
        rows(CrossEntropy, F32, 65536, 1000),
    ];
    cases.extend([(8, 128_256), (65536, 10)].map(|(n, v)| rows(CrossEntropy, BF16, n, v)));
    cases.push(rows(Nll, BF16, 65536, 1000));
    cases.extend([Focal, Bce].map(|loss| rows(loss, F32, 8192, 8192)));
    cases.push(rows(CrossEntropy, F16, 4096, 32000));
    // as many logits as an index of 31 bits has room for
    cases.push(rows(CrossEntropy, BF16, 8192, 262_144));
    cases
}

fn cpu_cases() -> Vec<Case> {
    use DType::{BF16, F16, F32, F64};
    use Loss::*;
    let mut cases = vec![];
    let mut add = |loss, dtypes: &[DType], shapes: &[(usize, usize)]| {
        for &(n, v) in shapes {
            cases.extend(dtypes.iter().map(|&dtype| rows(loss, dtype, n, v)));
        }
    };
    add(CrossEntropy, &[F32], &[(2048, 32000), (65536, 1000), (32768, 256)]);
    add(BceWithLogits, &[F32], &[(4096, 4096)]);
    add(CrossEntropy, &[F32], &[(1, 2), (64, 10), (64, 1000), (65536, 10), (4, 128_256)]);
    add(BceWithLogits, &[F32], &[(1, 2), (64, 10), (64, 1000), (1024, 1000)]);
    add(CrossEntropy, &[BF16], &[(2048, 32000), (65536, 1000), (32768, 256)]);
    // a sweep of the classes with eight million logits each
    add(CrossEntropy, &[F32], &[(1 << 22, 2), (1 << 17, 64), (1 << 15, 257), (1 << 13, 1024), (1 << 11, 4096)]);
    add(CrossEntropy, &[F32], &[(1 << 9, 16384), (166, 50257), (64, 131_072)]);
    add(BceWithLogits, &[BF16], &[(4096, 4096)]);
    for loss in [LogSoftmax, Nll, CrossEntropyProbabilities] {
        add(loss, &[F32], &[(512, 32000), (16384, 1000), (64, 1000), (1, 2)]);
    }
    for loss in [Focal, Bce, MultiLabel] {
        add(loss, &[F32], &[(2048, 2048), (64, 1000), (1, 2)]);
    }
    add(CrossEntropy, &[F16, F64], &[(512, 32000)]);
    // images, the classes apart and side by side
    for loss in [CrossEntropy, CrossEntropyProbabilities, LogSoftmax] {
        cases.extend([F32, BF16].map(|dtype| image(loss, dtype, 4, 21, 160)));
        cases.extend([F32, BF16].map(|dtype| rows(loss, dtype, 4 * 160 * 160, 21)));
    }
    cases
}
