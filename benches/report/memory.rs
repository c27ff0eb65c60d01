//! An allocator that counts, where it is asked to; and page faults.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

pub struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(by: usize) {
    if ON.load(Relaxed) {
        let now = NOW.fetch_add(by, Relaxed).wrapping_add(by);
        // what was allocated before and is freed now makes the count negative
        if now < usize::MAX / 2 {
            PEAK.fetch_max(now, Relaxed);
        }
    }
}

fn shrunk(by: usize) {
    if ON.load(Relaxed) {
        NOW.fetch_sub(by, Relaxed);
    }
}

// SAFETY: everything is the system allocator's; the counts are on the side
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: the caller's promise
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        grown(new_size);
        shrunk(layout.size());
        // SAFETY: the caller's promise
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

/// The pages that this process has been given so far, where the system counts them.
pub fn page_faults() -> i64 {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a plain struct of numbers, for which zeros are a value
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a `rusage` that lives as long as the call
        if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } == 0 {
            return usage.ru_minflt;
        }
    }
    0
}

/// The most bytes that `work` had allocated at a time, and what it returned.
pub fn peak_of<R>(work: impl FnOnce() -> R) -> (R, usize) {
    NOW.store(0, Relaxed);
    PEAK.store(0, Relaxed);
    ON.store(true, Relaxed);
    let result = work();
    ON.store(false, Relaxed);
    (result, PEAK.load(Relaxed))
}
