//! The text as pieces, and passages of it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};

use crate::pieces::Pieces;
use crate::rng::Rng;
use crate::verses;

/// Of this many chapters, one is held out.
const HELD_OUT: usize = 10;

pub struct Corpus {
    pub pieces: Pieces,
    train: Vec<u32>,
    held_out: Vec<u32>,
    /// Of the held-out text.
    pub bytes: usize,
    /// Whether a passage is a verse, instead of as many pieces as there are places.
    verses: bool,
}

/// Passages `(B, T)`, and the next piece at each of their places.
pub struct Batch {
    pub input: Tensor,
    pub next: Tensor,
    /// 1 at a passage's places, 0 at the padding's: u8. None where nothing is padded.
    pub mask: Option<Tensor>,
}

impl Batch {
    /// The passages in so many parts of about the same number of them, or one in each where there are fewer.
    pub fn split(&self, parts: usize) -> Result<Vec<Batch>> {
        let passages = self.input.dim(0)?;
        let parts = parts.min(passages);
        let first = |part: usize| part * passages / parts;
        let narrow = |part: usize| -> Result<Batch> {
            let of = |tensor: &Tensor| tensor.narrow(0, first(part), first(part + 1) - first(part));
            Ok(Batch { input: of(&self.input)?, next: of(&self.next)?, mask: self.mask.as_ref().map(of).transpose()? })
        };
        (0..parts).map(narrow).collect()
    }
}

impl Corpus {
    /// Reads the book; the pieces are learned from the training chapters alone.
    pub fn load(vocabulary: usize, verses: bool) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/king_james.txt");
        let text = fs::read_to_string(&path).with_context(|| format!("{} (the repository has it)", path.display()))?;
        let chapters = text.split_inclusive("\n\n").enumerate();
        let (held_out, train): (Vec<_>, Vec<_>) = chapters.partition(|(index, _)| index % HELD_OUT == HELD_OUT - 1);
        let joined = |chapters: Vec<(usize, &str)>| chapters.into_iter().map(|(_, text)| text).collect::<String>();
        let (train, held_out) = (joined(train), joined(held_out));
        let pieces = Pieces::learn(&train, vocabulary);
        ensure!(pieces.len() == vocabulary, "the text has {} pieces, expected {vocabulary}", pieces.len());
        let (bytes, train, held_out) = (held_out.len(), pieces.encode(&train), pieces.encode(&held_out));
        Ok(Corpus { pieces, train, held_out, bytes, verses })
    }

    pub fn sentence(&self) -> String {
        format!(
            "{} pieces of words; {} in the text to learn from, {} held out",
            self.pieces.len(),
            self.train.len(),
            self.held_out.len()
        )
    }

    pub fn batches(&self, batch: usize, context: usize) -> usize {
        match self.verses {
            true => verses::split(&self.train).len() / batch,
            false => (self.train.len() - 1) / context / batch,
        }
    }

    /// The training text once: passages in random order, cut from a random place on, or verses in random order.
    pub fn epoch(&self, batch: usize, context: usize, rng: &mut Rng, device: &Device) -> Result<Vec<Batch>> {
        let count = self.batches(batch, context);
        if self.verses {
            let verses = verses::split(&self.train);
            ensure!(count > 0, "{} verses, expected {batch} for one step", verses.len());
            let order = rng.permutation(verses.len());
            let shuffled: Vec<_> = order[..count * batch].iter().map(|&place| verses[place as usize]).collect();
            return shuffled.chunks(batch).map(|verses| verses::padded(verses, context, device)).collect();
        }
        ensure!(count > 0, "{} pieces of text, expected {} for one step", self.train.len(), batch * context + 1);
        let slack = self.train.len() - 1 - count * batch * context;
        let first = rng.permutation(slack + 1)[0] as usize;
        let order = rng.permutation(count * batch);
        let starts = order.iter().map(|&place| first + place as usize * context).collect::<Vec<_>>();
        starts.chunks(batch).map(|starts| passages(&self.train, starts, context, device)).collect()
    }

    /// The held-out text in order, without the rest that does not fill a passage.
    pub fn held_out(&self, batch: usize, context: usize, device: &Device) -> Result<Vec<Batch>> {
        if self.verses {
            let verses = verses::split(&self.held_out);
            return verses.chunks(batch).map(|verses| verses::padded(verses, context, device)).collect();
        }
        let starts: Vec<usize> = (0..(self.held_out.len() - 1) / context).map(|place| place * context).collect();
        starts.chunks(batch).map(|starts| passages(&self.held_out, starts, context, device)).collect()
    }

    /// How many bytes a held-out piece spells on average.
    pub fn bytes_per_piece(&self) -> f64 {
        self.bytes as f64 / self.held_out.len() as f64
    }
}

fn passages(text: &[u32], starts: &[usize], context: usize, device: &Device) -> Result<Batch> {
    let tensor = |shift: usize| -> Result<Tensor> {
        let pieces: Vec<u32> = starts.iter().flat_map(|&s| &text[s + shift..s + shift + context]).copied().collect();
        Ok(Tensor::from_vec(pieces, (starts.len(), context), device)?)
    };
    Ok(Batch { input: tensor(0)?, next: tensor(1)?, mask: None })
}
