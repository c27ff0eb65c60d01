//! What the losses allocate, counted by the allocator: nothing of the logits' size but the gradient. On the CPU.
//!
//! A binary of its own, with one test, because a counter of allocations can't tell tests apart.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceLoss, BceWithLogitsLoss, CrossEntropyLoss, MultiLabelSoftMarginLoss, NllLoss, SigmoidFocalLoss, log_softmax,
};

struct Counting;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    let now = CURRENT.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: all calls go to the system's allocator unchanged; counting allocates nothing
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
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // both may exist for a moment
        grown(size);
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MB: usize = 1_000_000;
/// Numbers of each row, scratch memory of each thread, the graph.
const SMALL: usize = 5 * MB;

/// The most bytes that were allocated at once by a computation, beyond what there was, and the bytes of its result.
fn measured<T>(compute: impl FnOnce() -> Result<T>) -> Result<(T, usize, usize)> {
    let before = CURRENT.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = compute()?;
    Ok((result, PEAK.load(Relaxed) - before, CURRENT.load(Relaxed).saturating_sub(before)))
}

#[track_caller]
fn assert_within(what: &str, bytes: usize, at_most: usize) {
    println!("{what}: {:.2} MB of {:.2} MB", bytes as f64 / 1e6, at_most as f64 / 1e6);
    assert!(bytes <= at_most, "{what}: {bytes} bytes, at most {at_most} expected");
}

fn large_cross_entropy() -> Result<()> {
    let (n, classes) = (2048, 32_000);
    let gradient = n * classes * 4;
    let x = Tensor::zeros((n, classes), DType::F32, &Device::Cpu)?;
    let t = Tensor::zeros(n, DType::U32, &Device::Cpu)?;
    let ce = CrossEntropyLoss::new();
    assert_within("cross-entropy forward", measured(|| ce.forward(&x, &t))?.1, SMALL);
    assert_within("cross-entropy statistics", measured(|| ce.statistics(&x, &t))?.1, SMALL);
    assert_within("cross-entropy loss_and_grad", measured(|| ce.loss_and_grad(&x, &t))?.1, gradient + SMALL);
    assert_within("cross-entropy loss_and_grad_inplace", measured(|| ce.loss_and_grad_inplace(&x, &t))?.1, SMALL);
    Ok(())
}

fn large_bce() -> Result<()> {
    let (n, classes) = (2048, 32_000);
    let gradient = n * classes * 4;
    let x = Tensor::zeros((n, classes), DType::F32, &Device::Cpu)?;
    let bce = BceWithLogitsLoss::new();
    // the logits are as good a target as any
    assert_within("BCE with logits forward", measured(|| bce.forward(&x, &x))?.1, SMALL);
    assert_within("BCE with logits loss_and_grad", measured(|| bce.loss_and_grad(&x, &x))?.1, gradient + SMALL);
    let weight = Tensor::ones(classes, DType::F32, &Device::Cpu)?;
    let bce = bce.with_pos_weight(weight.clone()).with_weight(weight);
    assert_within("BCE with broadcast weights", measured(|| bce.forward(&x, &x))?.1, SMALL);
    Ok(())
}

