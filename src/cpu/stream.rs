//! Stores past the caches, for results that are larger than these.
//!
//! A plain store first reads the cache line that it writes into: a pass that reads E bytes and writes E bytes moves 3
//! E. A store past the cache moves 2 E, but whoever reads the result finds it in memory only.

use super::element::Output;
use std::mem::MaybeUninit;

/// A cache line's bytes.
const LINE: usize = 64;

/// Whether the last-level cache can't hold a result of so many bytes.
///
/// Smaller results take less time past the cache too (4 to 32 MB of cross-entropy's gradient or log-softmax 0.83 to
/// 0.97 on a Zen 4 with 32 MB), but who reads them next would have to wait for memory.
pub(crate) fn exceeds_cache(bytes: usize) -> bool {
    /// Of less than this, no machine's last-level cache is meant.
    const LEAST: usize = 8 << 20;
    #[cfg(test)]
    if FORCED.get() {
        return true;
    }
    bytes > LEAST && bytes > gemm_common::cache::CACHE_INFO[2].cache_bytes
}

#[cfg(test)]
thread_local! {
    /// Takes results of any size for larger than the cache, in passes that this thread starts.
    pub(crate) static FORCED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Copies to memory past the caches, but for the parts of a cache line at both ends; a plain copy where the processor
/// has no such stores. [`fence`] makes them visible to other threads.
pub(crate) fn copy_past_cache<T: Copy>(from: &[MaybeUninit<T>], to: &mut [MaybeUninit<T>]) {
    assert_eq!(from.len(), to.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let bytes = size_of_val(from);
        let (source, target) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr().cast::<u8>());
        let head = target.align_offset(LINE).min(bytes);
        let lines = (bytes - head) / LINE;
        let tail = head + lines * LINE;
        // SAFETY: `head` and `tail` are at most `bytes`, which is what both slices have, and they don't overlap as one
        // is borrowed mutably; the bytes of a `T: Copy` may be copied, in whatever pieces
        unsafe {
            std::ptr::copy_nonoverlapping(source, target, head);
            for line in 0..lines {
                use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
                for quarter in 0..4 {
                    let at = head + line * LINE + quarter * 16;
                    // SSE2 is part of x86_64; the target is aligned to a line
                    _mm_stream_si128(target.add(at).cast::<__m128i>(), _mm_loadu_si128(source.add(at).cast()));
                }
            }
            std::ptr::copy_nonoverlapping(source.add(tail), target.add(tail), bytes - tail);
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    to.copy_from_slice(from);
}

/// The way of adjacent elements past the cache: in whole lines, however they are cut into pieces. A line that is stored
/// in parts would be read first.
pub(crate) struct Stage<'m, T> {
    room: &'m mut [MaybeUninit<T>],
    /// Where the first element in `room` goes, and how many there are.
    start: usize,
    len: usize,
}

impl<'m, T: Copy> Stage<'m, T> {
    /// `room` is for a piece and a line.
    pub fn new(room: &'m mut [MaybeUninit<T>]) -> Self {
        Stage { room, start: 0, len: 0 }
    }

    /// Has `write` initialise the elements `start .. start + len` of the output.
    ///
    /// # Safety
    /// Nobody has a slice of these elements, and of those before since the last [`Self::end`].
    pub unsafe fn piece(
        &mut self,
        out: &Output<T>,
        start: usize,
        len: usize,
        write: impl FnOnce(&mut [MaybeUninit<T>]),
    ) {
        if start != self.start + self.len {
            // SAFETY: this function has the same contract
            unsafe { self.end(out) };
            self.start = start;
        }
        write(&mut self.room[self.len..][..len]);
        self.len += len;
        // SAFETY: in bounds of what was written so far, which nobody has a slice of
        let to = unsafe { out.slice(self.start, self.len) };
        let head = to.as_ptr().cast::<u8>().align_offset(LINE) / size_of::<T>();
        let line = LINE / size_of::<T>();
        let whole = if self.len < head { 0 } else { head + (self.len - head) / line * line };
        copy_past_cache(&self.room[..whole], &mut to[..whole]);
        self.room.copy_within(whole..self.len, 0);
        (self.start, self.len) = (self.start + whole, self.len - whole);
    }

    /// Writes what is left.
    ///
    /// # Safety
    /// As for [`Self::piece`].
    pub unsafe fn end(&mut self, out: &Output<T>) {
        // SAFETY: elements of pieces, of which nobody has a slice
        unsafe { out.slice(self.start, self.len) }.copy_from_slice(&self.room[..self.len]);
        (self.start, self.len) = (self.start + self.len, 0);
    }
}

/// Ends a thread's stores past the caches: they are not in order with its other stores, by which it tells other threads
/// that it is done.
pub(crate) fn fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: SSE is part of x86_64
    unsafe {
        std::arch::x86_64::_mm_sfence()
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn check<T: Copy + PartialEq + std::fmt::Debug>(value: impl Fn(usize) -> T) {
        for (offset, len) in [(0, 0), (0, 1), (3, 5), (1, 100), (0, 64), (5, 1000), (31, 33)] {
            let from: Vec<_> = (0..len).map(|i| MaybeUninit::new(value(i))).collect();
            let mut to: Vec<T> = (0..offset + len + 7).map(|_| value(9999)).collect();
            let slice = &mut to[offset..offset + len];
            // SAFETY: initialised elements stay so, as only such are written
            let slice = unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), len) };
            copy_past_cache(&from, slice);
            fence();
            let copied = to[offset..offset + len].iter().enumerate();
            assert!(copied.map(|(i, v)| (value(i), v)).all(|(want, got)| want == *got), "{offset} {len}");
            let around = to[..offset].iter().chain(&to[offset + len..]);
            assert!(around.copied().all(|v| v == value(9999)), "{offset} {len}");
        }
    }

    #[test]
    fn the_copy_is_whole_wherever_it_starts() {
        check(|i| i as f32);
        check(|i| i as f64);
        check(|i| bf16::from_bits(i as u16));
    }

    #[test]
    fn pieces_become_one() {
        for first in [0, 5] {
            let mut values = vec![0f32; 400];
            let (_, out) = Output::in_place(&mut values);
            let mut room = [MaybeUninit::uninit(); 128];
            let mut stage = Stage::new(&mut room);
            let mut at = first;
            for len in [1, 3, 30, 0, 70, 100, 16, 7] {
                // a gap once
                at += if len == 16 { 9 } else { 0 };
                let write = |to: &mut [MaybeUninit<f32>]| {
                    for (i, to) in to.iter_mut().enumerate() {
                        to.write((at + i) as f32);
                    }
                };
                // SAFETY: there are no slices
                unsafe { stage.piece(&out, at, len, write) };
                at += len;
            }
            // SAFETY: there are no slices
            unsafe { stage.end(&out) };
            fence();
            for (i, v) in values.iter().enumerate() {
                let written = (first..first + 204).contains(&i) || (first + 213..at).contains(&i);
                assert_eq!(*v, if written { i as f32 } else { 0.0 }, "{i}");
            }
        }
    }

    #[test]
    fn small_results_stay_in_the_cache() {
        assert!(!exceeds_cache(1 << 20));
        assert!(exceeds_cache(usize::MAX));
    }
}
