//! Lets the model write.

use anyhow::{Context, Result};
use candle_core::{D, Tensor};
use candle_nn::ops::softmax;

use crate::data::Corpus;
use crate::model::Model;
use crate::options::Options;
use crate::rng::Rng;

const TEMPERATURE: f64 = 0.7;

/// Continues a text, piece by piece.
pub fn text(corpus: &Corpus, model: &Model, beginning: &str, options: &Options) -> Result<String> {
    let mut rng = Rng::new(options.seed);
    let mut pieces = corpus.pieces.encode(beginning);
    for _ in 0..if options.quick { 5 } else { 80 } {
        let seen = &pieces[pieces.len().saturating_sub(model.places())..];
        let input = Tensor::new(seen, model.device())?.unsqueeze(0)?;
        let last = model.hidden(&input)?.narrow(1, seen.len() - 1, 1)?.flatten_to(1)?;
        let logits = last.matmul(&model.head().t()?)?;
        let chances = softmax(&(logits / TEMPERATURE)?, D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
        let mut left = rng.uniform() as f32;
        let next = chances.iter().position(|chance| {
            left -= chance;
            left <= 0.0
        });
        // rounding may leave a little probability beyond the last piece
        let most = || chances.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(piece, _)| piece);
        pieces.push(next.or_else(most).context("no pieces")? as u32);
    }
    Ok(corpus.pieces.decode(&pieces))
}
