//! What a call makes the driver do, counted in tests.

#[cfg(test)]
use candle_core::Result;

/// The work that a call gave the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub launches: usize,
    pub allocations: usize,
    /// Times that the host waited for the device.
    pub waits: usize,
}

#[cfg(test)]
thread_local! {
    /// The kernels that this thread has asked for.
    static USED: std::cell::RefCell<std::collections::BTreeSet<(&'static str, String)>> = Default::default();
    /// All work of this thread so far.
    static WORK: std::cell::Cell<Work> = const { std::cell::Cell::new(Work { launches: 0, allocations: 0, waits: 0 }) };
}

/// Counts work, in tests.
pub(super) fn tally(count: impl FnOnce(&mut Work)) {
    #[cfg(test)]
    WORK.with(|work| {
        let mut now = work.get();
        count(&mut now);
        work.set(now);
    });
    #[cfg(not(test))]
    let _ = count;
}

#[cfg(test)]
pub(super) fn note_use(module: &'static str, kernel: &str) {
    USED.with_borrow_mut(|used| used.insert((module, kernel.to_string())));
}

/// The work of a call.
#[cfg(test)]
pub(crate) fn work_of<R>(call: impl FnOnce() -> Result<R>) -> Result<Work> {
    let before = WORK.get();
    call()?;
    let now = WORK.get();
    Ok(Work {
        launches: now.launches - before.launches,
        allocations: now.allocations - before.allocations,
        waits: now.waits - before.waits,
    })
}

/// Whether this thread has asked for a kernel.
#[cfg(test)]
pub(super) fn is_used(module: &'static str, kernel: &str) -> bool {
    USED.with_borrow(|used| used.contains(&(module, kernel.to_string())))
}
