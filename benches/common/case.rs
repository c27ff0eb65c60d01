//! The cases: which loss of which shape and dtype, and the bytes that it has to move.

use candle_core::DType;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    CrossEntropy,
    /// Cross-entropy with a probability for each class as the target.
    CrossEntropyProbabilities,
    Nll,
    LogSoftmax,
    Bce,
    BceWithLogits,
    MultiLabel,
    Focal,
}

const LOSSES: [Loss; 8] = [
    Loss::CrossEntropy,
    Loss::BceWithLogits,
    Loss::LogSoftmax,
    Loss::Nll,
    Loss::CrossEntropyProbabilities,
    Loss::Focal,
    Loss::Bce,
    Loss::MultiLabel,
];

impl Loss {
    pub fn name(self) -> &'static str {
        match self {
            Loss::CrossEntropy => "cross_entropy",
            Loss::CrossEntropyProbabilities => "cross_entropy_probabilities",
            Loss::Nll => "nll",
            Loss::LogSoftmax => "log_softmax",
            Loss::Bce => "binary_cross_entropy",
            Loss::BceWithLogits => "binary_cross_entropy_with_logits",
            Loss::MultiLabel => "multi_label_soft_margin",
            Loss::Focal => "sigmoid_focal",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    Forward,
    /// The loss and `backward()`.
    ForwardBackward,
    LossAndGrad,
    LossAndGradInplace,
    /// What candle's `backward()` does with each gradient that an operation returns, and nothing else: zeros, and a sum.
    Accumulate,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::ForwardBackward => "forward+backward",
            Pass::LossAndGrad => "loss_and_grad",
            Pass::LossAndGradInplace => "loss_and_grad_inplace",
            Pass::Accumulate => "accumulate",
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

/// What is compared in one interleaved series: everything that computes a loss, or everything that computes its gradient too.
pub const FORWARD: [(Implementation, Pass); 3] = [
    (Implementation::Fused, Pass::Forward),
    (Implementation::Unfused, Pass::Forward),
    (Implementation::Candle, Pass::Forward),
];
pub const GRADIENT: [(Implementation, Pass); 6] = [
    (Implementation::Fused, Pass::LossAndGrad),
    (Implementation::Fused, Pass::LossAndGradInplace),
    (Implementation::Fused, Pass::ForwardBackward),
    (Implementation::Unfused, Pass::ForwardBackward),
    (Implementation::Candle, Pass::ForwardBackward),
    (Implementation::Candle, Pass::Accumulate),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub loss: Loss,
    pub dtype: DType,
    pub rows: usize,
    pub classes: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}/{}", self.loss.name(), self.dtype.as_str(), self.shape())
    }
}

impl Case {
    pub fn shape(&self) -> String {
        format!("{}x{}", self.rows, self.classes)
    }

    pub fn elements(&self) -> usize {
        self.rows * self.classes
    }

    /// The same case with so few numbers that anything can compute them; an odd number of classes stays odd.
    #[allow(dead_code)]
    pub fn shrunk(self) -> Self {
        Case { rows: self.rows.min(2), classes: self.classes.min(512 | self.classes & 1), ..self }
    }

    pub fn input_bytes(&self) -> usize {
        self.elements() * self.dtype.size_in_bytes()
    }

    /// The fewest bytes a pass can move, and how they are counted: E is the logits' bytes, N the rows. `backward()` reads
    /// everything a second time, because the forward has ended. Losses and row statistics are left out; nothing is granted
    /// to what candle's autograd adds.
    pub fn bytes(&self, pass: Pass) -> (usize, &'static str) {
        let e = self.input_bytes();
        let index = self.rows * size_of::<u32>();
        let picked = self.rows * self.dtype.size_in_bytes();
        match (self.loss, pass) {
            (_, Pass::Accumulate) => (4 * e, "4E"),
            (Loss::CrossEntropy, Pass::Forward) => (e + index, "E+4N"),
            (Loss::CrossEntropy, Pass::ForwardBackward) => (3 * e + 2 * index, "3E+8N"),
            (Loss::CrossEntropy, _) => (2 * e + index, "2E+4N"),
            (Loss::Nll, Pass::Forward) => (picked + index, "E/V+4N"),
            (Loss::Nll, Pass::ForwardBackward) => (e + picked + 2 * index, "E+E/V+8N"),
            (Loss::Nll, _) => (e + picked + index, "E+E/V+4N"),
            (Loss::LogSoftmax, Pass::Forward) => (2 * e, "2E"),
            (Loss::LogSoftmax, _) => (5 * e, "5E"),
            // both the logits and an equally large target
            (_, Pass::Forward) => (2 * e, "2E"),
            (_, Pass::ForwardBackward) => (5 * e, "5E"),
            (_, _) => (3 * e, "3E"),
        }
    }

