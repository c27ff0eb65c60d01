//! Stores past the caches, for results that are larger than these.
//!
//! A plain store first reads the cache line that it writes into: a pass that reads E bytes and writes E bytes moves 3 E.
//! A store past the cache moves 2 E, but whoever reads the result finds it in memory only.

use std::mem::MaybeUninit;

/// Whether the last-level cache can't hold a result of so many bytes.
pub(crate) fn exceeds_cache(bytes: usize) -> bool {
    /// Of less than this, no machine's last-level cache is meant.
    const LEAST: usize = 8 << 20;
    bytes > LEAST && bytes > gemm_common::cache::CACHE_INFO[2].cache_bytes
}

/// Copies to memory past the caches, but for the parts of a cache line at both ends; a plain copy where the processor
/// has no such stores. [`fence`] makes them visible to other threads.
pub(crate) fn copy_past_cache<T: Copy>(from: &[MaybeUninit<T>], to: &mut [MaybeUninit<T>]) {
    assert_eq!(from.len(), to.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        const LINE: usize = 64;
        let bytes = size_of_val(from);
        let (source, target) = (from.as_ptr().cast::<u8>(), to.as_mut_ptr().cast::<u8>());
        let head = target.align_offset(LINE).min(bytes);
        let lines = (bytes - head) / LINE;
        let tail = head + lines * LINE;
        // SAFETY: `head` and `tail` are at most `bytes`, which is what both slices have, and they don't overlap as one is
        // borrowed mutably; the bytes of a `T: Copy` may be copied, in whatever pieces
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
    fn small_results_stay_in_the_cache() {
        assert!(!exceeds_cache(1 << 20));
        assert!(exceeds_cache(usize::MAX));
    }
}
