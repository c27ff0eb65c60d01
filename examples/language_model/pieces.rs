//! Byte-pair encoding (Sennrich, Haddow and Birch, 2016): words as a few pieces each, learned from a text.
//!
//! The first 256 pieces are the bytes. Each further one joins the two that stand next to each other most often. A
//! piece never reaches beyond a word and the space before it.

use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};

type Pair = (u32, u32);

pub struct Pieces {
    /// What each piece spells.
    bytes: Vec<Vec<u8>>,
    /// The piece that a pair is joined to.
    joined: HashMap<Pair, u32>,
}

/// A word with the space before it, a run of other marks with the space before them, or a line's end.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let mut chars = rest.char_indices();
        let (_, first) = chars.next()?;
        let (_, lead) = if first == ' ' { chars.clone().next().unwrap_or((1, '\n')) } else { (0, first) };
        let end = match (first, lead) {
            ('\n', _) | (' ', '\n' | ' ') => first.len_utf8(),
            _ => {
                let same = |c: char| !c.is_whitespace() && c.is_alphanumeric() == lead.is_alphanumeric();
                let skip = if first == ' ' { 1 } else { 0 };
                rest[skip..].find(|c| !same(c)).map_or(rest.len(), |at| skip + at)
            }
        };
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word)
    })
}

fn pairs(pieces: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    pieces.windows(2).map(|pair| (pair[0], pair[1]))
}

fn join(pieces: &[u32], pair: Pair, joined: u32) -> Vec<u32> {
    let mut result = Vec::with_capacity(pieces.len());
    let mut at = 0;
    while at < pieces.len() {
        if at + 1 < pieces.len() && (pieces[at], pieces[at + 1]) == pair {
            result.push(joined);
            at += 2;
        } else {
            result.push(pieces[at]);
            at += 1;
        }
    }
    result
}

impl Pieces {
    pub fn learn(text: &str, vocabulary: usize) -> Self {
        let mut counts = BTreeMap::<&str, i64>::new();
        words(text).for_each(|word| *counts.entry(word).or_default() += 1);
        let mut spelled: Vec<(Vec<u32>, i64)> =
            counts.into_iter().map(|(word, count)| (word.bytes().map(u32::from).collect(), count)).collect();
        let mut frequency = HashMap::<Pair, i64>::new();
        let mut places = HashMap::<Pair, HashSet<usize>>::new();
        for (index, (pieces, count)) in spelled.iter().enumerate() {
            for pair in pairs(pieces) {
                *frequency.entry(pair).or_default() += count;
                places.entry(pair).or_default().insert(index);
            }
        }
        // entries are not removed when a frequency changes, but recognised as old when they come up
        let mut queue: BinaryHeap<(i64, Pair)> = frequency.iter().map(|(&pair, &count)| (count, pair)).collect();
        let mut learned = Pieces { bytes: (0..=255).map(|byte| vec![byte]).collect(), joined: HashMap::new() };
        while learned.bytes.len() < vocabulary {
            let Some((count, pair)) = queue.pop() else { break };
            if frequency.get(&pair) != Some(&count) || count < 1 {
                continue;
            }
            let new = learned.add(pair);
            let mut changed = HashSet::new();
            for index in places.remove(&pair).unwrap_or_default() {
                let (pieces, count) = &mut spelled[index];
                let after = join(pieces, pair, new);
                for pair in pairs(pieces) {
                    *frequency.entry(pair).or_default() -= *count;
                    changed.insert(pair);
                }
                for pair in pairs(&after) {
                    *frequency.entry(pair).or_default() += *count;
                    places.entry(pair).or_default().insert(index);
                    changed.insert(pair);
                }
                *pieces = after;
            }
            queue.extend(changed.into_iter().map(|pair| (frequency[&pair], pair)));
        }
        learned
    }

    fn add(&mut self, pair: Pair) -> u32 {
        let new = self.bytes.len() as u32;
        let spelled = [&self.bytes[pair.0 as usize][..], &self.bytes[pair.1 as usize]].concat();
        self.bytes.push(spelled);
        self.joined.insert(pair, new);
        new
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut known = HashMap::<&str, Vec<u32>>::new();
        words(text).flat_map(|word| known.entry(word).or_insert_with(|| self.encode_word(word)).clone()).collect()
    }

    fn encode_word(&self, word: &str) -> Vec<u32> {
        let mut pieces: Vec<u32> = word.bytes().map(u32::from).collect();
        // what was learned first is joined first
        while let Some((new, pair)) = pairs(&pieces).filter_map(|p| self.joined.get(&p).map(|&new| (new, p))).min() {
            pieces = join(&pieces, pair, new);
        }
        pieces
    }

    pub fn decode(&self, pieces: &[u32]) -> String {
        let bytes: Vec<u8> = pieces.iter().flat_map(|&piece| self.bytes[piece as usize].iter().copied()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