    /// Whether an implementation has this pass.
    pub fn exists(&self, implementation: Implementation, pass: Pass) -> bool {
        let in_candle = matches!(self.loss, Loss::CrossEntropy | Loss::Nll | Loss::LogSoftmax | Loss::BceWithLogits);
        match (implementation, pass) {
            (Implementation::Candle, Pass::Accumulate) => true,
            (Implementation::Candle, _) => in_candle,
            (_, Pass::LossAndGradInplace) => {
                matches!(self.loss, Loss::CrossEntropy | Loss::CrossEntropyProbabilities)
            }
            (_, Pass::LossAndGrad) => self.loss != Loss::LogSoftmax,
            _ => true,
        }
    }
}

/// What a device is asked, what matters most first; or a few small cases, to see that everything runs.
pub fn cases(cuda: bool, quick: bool) -> Vec<Case> {
    if quick {
        return quick_cases();
    }
    use Loss::*;
    let (f32, bf16, f16, f64) = (DType::F32, DType::BF16, DType::F16, DType::F64);
    let case = |loss, dtype, (rows, classes)| Case { loss, dtype, rows, classes };
    let mut cases = vec![];
    let mut add = |loss, dtypes: &[DType], shapes: &[(usize, usize)]| {
        for &shape in shapes {
            cases.extend(dtypes.iter().map(|&dtype| case(loss, dtype, shape)));
        }
    };
    if cuda {
        let large = [(4096, 32000), (8192, 128256), (16384, 50257), (65536, 1000), (32768, 256)];
        add(CrossEntropy, &[bf16], &large);
        add(CrossEntropy, &[f32], &[(4096, 32000), (65536, 1000)]);
        add(BceWithLogits, &[f32], &[(8192, 8192)]);
        add(CrossEntropy, &[bf16], &[(64, 1000), (1, 2), (32768, 1024), (32768, 4096), (16384, 16384)]);
        add(CrossEntropy, &[bf16], &[(8192, 65536), (8192, 262_144), (65536, 10), (8, 128_256)]);
        add(BceWithLogits, &[bf16], &[(8192, 8192)]);
        add(BceWithLogits, &[f32], &[(64, 1000), (1, 2)]);
        add(LogSoftmax, &[bf16], &[(4096, 32000), (65536, 1000)]);
        add(Nll, &[bf16], &[(4096, 32000), (65536, 1000)]);
        add(CrossEntropyProbabilities, &[bf16], &[(4096, 32000), (65536, 1000)]);
        for loss in [Focal, Bce, MultiLabel] {
            add(loss, &[f32], &[(8192, 8192)]);
        }
        add(CrossEntropy, &[f16, f64], &[(4096, 32000)]);
    } else {
        add(CrossEntropy, &[f32], &[(2048, 32000), (65536, 1000), (32768, 256)]);
        add(BceWithLogits, &[f32], &[(4096, 4096)]);
        add(CrossEntropy, &[f32], &[(1, 2), (64, 10), (64, 1000), (65536, 10), (4, 128_256)]);
        add(BceWithLogits, &[f32], &[(1, 2), (64, 10), (64, 1000), (1024, 1000)]);
        add(CrossEntropy, &[bf16], &[(2048, 32000), (65536, 1000), (32768, 256)]);
        // a sweep of the classes with eight million logits each
        add(CrossEntropy, &[f32], &[(1 << 22, 2), (1 << 17, 64), (1 << 15, 257), (1 << 13, 1024), (1 << 11, 4096)]);
        add(CrossEntropy, &[f32], &[(1 << 9, 16384), (166, 50257), (64, 131_072)]);
        add(BceWithLogits, &[bf16], &[(4096, 4096)]);
        for loss in [LogSoftmax, Nll, CrossEntropyProbabilities] {
            add(loss, &[f32], &[(512, 32000), (16384, 1000), (64, 1000), (1, 2)]);
        }
        for loss in [Focal, Bce, MultiLabel] {
            add(loss, &[f32], &[(2048, 2048), (64, 1000), (1, 2)]);
        }
        add(CrossEntropy, &[f16, f64], &[(512, 32000)]);
    }
    cases
}

fn quick_cases() -> Vec<Case> {
    let shapes = [(64, 10), (16, 1000)];
    let f32s = LOSSES.into_iter().flat_map(|loss| shapes.map(|shape| (loss, DType::F32, shape)));
    let bf16 = [(Loss::CrossEntropy, DType::BF16, shapes[1]), (Loss::BceWithLogits, DType::BF16, shapes[1])];
    f32s.chain(bf16).map(|(loss, dtype, (rows, classes))| Case { loss, dtype, rows, classes }).collect()
}