/// Every loss, contiguous and not, in 16 and 32 bits: the forward copies no input, the backward makes one gradient.
fn every_loss() -> Result<()> {
    let (n, classes) = (512, 4000);
    for dtype in [DType::F32, DType::BF16] {
        let flat = Tensor::full(0.5f32, n * classes + 1, &Device::Cpu)?.to_dtype(dtype)?;
        let contiguous = flat.narrow(0, 0, n * classes)?.reshape((n, classes))?;
        let odd = flat.narrow(0, 1, n * classes)?.reshape((n, classes))?;
        let transposed = flat.narrow(0, 1, n * classes)?.reshape((classes, n))?.t()?;
        let t = Tensor::zeros(n, DType::U32, &Device::Cpu)?;
        let soft = contiguous.copy()?;
        let bytes = n * classes * dtype.size_in_bytes();
        let small = MB;
        for (layout, x) in [("contiguous", &contiguous), ("odd", &odd), ("transposed", &transposed)] {
            type Loss<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;
            let losses: [(&str, Loss); 7] = [
                ("cross-entropy", Box::new(|x| CrossEntropyLoss::new().forward(x, &t))),
                ("cross-entropy of probabilities", Box::new(|x| CrossEntropyLoss::new().forward(x, &soft))),
                ("NLL", Box::new(|x| NllLoss::new().forward(x, &t))),
                ("BCE", Box::new(|x| BceLoss::new().forward(x, &soft))),
                ("BCE with logits", Box::new(|x| BceWithLogitsLoss::new().forward(x, &soft))),
                ("multi-label soft margin", Box::new(|x| MultiLabelSoftMarginLoss::new().forward(x, &soft))),
                ("focal", Box::new(|x| SigmoidFocalLoss::new().forward(x, &soft))),
            ];
            for (name, loss) in &losses {
                assert_within(&format!("{name} forward, {layout} {dtype:?}"), measured(|| loss(x))?.1, small);
            }
            assert_within("log-softmax", measured(|| log_softmax(x, 1))?.1, bytes + small);
            for (name, loss) in &losses {
                // of a variable: a copy, contiguous
                let x = Var::from_tensor(x)?;
                let value = loss(&x)?;
                let (_, peak, kept) = measured(|| value.backward())?;
                assert_within(&format!("{name} gradient, {layout} {dtype:?}"), kept, bytes + small);
                // candle adds an op's gradient to zeros: three of them for a moment, one of which is the op's
                assert_within(&format!("{name} backward, {layout} {dtype:?}"), peak, 3 * bytes + small);
            }
        }
    }
    Ok(())
}

/// A training step's loss against candle's.
fn against_candle() -> Result<()> {
    let (n, classes) = (512, 4000);
    let x = Var::from_tensor(&Tensor::full(0.5f32, (n, classes), &Device::Cpu)?)?;
    let t = Tensor::zeros(n, DType::U32, &Device::Cpu)?;
    let soft = Tensor::full(0.5f32, (n, classes), &Device::Cpu)?;
    let step = |loss: &dyn Fn() -> Result<Tensor>| Ok::<_, candle_core::Error>(measured(|| loss()?.backward())?.1);
    let fused = step(&|| candle_fused_loss::cross_entropy(&x, &t))?;
    let composed = step(&|| candle_nn::loss::cross_entropy(&x, &t))?;
    assert_within("cross-entropy step, half of candle's", fused, composed / 2);
    let fused = step(&|| candle_fused_loss::binary_cross_entropy_with_logits(&x, &soft))?;
    let composed = step(&|| candle_nn::loss::binary_cross_entropy_with_logit(&x, &soft))?;
    assert_within("BCE step, half of candle's", fused, composed / 2);
    Ok(())
}

/// Nothing is left behind by calls while all workers of the pool are busy.
fn busy_workers() -> Result<()> {
    let x = Tensor::zeros((256, 1000), DType::F32, &Device::Cpu)?;
    let t = Tensor::zeros(256, DType::U32, &Device::Cpu)?;
    let calls = |n: usize| (0..n).try_for_each(|_| candle_fused_loss::cross_entropy(&x, &t).map(drop));
    let workers = rayon::current_num_threads();
    let (started, starts) = mpsc::channel();
    let releases: Vec<_> = (0..workers)
        .map(|_| {
            let (release, released) = mpsc::channel::<()>();
            let started = started.clone();
            rayon::spawn(move || {
                started.send(()).ok();
                released.recv().ok();
            });
            release
        })
        .collect();
    starts.iter().take(workers).for_each(drop);
    // the first calls ask the workers for help
    calls(10)?;
    let (_, _, kept) = measured(|| calls(2000))?;
    drop(releases);
    assert_within("2000 calls while all workers are busy", kept, 4096);
    Ok(())
}

#[test]
fn nothing_of_the_logits_size_but_the_gradient() -> Result<()> {
    // the thread pool's own memory
    every_loss().and_then(|()| against_candle())?;
    large_cross_entropy()?;
    large_bce()?;
    busy_workers()
}
