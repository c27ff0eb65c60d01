//! How much memory linear cross-entropy takes on the CPU, counted by the allocator. A binary of its own: what other
//! tests allocate at the same time would count too.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{LinearCrossEntropyLoss, Reduction, linear_cross_entropy};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    fn add(size: usize) {
        PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
    }
}

// SAFETY: the system's allocator does the work
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller keeps the contract, which is the system allocator's own
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller keeps the contract, which is the system allocator's own
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract, which is the system allocator's own
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MB: f64 = 1e6;
const N: usize = 2048;
const D: usize = 256;
const V: usize = 32_000;

/// What `work` allocated at its peak beyond the tensors that it returns, in MB.
fn peak(work: impl FnOnce() -> Result<Vec<Tensor>>) -> Result<f64> {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let returned = work()?;
    let peak = PEAK.load(Relaxed) - before;
    let returned: usize = returned.iter().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
    Ok((peak as f64 - returned as f64) / MB)
}

fn inputs(dtype: DType) -> Result<(Var, Var, Tensor)> {
    let hidden = Tensor::randn(0f32, 1.0, (N, D), &Device::Cpu)?.to_dtype(dtype)?;
    let weight = Tensor::randn(0f32, 0.05, (V, D), &Device::Cpu)?.to_dtype(dtype)?;
    let target = Tensor::from_iter((0..N as u32).map(|i| i * 13 % V as u32), &Device::Cpu)?;
    Ok((Var::from_tensor(&hidden)?, Var::from_tensor(&weight)?, target))
}

/// One test, because the counters are the process's.
#[test]
fn logits_never_exist_at_once() -> Result<()> {
    let (hidden, weight, target) = inputs(DType::F32)?;
    let logits = (N * V * 4) as f64 / MB; // 262 MB
    // the gemm's threads and their workspaces are there from the first product on
    linear_cross_entropy(&hidden.narrow(0, 0, 8)?, &weight, &target.narrow(0, 0, 8)?)?;

    let training = |loss: LinearCrossEntropyLoss, scale: f64| {
        peak(|| {
            let loss = loss.forward(&hidden, &weight, None, &target)?;
            let mut grads = (loss.sum_all()? * scale)?.backward()?;
            Ok(vec![grads.remove(&hidden).expect("gradient"), grads.remove(&weight).expect("gradient")])
        })
    };
    // of this, 65.5 MB are the zeros that candle's backward adds a gradient to, and the result of that
    let measured = training(LinearCrossEntropyLoss::new(), 1.0)?;
    println!("forward and backward: {measured:.1} MB beyond inputs and gradients (all logits: {logits:.1} MB)");
    assert!(measured < 70.0, "{measured} MB");
    let measured = training(LinearCrossEntropyLoss::new(), 0.5)?;
    println!("the same, upstream gradient not 1: {measured:.1} MB");
    assert!(measured < 70.0, "{measured} MB");
    let measured = training(LinearCrossEntropyLoss::new().with_reduction(Reduction::None), 1.0)?;
    println!("the same, one loss for each row: {measured:.1} MB");
    assert!(measured < 70.0, "{measured} MB");

    let measured = peak(|| {
        let (_, grads) = LinearCrossEntropyLoss::new().loss_and_grad(&hidden, &weight, None, &target)?;
        Ok(vec![grads.hidden, grads.weight])
    })?;
    println!("loss_and_grad: {measured:.1} MB");
    assert!(measured < 70.0, "{measured} MB");

    // one chunk, and what a product of it needs
    let rows = 64;
    let chunk = (rows * V * 4) as f64 / MB;
    let (hidden, weight) = (hidden.detach(), weight.detach());
    let measured = peak(|| {
        let loss = LinearCrossEntropyLoss::new().with_chunk_rows(rows);
        loss.forward(&hidden, &weight, None, &target).map(|loss| vec![loss])
    })?;
    println!("evaluation in chunks of {chunk:.1} MB: {measured:.1} MB");
    assert!(measured < chunk + 4.0, "{measured} MB, a chunk has {chunk} MB");

    // the weight, 16 MB, is never widened as a whole: that would be 33 MB more
    let (hidden, weight, target) = inputs(DType::BF16)?;
    let measured = peak(|| {
        let loss = LinearCrossEntropyLoss::new().with_chunk_rows(rows);
        loss.forward(&hidden.detach(), &weight.detach(), None, &target).map(|loss| vec![loss])
    })?;
    println!("evaluation in bf16 in chunks of {chunk:.1} MB: {measured:.1} MB");
    assert!(measured < chunk + 8.0, "{measured} MB, a chunk has {chunk} MB");
    Ok(())
}
