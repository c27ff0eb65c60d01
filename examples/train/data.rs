//! Reads the CSV files, and divides their rows into a training and a held-out share.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::rng::Rng;

/// Every run holds out the same rows, whatever its `--seed`.
const SPLIT_SEED: u64 = 2;

/// A row's numbers, the label taken off.
pub struct Sample {
    pub features: Vec<f32>,
    pub label: f32,
}

pub struct Samples {
    pub train: Vec<Sample>,
    pub held_out: Vec<Sample>,
}

/// Reads a file of `examples/data` and holds out a fifth of its rows.
pub fn load(name: &str) -> Result<Samples> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("{} (the repository has it)", path.display()))?;
    let samples = parse(&text).with_context(|| path.display().to_string())?;

    let train_rows = samples.len() - samples.len() / 5;
    let order = Rng::new(SPLIT_SEED).permutation(samples.len());
    let mut placed: Vec<(u32, Sample)> = order.into_iter().zip(samples).collect();
    placed.sort_by_key(|(place, _)| *place);
    let mut train: Vec<Sample> = placed.into_iter().map(|(_, sample)| sample).collect();
    let held_out = train.split_off(train_rows);
    Ok(Samples { train, held_out })
}

/// A header line, then rows of numbers whose last is the label.
fn parse(text: &str) -> Result<Vec<Sample>> {
    let mut lines = text.lines().enumerate();
    let columns = match lines.next() {
        Some((_, header)) => header.split(',').count(),
        None => bail!("the file is empty"),
    };
    lines
        .map(|(index, line)| {
            let mut features = line
                .split(',')
                .map(str::parse)
                .collect::<Result<Vec<f32>, _>>()
                .with_context(|| format!("line {}", index + 1))?;
            if features.len() != columns {
                bail!("line {}: {} of {columns} columns", index + 1, features.len());
            }
            let label = features.pop().context("no columns")?;
            Ok(Sample { features, label })
        })
        .collect()
}

/// Shifts and scales every feature to mean 0 and variance 1 over the training rows.
pub fn standardise(samples: &mut Samples) {
    let columns = samples.train.first().map_or(0, |row| row.features.len());
    let rows = samples.train.len() as f64;
    for column in 0..columns {
        let values = || samples.train.iter().map(|row| f64::from(row.features[column]));
        let mean = values().sum::<f64>() / rows;
        let variance = values().map(|x| (x - mean).powi(2)).sum::<f64>() / rows;
        let scale = if variance > 0. { variance.sqrt().recip() } else { 0. };
        for row in samples.train.iter_mut().chain(&mut samples.held_out) {
            row.features[column] = ((f64::from(row.features[column]) - mean) * scale) as f32;
        }
    }
}
