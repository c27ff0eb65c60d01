//! Work that the threads of rayon's pool share with the thread that has it.
//!
//! A parallel iterator of rayon hands the work to the pool, waits for a worker to wake up and then for the result: next
//! to a loss of a few thousand elements that takes longer than the loss. Here the caller starts at once and works until
//! nothing is left; the workers that wake up in time take tasks off it, and nobody waits for those that don't.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The work of a task, in logits of a softmax, of which a thread reduces four in a nanosecond: 256 KB of f32, which
/// outlive the cost of a task many times and leave enough of them.
const TASK_WORK: usize = 64 * 1024;
/// Of less work than this, waking a thread costs more than it brings.
const SERIAL_WORK: usize = TASK_WORK;

/// Covers `0..units` with ranges, in parallel where there is enough work. Every unit is independent of every other.
pub(crate) fn for_each_task(units: usize, work_per_unit: usize, task: impl Fn(Range<usize>) + Sync) {
    if units == 0 {
        return;
    }
    if units == 1 || units.saturating_mul(work_per_unit) <= SERIAL_WORK {
        return task(0..units);
    }
    let step = (TASK_WORK / work_per_unit.max(1)).clamp(1, units.div_ceil(2));
    share(units.div_ceil(step), &|i| task(i * step..((i + 1) * step).min(units)));
}

/// Set in [`Job::guests`] once the caller lets no more threads in.
const CLOSED: usize = 1 << (usize::BITS - 1);

struct Job {
    /// Runs one task. Only for threads that have entered: it borrows from the caller's frame.
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// The next task that nobody has taken.
    next: AtomicUsize,
    /// The threads that have entered and not left, and [`CLOSED`].
    guests: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` points to something `Sync`, and is used only while the caller keeps it alive; the rest is `Send` and
// `Sync`
unsafe impl Send for Job {}
// SAFETY: the task is `Sync` and used only while the caller keeps it alive; all other fields are `Sync`
unsafe impl Sync for Job {}

impl Job {
    /// Takes tasks until none are left.
    fn work(&self, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.tasks {
                return;
            }
            task(i);
        }
    }

    /// What a worker of the pool does with the job, whenever it comes to it.
    fn visit(&self) {
        let enter = |guests| if guests & CLOSED == 0 { Some(guests + 1) } else { None };
        if self.guests.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: this thread entered before the caller closed the job, and the caller waits until it has left
        let task = unsafe { &*self.task };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.work(task))) {
            self.next.store(self.tasks, Ordering::Relaxed);
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.guests.fetch_sub(1, Ordering::Release);
    }
}

/// Closes the job and waits for the threads inside when the caller leaves, also by a panic.
struct Close<'j>(&'j Job);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.next.store(self.0.tasks, Ordering::Relaxed);
        self.0.guests.fetch_or(CLOSED, Ordering::Acquire);
        let mut spins = 0;
        // a task is a fraction of a millisecond, less than it takes to put a thread to sleep and wake it
        while self.0.guests.load(Ordering::Acquire) != CLOSED {
            match spins {
                0..100 => std::hint::spin_loop(),
                _ => std::thread::yield_now(),
            }
            spins += 1;
        }
    }
}

/// Runs `task` for each of `0..tasks` on the calling thread and on whichever workers of the pool come in time.
fn share(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    let helpers = rayon::current_num_threads().min(tasks) - 1;
    // SAFETY: only the lifetime changes. `Job::visit` dereferences the pointer between entering and leaving only, and
    // `Close` ends this borrow after the last thread has left and none can enter
    let erased =
        unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(task) };
    let job = Arc::new(Job {
        task: erased,
        tasks,
        next: AtomicUsize::new(0),
        guests: AtomicUsize::new(0),
        panic: Mutex::new(None),
    });
    {
        let _close = Close(&job);
        for _ in 0..helpers {
            let job = job.clone();
            rayon::spawn(move || job.visit());
        }
        job.work(task);
    }
    let panic = job.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 5] {
            for units in [0, 1, 2, 3, 100, 4097] {
                for elements in [1, 1000, TASK_WORK, usize::MAX] {
                    let counts: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                    let count = |range: Range<usize>| {
                        range.for_each(|i| {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        })
                    };
                    pool(threads).install(|| for_each_task(units, elements, count));
                    for_each_task(units, elements, count);
                    assert!(counts.iter().all(|n| n.load(Ordering::Relaxed) == 2), "{threads} {units} {elements}");
                }
            }
        }
    }

    #[test]
    fn other_threads_take_part() {
        pool(2).install(|| {
            let threads = Mutex::new(std::collections::HashSet::new());
            share(50, &|_| {
                threads.lock().unwrap().insert(std::thread::current().id());
                std::thread::sleep(Duration::from_millis(2));
            });
            assert_eq!(threads.into_inner().unwrap().len(), 2);
        });
    }

    #[test]
    fn nobody_waits_for_busy_workers() {
        pool(2).install(|| {
            let (started, starts) = std::sync::mpsc::channel();
            let (release, released) = std::sync::mpsc::channel::<()>();
            rayon::spawn(move || {
                started.send(()).unwrap();
                released.recv().unwrap();
            });
            starts.recv().unwrap();
            // the other worker is busy until after this
            let done = AtomicUsize::new(0);
            share(50, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 50);
            release.send(()).unwrap();
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_after_all_threads_have_left() {
        for culprit in [0, 7, 49] {
            let running = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool(3).install(|| {
                    share(50, &|i| {
                        running.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_micros(200));
                        running.fetch_sub(1, Ordering::SeqCst);
                        assert!(i != culprit, "task {i}");
                    })
                })
            }));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("task {culprit}"));
            assert_eq!(running.load(Ordering::SeqCst), 0);
        }
    }
}
