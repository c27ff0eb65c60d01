//! What is trained: the data as tensors, the loss, the size of the network, and how accurate it has to get.

use anyhow::{Result, bail};
use candle_core::{D, DType, Device, Tensor};

use crate::data::{self, Sample, Samples};
use crate::losses::{Implementation, Loss};
use crate::options::TaskName;

pub struct Task {
    pub name: &'static str,
    /// The loss's field name, for the picture.
    pub loss_name: &'static str,
    pub loss: fn(Implementation) -> Loss,
    /// Share of right answers, from logits and target.
    pub accuracy: fn(&Tensor, &Tensor) -> candle_core::Result<f32>,
    /// Held-out accuracy below which the run fails.
    pub threshold: f32,
    pub train: Split,
    pub held_out: Split,
    pub outputs: usize,
    pub hidden: usize,
    pub epochs: usize,
    pub batch: usize,
    pub learning_rate: f64,
}

pub struct Split {
    pub features: Tensor,
    pub target: Tensor,
}

impl Split {
    pub fn rows(&self) -> candle_core::Result<usize> {
        self.features.dim(0)
    }
}

pub fn load(name: TaskName, device: &Device) -> Result<Task> {
    match name {
        TaskName::Digits => digits(device),
        TaskName::Cancer => cancer(device),
        TaskName::Attributes => attributes(device),
        TaskName::NanDemo | TaskName::F16Demo | TaskName::All => bail!("{name:?} is not a single task"),
    }
}

fn digits(device: &Device) -> Result<Task> {
    let samples = digit_images()?;
    let target = |rows: &[Sample]| {
        let labels: Vec<u32> = rows.iter().map(|row| row.label as u32).collect();
        Tensor::from_vec(labels, rows.len(), device)
    };
    Ok(Task {
        name: "digits",
        loss_name: "cross-entropy",
        loss: Implementation::digits,
        accuracy: class_accuracy,
        threshold: 0.97,
        train: split(&samples.train, target, device)?,
        held_out: split(&samples.held_out, target, device)?,
        outputs: 10,
        hidden: 512,
        epochs: 40,
        batch: 64,
        learning_rate: 4e-3,
    })
}

pub fn cancer(device: &Device) -> Result<Task> {
    let mut samples = data::load("breast_cancer.csv")?;
    data::standardise(&mut samples);
    let target = |rows: &[Sample]| {
        let labels: Vec<f32> = rows.iter().map(|row| row.label).collect();
        Tensor::from_vec(labels, (rows.len(), 1), device)
    };
    Ok(Task {
        name: "cancer",
        loss_name: "binary cross-entropy with logits",
        loss: Implementation::cancer,
        accuracy: label_accuracy,
        threshold: 0.95,
        train: split(&samples.train, target, device)?,
        held_out: split(&samples.held_out, target, device)?,
        outputs: 1,
        hidden: 32,
        epochs: 40,
        batch: 32,
        learning_rate: 1e-3,
    })
}

/// Whether a digit is even, is prime, is at least five, has a closed loop, has straight strokes only.
const ATTRIBUTES: [[f32; 5]; 10] = [
    [1., 0., 0., 1., 0.],
    [0., 0., 0., 0., 1.],
    [1., 1., 0., 0., 0.],
    [0., 1., 0., 0., 0.],
    [1., 0., 0., 0., 1.],
    [0., 1., 1., 0., 0.],
    [1., 0., 1., 1., 0.],
    [0., 1., 1., 0., 1.],
    [1., 0., 1., 1., 0.],
    [0., 0., 1., 1., 0.],
];

fn attributes(device: &Device) -> Result<Task> {
    let samples = digit_images()?;
    let target = |rows: &[Sample]| {
        let labels: Vec<f32> = rows.iter().flat_map(|row| ATTRIBUTES[row.label as usize]).collect();
        Tensor::from_vec(labels, (rows.len(), ATTRIBUTES[0].len()), device)
    };
    Ok(Task {
        name: "attributes",
        loss_name: "multi-label soft margin",
        loss: Implementation::attributes,
        accuracy: label_accuracy,
        threshold: 0.97,
        train: split(&samples.train, target, device)?,
        held_out: split(&samples.held_out, target, device)?,
        outputs: ATTRIBUTES[0].len(),
        hidden: 256,
        epochs: 40,
        batch: 64,
        learning_rate: 2e-3,
    })
}

/// The images with pixels in [0, 1] and labels known to be 0 to 9.
pub fn digit_images() -> Result<Samples> {
    let mut samples = data::load("digits.csv")?;
    for row in samples.train.iter_mut().chain(&mut samples.held_out) {
        if !(0. ..10.).contains(&row.label) {
            bail!("digits.csv: {} is no digit", row.label);
        }
        row.features.iter_mut().for_each(|pixel| *pixel /= 16.);
    }
    Ok(samples)
}

fn split(rows: &[Sample], target: impl Fn(&[Sample]) -> candle_core::Result<Tensor>, device: &Device) -> Result<Split> {
    let columns = rows.first().map_or(0, |row| row.features.len());
    let features: Vec<f32> = rows.iter().flat_map(|row| row.features.clone()).collect();
    Ok(Split { features: Tensor::from_vec(features, (rows.len(), columns), device)?, target: target(rows)? })
}

/// Share of rows whose largest logit is at the target.
fn class_accuracy(logits: &Tensor, target: &Tensor) -> candle_core::Result<f32> {
    let right = logits.argmax(D::Minus1)?.eq(target)?;
    right.to_dtype(DType::F32)?.mean_all()?.to_scalar()
}

/// Share of yes-or-no answers that are right; a NaN logit answers no.
fn label_accuracy(logits: &Tensor, target: &Tensor) -> candle_core::Result<f32> {
    let right = logits.gt(0f32)?.eq(&target.gt(0.5f32)?)?;
    right.to_dtype(DType::F32)?.mean_all()?.to_scalar()
}
