//! Work that the threads of rayon's pool share with the thread that has it.
//!
//! A parallel iterator of rayon hands the work to the pool, waits for a worker to wake up and then for the result: next
//! to a loss of a few thousand elements that takes longer than the loss. Here the caller starts at once and works until
//! nothing is left; the workers that wake up in time take tasks off it, and nobody waits for those that don't.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

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

/// Tasks that are shared.
struct Job {
    /// Runs one task. Only for threads that have entered: it borrows from the caller's frame.
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// The next task that nobody has taken.
    next: AtomicUsize,
    /// The threads inside: those that have entered and not left.
    guests: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

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

    fn has_tasks(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.tasks
    }
}

/// A job on a board. It may be dereferenced by a thread that holds the board's lock, or that entered the job.
struct Posted(*const Job);

// SAFETY: the job is in the frame of a thread that takes it off the board before it is gone, and waits for those that
// entered it; its task is `Sync` and all else in it is atomic or locked
unsafe impl Send for Posted {}

/// Where callers put their jobs and the workers of a pool find them.
///
/// A worker is invited by a closure that the pool runs whenever a worker is free. It knows the board, not the job: so
/// there are never more invitations than workers, however many calls pass while these are busy, and the worker that
/// comes late works for whoever needs it then.
struct Board {
    state: Mutex<BoardState>,
}

struct BoardState {
    jobs: Vec<Posted>,
    /// Workers that were invited and have not come yet.
    invited: usize,
}

impl Board {
    const fn new() -> Self {
        Board { state: Mutex::new(BoardState { jobs: Vec::new(), invited: 0 }) }
    }

    fn lock(&self) -> MutexGuard<'_, BoardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an invited worker does: tasks of one job after the other, until none is left.
    fn visit(&self) {
        self.lock().invited -= 1;
        loop {
            let entered = self.lock().jobs.iter().rev().find_map(|posted| {
                // SAFETY: the job is on the board, and this thread has the board's lock
                let job = unsafe { &*posted.0 };
                job.has_tasks().then(|| {
                    job.guests.fetch_add(1, Ordering::Relaxed);
                    posted.0
                })
            });
            let Some(job) = entered else { return };
            // SAFETY: this thread has entered, and the caller waits until it has left
            let job = unsafe { &*job };
            // SAFETY: as above; the task lives as long as the job
            let task = unsafe { &*job.task };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.work(task))) {
                job.next.store(job.tasks, Ordering::Relaxed);
                *job.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            job.guests.fetch_sub(1, Ordering::Release);
        }
    }
}

/// The board of the pool that `rayon::spawn` uses on this thread: a worker's own one, as each worker belongs to one
/// pool, or that of all threads outside of pools, which share the global one.
fn board() -> Arc<Board> {
    static OUTSIDE: LazyLock<Arc<Board>> = LazyLock::new(|| Arc::new(Board::new()));
    thread_local! {
        static INSIDE: Arc<Board> = Arc::new(Board::new());
    }
    match rayon::current_thread_index() {
        None => OUTSIDE.clone(),
        Some(_) => INSIDE.with(Arc::clone),
    }
}

/// Takes the job off the board and waits for the threads inside when the caller leaves, also by a panic.
struct Close<'j>(&'j Board, &'j Job);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let Close(board, job) = *self;
        job.next.store(job.tasks, Ordering::Relaxed);
        board.lock().jobs.retain(|posted| !std::ptr::eq(posted.0, job));
        let mut spins = 0;
        // a task is a fraction of a millisecond, less than it takes to put a thread to sleep and wake it
        while job.guests.load(Ordering::Acquire) != 0 {
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
    // SAFETY: only the lifetime changes. `Board::visit` dereferences the pointer between entering and leaving only, and
    // `Close` ends this borrow after the last thread has left and none can enter
    let erased =
        unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync)>(task) };
    let job =
        Job { task: erased, tasks, next: AtomicUsize::new(0), guests: AtomicUsize::new(0), panic: Mutex::new(None) };
    let board = board();
    {
        let _close = Close(&board, &job);
        let mut state = board.lock();
        state.jobs.push(Posted(&job));
        let missing = helpers.saturating_sub(state.invited);
        state.invited += missing;
        drop(state);
        for _ in 0..missing {
            let board = board.clone();
            rayon::spawn(move || board.visit());
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

    /// The workers of a pool, each busy until the sender is gone.
    fn busy(workers: usize) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (released, (started, starts)) = (Arc::new(Mutex::new(released)), std::sync::mpsc::channel());
        for _ in 0..workers {
            let (released, started) = (released.clone(), started.clone());
            rayon::spawn(move || {
                started.send(()).unwrap();
                released.lock().unwrap().recv().unwrap_err();
            });
            starts.recv().unwrap();
        }
        release
    }

    /// However many jobs pass while the workers are busy, no more invitations wait for them than there are workers; and
    /// they still take part in the jobs that come after.
    #[test]
    fn busy_workers_are_invited_once() {
        let pool = pool(3);
        pool.install(|| {
            // this thread is one of the pool's
            let release = busy(2);
            for _ in 0..if cfg!(miri) { 5 } else { 1000 } {
                share(50, &|_| {});
            }
            let board = board();
            let counts = |state: &BoardState| (state.invited, state.jobs.len());
            assert_eq!(counts(&board.lock()), (2, 0));
            drop(release);
            let threads = Mutex::new(std::collections::HashSet::new());
            share(50, &|_| {
                threads.lock().unwrap().insert(std::thread::current().id());
                std::thread::sleep(Duration::from_millis(2));
            });
            assert_eq!(threads.into_inner().unwrap().len(), 3);
            while board.lock().invited > 0 {
                std::thread::yield_now();
            }
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
