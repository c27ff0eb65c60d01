//! Verses as passages of their own length, padded to the longest of their batch.
//!
//! A line of the text is a verse, or a few that belong together.

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::data::Batch;

/// Ends a verse. Pieces don't reach beyond a line's end, so that it is always the byte's own piece.
const END: u32 = b'\n' as u32;
/// The byte 0 is in no text.
const PADDING: u32 = 0;

pub fn split(text: &[u32]) -> Vec<&[u32]> {
    text.split(|&piece| piece == END).filter(|verse| !verse.is_empty()).collect()
}

/// Each verse from the end of one before it to its own end, or as far as the context reaches. What is learned at the
/// padding's places is up to the mask; no place of the verse sees them, since they come after it.
pub fn padded(verses: &[&[u32]], context: usize, device: &Device) -> Result<Batch> {
    let length = |verse: &[u32]| (verse.len() + 1).min(context);
    let longest = verses.iter().map(|verse| length(verse)).max().unwrap_or(0);
    let (mut input, mut next, mut mask) = (vec![], vec![], vec![]);
    for verse in verses {
        let padding = std::iter::repeat_n(PADDING, longest - length(verse));
        let from_start = [END].into_iter().chain(verse.iter().copied());
        let after = verse.iter().copied().chain([END]);
        input.extend(from_start.take(length(verse)).chain(padding.clone()));
        next.extend(after.take(length(verse)).chain(padding));
        mask.extend((0..longest).map(|place| u8::from(place < length(verse))));
    }
    let shape = (verses.len(), longest);
    Ok(Batch {
        input: Tensor::from_vec(input, shape, device)?,
        next: Tensor::from_vec(next, shape, device)?,
        mask: Some(Tensor::from_vec(mask, shape, device)?),
    })
}
