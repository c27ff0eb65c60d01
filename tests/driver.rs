//! What a program built with the `cuda` feature asks of the driver, and what it does where that fails: a broken driver
//! leaves the CPU as `best_device`; no loss copies to the host or waits for the device, so that a CUDA graph can record
//! it and give what the loss gives, again and again.
//!
//! This binary has functions of the driver's names, which the linker prefers to those of the driver's library. They
//! fail where a test says so and else call the library's. They count their calls, each of which costs the host time.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags as Flags, CUmemPool_attribute as Attribute, CUresult, CUstreamCaptureMode as Mode,
    CUstreamCaptureStatus as Status,
};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, DriverError, result};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{
    BceWithLogitsLoss, CrossEntropyLoss, NllLoss, best_device, binary_cross_entropy_with_logit, cross_entropy,
    log_softmax, multi_label_soft_margin, nll, sigmoid_focal,
};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The functions that fail, with what they return.
static BROKEN: Mutex<&[(&CStr, c_int)]> = Mutex::new(&[]);
/// One of them that was called.
static REACHED: Mutex<Option<&CStr>> = Mutex::new(None);
/// How often each function was called since a test began to count.
static CALLS: Mutex<BTreeMap<&str, usize>> = Mutex::new(BTreeMap::new());
static PANICS: AtomicUsize = AtomicUsize::new(0);
/// Tests in turn: they share the driver.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_broken(functions: &'static [(&'static CStr, c_int)]) {
    *BROKEN.lock().unwrap() = functions;
    *REACHED.lock().unwrap() = None;
}

fn reached() -> Option<&'static CStr> {
    *REACHED.lock().unwrap()
}

/// What `function` returns instead of being called, if it is a broken one.
fn failure(function: &'static CStr) -> Option<c_int> {
    let (_, error) = BROKEN.lock().unwrap().iter().find(|(broken, _)| *broken == function)?;
    *REACHED.lock().unwrap() = Some(function);
    Some(*error)
}

/// The library's function of that name.
fn library(function: &CStr) -> *mut c_void {
    // SAFETY: looks a name up
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, function.as_ptr()) };
    assert!(!found.is_null(), "the driver's library has no {function:?}");
    found
}

fn cuda() -> Device {
    Device::new_cuda(0).unwrap_or_else(|error| {
        panic!("no CUDA device: run `. softgpu/env` for the software GPU, or test on a machine with a GPU; {error}")
    })
}

macro_rules! driver_functions {
    ($($function:ident($($argument:ident: $type:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)]
        unsafe extern "C" fn $function($($argument: $type),*) -> c_int {
            const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($function), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!(),
            };
            *CALLS.lock().unwrap().entry(stringify!($function)).or_default() += 1;
            if let Some(error) = failure(NAME) {
                return error;
            }
            // SAFETY: the signature is that of cuda.h
            let function: unsafe extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(library(NAME)) };
            // SAFETY: the caller's promise
            unsafe { function($($argument),*) }
        }
    )*

        /// All of them.
        static COUNTED: &[&str] = &[$(stringify!($function)),*];
    };
}

type Pointer = *mut c_void;
driver_functions! {
    cuInit(flags: c_uint);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDevicePrimaryCtxRetain(context: *mut Pointer, device: c_int);
    cuMemAlloc_v2(memory: *mut u64, bytes: usize);
    cuMemAllocAsync(memory: *mut u64, bytes: usize, stream: Pointer);
    cuModuleLoadData(module: *mut Pointer, image: *const c_char);
    cuLaunchKernel(
        function: Pointer, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Pointer, parameters: *mut Pointer, extra: *mut Pointer
    );
    cuMemcpyHtoDAsync_v2(to: u64, from: Pointer, bytes: usize, stream: Pointer);
    cuMemcpyDtoHAsync_v2(to: Pointer, from: u64, bytes: usize, stream: Pointer);
    cuStreamSynchronize(stream: Pointer);
    cuCtxSynchronize();
    cuEventSynchronize(event: Pointer);
    cuStreamWaitEvent(stream: Pointer, event: Pointer, flags: c_uint);
    cuCtxDestroy_v2(context: Pointer);
    cuCtxGetCurrent(context: *mut Pointer);
    cuCtxSetCurrent(context: Pointer);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    cuDeviceGetDefaultMemPool(pool: *mut Pointer, device: c_int);
    cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuEventCreate(event: *mut Pointer, flags: c_uint);
    cuEventDestroy_v2(event: Pointer);
    cuEventRecord(event: Pointer, stream: Pointer);
    cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Pointer);
    cuFuncSetAttribute(function: Pointer, attribute: c_int, value: c_int);
    cuGetErrorString(error: c_int, text: *mut *const c_char);
    cuGraphDestroy(graph: Pointer);
    cuGraphExecDestroy(graph: Pointer);
    cuGraphInstantiateWithFlags(executable: *mut Pointer, graph: Pointer, flags: u64);
    cuGraphLaunch(executable: Pointer, stream: Pointer);
    cuLaunchKernelEx(config: Pointer, function: Pointer, parameters: *mut Pointer, extra: *mut Pointer);
    cuMemFreeAsync(memory: u64, stream: Pointer);
    cuMemFree_v2(memory: u64);
    cuMemPoolGetAttribute(pool: Pointer, attribute: c_int, value: Pointer);
    cuMemPoolSetAttribute(pool: Pointer, attribute: c_int, value: Pointer);
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Pointer);
    cuMemcpyPeerAsync(to: u64, of: Pointer, from: u64, context: Pointer, bytes: usize, stream: Pointer);
    cuMemsetD8Async(to: u64, value: c_uchar, bytes: usize, stream: Pointer);
    cuModuleGetFunction(function: *mut Pointer, module: Pointer, name: *const c_char);
    cuModuleLoad(module: *mut Pointer, path: *const c_char);
    cuModuleUnload(module: Pointer);
    cuOccupancyMaxActiveClusters(clusters: *mut c_int, function: Pointer, config: Pointer);
    cuStreamBeginCapture_v2(stream: Pointer, mode: c_int);
    cuStreamCreate(stream: *mut Pointer, flags: c_uint);
    cuStreamDestroy_v2(stream: Pointer);
    cuStreamEndCapture(stream: Pointer, graph: *mut Pointer);
    cuStreamGetId(stream: Pointer, number: *mut u64);
    cuStreamIsCapturing(stream: Pointer, status: *mut c_int);
}

/// What a driver answers, from the first call to the last: no device, a library that doesn't fit the kernel's module, a
/// device that went away or belongs to another process, no memory, kernels newer than the driver, a device that fails.
static FAILURES: [(&CStr, c_int); 10] = [
    (c"cuInit", 100),                  // NO_DEVICE: also where CUDA_VISIBLE_DEVICES hides them all
    (c"cuInit", 803),                  // SYSTEM_DRIVER_MISMATCH
    (c"cuInit", 999),                  // UNKNOWN
    (c"cuDeviceGet", 101),             // INVALID_DEVICE
    (c"cuDevicePrimaryCtxRetain", 46), // DEVICE_UNAVAILABLE
    (c"cuDevicePrimaryCtxRetain", 2),  // OUT_OF_MEMORY
    (c"cuMemAllocAsync", 2),           // OUT_OF_MEMORY
    (c"cuModuleLoadData", 222),        // UNSUPPORTED_PTX_VERSION
    (c"cuLaunchKernel", 719),          // LAUNCH_FAILED
    (c"cuMemcpyDtoHAsync_v2", 700),    // ILLEGAL_ADDRESS
];

fn loss_on_the_cpu_is_right() -> Result<()> {
    let logits = Var::zeros((4, 10), DType::F32, &Device::Cpu)?;
    let target = Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu)?;
    let loss = cross_entropy(&logits, &target)?;
    assert!((loss.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
    let grads = loss.backward()?;
    let grad = grads.get(&logits).unwrap().to_vec2::<f32>()?;
    assert!((grad[1][1] + 0.9 / 4.0).abs() < 1e-6 && (grad[1][2] - 0.1 / 4.0).abs() < 1e-6);
    Ok(())
}

#[test]
fn best_device_is_the_cpu() -> Result<()> {
    let _turn = turn();
    cuda();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Relaxed);
        hook(info);
    }));
    assert!(best_device().is_cuda());
    for broken in &FAILURES {
        set_broken(std::slice::from_ref(broken));
        assert!(best_device().is_cpu(), "{broken:?}");
        assert!(reached().is_some(), "{broken:?} was not called");
        loss_on_the_cpu_is_right()?;
        assert_eq!(PANICS.load(Relaxed), 0, "{broken:?}");
    }
    // the failures were the reason
    set_broken(&[]);
    assert!(best_device().is_cuda());
    Ok(())
}

/// What waits for the device, or what a recording of a stream does not allow.
static NOT_IN_A_GRAPH: [(&CStr, c_int); 8] = [
    (c"cuMemcpyDtoHAsync_v2", 900),
    (c"cuMemcpyHtoDAsync_v2", 900),
    (c"cuStreamSynchronize", 900),
    (c"cuCtxSynchronize", 900),
    (c"cuEventSynchronize", 900),
    (c"cuStreamWaitEvent", 900),
    (c"cuMemAlloc_v2", 900),
    (c"cuModuleLoadData", 900),
];

/// The passes of some losses, with class indices that lie apart.
struct Work {
    logits: Var,
    labels: Tensor,
    target: Tensor,
    /// Where the results go.
    out: [Tensor; 6],
}

impl Work {
    fn new(device: &Device, index: DType) -> Result<Self> {
        let numbers = Tensor::arange(0f32, 120., &Device::Cpu)?.sin()?.reshape((6, 5, 4))?;
        let target = Tensor::new(&[0u32, 1, 2, 3, 4, 0], &Device::Cpu)?.broadcast_as((4, 6))?.contiguous()?;
        Ok(Work {
            logits: Var::from_tensor(&numbers.to_device(device)?)?,
            labels: numbers.ge(0f32)?.to_dtype(DType::F32)?.to_device(device)?,
            target: target.to_dtype(index)?.to_device(device)?.t()?,
            out: [120, 120, 120, 24, 1, 1].map(|n| Tensor::zeros(n, DType::F32, device).unwrap()),
        })
    }

    fn run(&self) -> Result<()> {
        let (logits, target) = (&self.logits, &self.target);
        let autograd = |loss: Tensor| -> Result<Tensor> { Ok(loss.backward()?.get(logits).unwrap().clone()) };
        let smooth = CrossEntropyLoss::new().with_label_smoothing(0.1);
        let (loss, grad) = smooth.loss_and_grad(logits, target)?;
        let results = [
            autograd(cross_entropy(logits, target)?)?,
            autograd(multi_label_soft_margin(logits, &self.labels)?)?,
            grad,
            CrossEntropyLoss::new().statistics(logits, target)?.loss,
            loss,
            cross_entropy(logits, target)?,
        ];
        for (out, result) in self.out.iter().zip(results) {
            out.slice_set(&result.flatten_all()?, 0, 0)?;
        }
        Ok(())
    }

    fn results(&self) -> Result<Vec<f32>> {
        Tensor::cat(&self.out, 0)?.to_vec1()
    }
}

#[test]
fn losses_do_not_wait_for_the_device() -> Result<()> {
    let _turn = turn();
    let device = cuda();
    for index in [DType::U8, DType::U32, DType::I32, DType::I64] {
        let work = Work::new(&device, index)?;
        // the first time, kernels are loaded
        work.run()?;
        set_broken(&NOT_IN_A_GRAPH);
        let again = work.run();
        assert_eq!(reached(), None, "with class indices of {index:?}");
        set_broken(&[]);
        again?;
    }
    // what waits would be seen
    let loss = Var::ones((6, 5), DType::F32, &device)?.sum_all()?;
    set_broken(&NOT_IN_A_GRAPH);
    assert!(loss.to_scalar::<f32>().is_err());
    assert_eq!(reached(), Some(c"cuMemcpyDtoHAsync_v2"));
    assert!(device.synchronize().is_err());
    assert_eq!(reached(), Some(c"cuStreamSynchronize"));
    set_broken(&[]);
    Ok(())
}

/// What a call makes the driver do, and with it cudarc and candle.
#[derive(Clone, Copy)]
struct Steps {
    /// Made and released.
    allocations: usize,
    launches: usize,
    /// Counters of launches whose blocks meet: a look at the stream.
    tickets: usize,
    /// Whether it includes a backward by candle, which begins with ones and adds into zeros.
    backward: bool,
}

impl Steps {
    /// The driver's functions, and how often each is called. cudarc makes two events for each allocation, unless they
    /// are not `tracked`, and looks at the thread's context in each of its steps.
    fn calls(self, tracked: bool) -> BTreeMap<&'static str, usize> {
        let candles = self.backward as usize;
        let allocations = self.allocations + 3 * candles;
        let events = if tracked { 2 * allocations } else { 0 };
        let calls = [
            ("cuCtxGetCurrent", allocations + 2 * events + self.launches + self.tickets + 3 * candles),
            ("cuMemAllocAsync", allocations),
            ("cuMemFreeAsync", allocations),
            ("cuEventCreate", events),
            ("cuEventDestroy_v2", events),
            ("cuStreamIsCapturing", self.tickets),
            ("cuStreamGetId", self.tickets),
            ("cuLaunchKernelEx", self.launches),
            ("cuLaunchKernel", 2 * candles),
            ("cuModuleGetFunction", 2 * candles),
            ("cuMemsetD8Async", candles),
        ];
        calls.into_iter().filter(|(_, times)| *times > 0).collect()
    }
}

/// All driver calls of warm losses, each of which costs the host time: of a few rows, of many and of a long one. A
/// loss, what its backward needs and the kernels' own numbers are two allocations.
#[test]
fn driver_calls_of_each_loss() -> Result<()> {
    let _turn = turn();
    // (rows, classes), and for each loss what the forward takes and what it takes with the gradient
    let expected = [
        ((64, 1000), [[(2, 1, 1), (3, 1, 1)], [(2, 1, 1), (3, 1, 1)], [(2, 1, 0), (2, 1, 0)]]),
        ((6000, 10), [[(2, 1, 1), (3, 2, 1)], [(2, 1, 1), (3, 1, 1)], [(2, 1, 1), (3, 2, 1)]]),
        ((1, 150_000), [[(2, 2, 0), (3, 3, 0)], [(2, 1, 1), (3, 1, 1)], [(2, 1, 0), (3, 2, 0)]]),
    ];
    for (device, tracked) in [(cuda(), true), (device_with_stream()?.0, false)] {
        for ((rows, classes), of_each) in expected {
            let x = Var::from_tensor(&Tensor::ones((rows, classes), DType::F32, &device)?)?;
            let (zeros, index) = (x.zeros_like()?, Tensor::zeros(rows, DType::U32, &device)?);
            let forwards: [&dyn Fn() -> Result<Tensor>; 3] =
                [&|| cross_entropy(&x, &index), &|| binary_cross_entropy_with_logit(&x, &zeros), &|| nll(&x, &index)];
            let both: [&dyn Fn() -> Result<(Tensor, Tensor)>; 3] = [
                &|| CrossEntropyLoss::new().loss_and_grad(&x, &index),
                &|| BceWithLogitsLoss::new().loss_and_grad(&x, &zeros),
                &|| NllLoss::new().loss_and_grad(&x, &index),
            ];
            for (loss, numbers) in of_each.into_iter().enumerate() {
                let [forward, with_gradient] = numbers.map(|(allocations, launches, tickets)| Steps {
                    allocations,
                    launches,
                    tickets,
                    backward: false,
                });
                let Steps { allocations, launches, .. } = forward;
                let backward =
                    Steps { allocations: allocations + 1, launches: launches + 1, backward: true, ..forward };
                let check = |what: &str, steps: Steps, call: &dyn Fn() -> Result<()>| -> Result<()> {
                    // the first time, kernels are loaded
                    call()?;
                    CALLS.lock().unwrap().clear();
                    call()?;
                    let found = CALLS.lock().unwrap().clone();
                    let loss = ["cross-entropy", "BCE", "NLL"][loss];
                    assert_eq!(found, steps.calls(tracked), "{loss}, {rows} x {classes}, {what}, events: {tracked}");
                    Ok(())
                };
                check("forward", forward, &|| forwards[loss]().map(drop))?;
                check("forward and backward", backward, &|| forwards[loss]()?.backward().map(drop))?;
                check("loss_and_grad", with_gradient, &|| both[loss]().map(drop))?;
            }
        }
    }
    Ok(())
}

/// Every function of the driver that this binary links is counted.
#[test]
fn all_driver_functions_are_counted() {
    let _turn = turn();
    cuda();
    let program = std::fs::read("/proc/self/exe").expect("this program");
    let is_one = |name: &[u8]| {
        name.starts_with(b"cu") && name.get(2).is_some_and(u8::is_ascii_uppercase) && {
            name.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'_')
        }
    };
    let linked: Vec<_> = program.split(|c| *c == 0).filter(|name| is_one(name)).map(String::from_utf8_lossy).collect();
    assert!(linked.contains(&"cuLaunchKernelEx".into()));
    // the compiler cuts a name that it compares with in two
    let is_counted = |name: &str| COUNTED.iter().any(|counted| counted.starts_with(name));
    let missed: Vec<_> = linked.iter().filter(|name| !is_counted(name)).collect();
    assert!(missed.is_empty(), "{missed:?}");
}

/// A device whose work is all in one stream of its own. That can be recorded, which the default stream can't; and
/// within a recording nothing can wait for work from before it, so that events are not tracked.
fn device_with_stream() -> Result<(Device, Arc<CudaStream>)> {
    cuda();
    let device = Device::new_cuda_with_stream(0)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    // SAFETY: all work is on one stream
    unsafe { stream.context().disable_event_tracking() };
    Ok((device, stream))
}

fn begin(stream: &CudaStream) -> Result<()> {
    // this mode refuses calls that a graph can't hold
    stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()
}

/// The work as a graph. Nothing runs.
fn record(stream: &Arc<CudaStream>, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    begin(stream)?;
    let recorded = work();
    let graph = stream.end_capture(Flags(0));
    recorded?;
    Ok(graph.w()?.expect("the driver gave no graph"))
}

/// Forward and backward recorded as a graph: nothing runs meanwhile, and each replay computes from the logits of its
/// own time.
#[test]
fn losses_are_replayed_from_a_graph() -> Result<()> {
    let _turn = turn();
    let (device, stream) = device_with_stream()?;
    let work = Work::new(&device, DType::I64)?;
    let logits = work.logits.as_detached_tensor().copy()?;
    let mut eager = vec![];
    for sign in [-1.0, 1.0] {
        work.logits.set(&logits.affine(sign, 0.0)?)?;
        work.run()?;
        eager.push(work.results()?);
    }
    assert_ne!(eager[0], eager[1]);

    for out in &work.out {
        out.zero_set()?;
    }
    let graph = record(&stream, || work.run())?;
    assert!(work.results()?.iter().all(|&v| v == 0.0), "the recording ran");
    for (sign, eager) in [-1.0, 1.0].into_iter().zip(&eager) {
        work.logits.set(&logits.affine(sign, 0.0)?)?;
        graph.launch().w()?;
        assert_eq!(&work.results()?, eager);
    }
    Ok(())
}

/// Replays between eager calls of the same losses and of others: each gives what it gives alone, bit for bit.
#[test]
fn replays_and_eager_calls_take_turns() -> Result<()> {
    let _turn = turn();
    let (device, stream) = device_with_stream()?;
    let (replayed, eager) = (Work::new(&device, DType::U32)?, Work::new(&device, DType::U32)?);
    let logits = eager.logits.as_detached_tensor().copy()?;
    let others = |logits: &Tensor| -> Result<Tensor> {
        let labels = eager.labels.flatten_all()?;
        let losses = [
            log_softmax(logits, 1)?.flatten_all()?,
            binary_cross_entropy_with_logit(&logits.flatten_all()?, &labels)?.reshape(1)?,
            sigmoid_focal(logits, &eager.labels)?.flatten_all()?,
        ];
        Tensor::cat(&losses, 0)
    };
    let rounds: Vec<_> = (0..12).map(|round| logits.affine(1.0 - 0.2 * round as f64, 0.0)).collect::<Result<_>>()?;
    let mut alone = vec![];
    for logits in &rounds {
        eager.logits.set(logits)?;
        eager.run()?;
        alone.push((eager.results()?, others(logits)?.to_vec1::<f32>()?));
    }
    replayed.run()?;
    let graph = record(&stream, || replayed.run())?;
    for (round, (logits, (losses, other_losses))) in rounds.iter().zip(&alone).enumerate() {
        for work in [&replayed, &eager] {
            work.logits.set(logits)?;
            work.out.iter().try_for_each(Tensor::zero_set)?;
        }
        let mut other = None;
        let (mut replay, mut again) = (|| graph.launch().w(), || eager.run());
        let mut different = || others(logits).map(|loss| other = Some(loss));
        let mut calls: [&mut dyn FnMut() -> Result<()>; 3] = [&mut replay, &mut again, &mut different];
        // in each order, with nothing waited for
        calls.rotate_left(round % 3);
        if round % 2 == 0 {
            calls.reverse();
        }
        calls.into_iter().try_for_each(|call| call())?;
        assert_eq!(&replayed.results()?, losses, "the replay of round {round}");
        assert_eq!(&eager.results()?, losses, "the eager calls of round {round}");
        assert_eq!(&other.unwrap().to_vec1::<f32>()?, other_losses, "the other losses of round {round}");
    }
    Ok(())
}

/// Means over several blocks, the last of which adds up what all have left.
struct Means {
    inputs: Vec<(Tensor, Tensor)>,
    out: Tensor,
}

impl Means {
    fn new(device: &Device) -> Result<Self> {
        let input = |(rows, classes): (usize, usize)| -> Result<_> {
            let logits =
                Tensor::arange(0f32, (rows * classes) as f32, &Device::Cpu)?.sin()?.reshape((rows, classes))?;
            Ok((logits.to_device(device)?, Tensor::zeros(rows, DType::U32, device)?))
        };
        let inputs = [(70, 300), (1500, 10), (300, 70)].into_iter().map(input).collect::<Result<Vec<_>>>()?;
        let out = Tensor::zeros(inputs.len(), DType::F32, device)?;
        Ok(Means { inputs, out })
    }

    fn run(&self) -> Result<()> {
        let mut means = self.inputs.iter().map(|(logits, target)| cross_entropy(logits, target)?.reshape(1));
        (0..self.inputs.len()).try_for_each(|i| self.out.slice_set(&means.next().unwrap()?, 0, i))
    }

    /// Some rounds of runs that nothing waits for, and what each round leaves.
    fn rounds(&self, run: impl Fn() -> Result<()>) -> Result<Vec<Vec<f32>>> {
        let round = |_| {
            self.out.zero_set()?;
            (0..10).try_for_each(|_| run())?;
            self.out.to_vec1()
        };
        (0..8).map(round).collect()
    }
}

/// Replays in one stream beside eager calls in another thread's, whose launches overlap: both give what they give
/// alone, bit for bit.
#[test]
fn replays_and_eager_calls_run_at_once() -> Result<()> {
    let _turn = turn();
    let (device, stream) = device_with_stream()?;
    let replayed = Means::new(&device)?;
    replayed.run()?;
    let alone: Vec<f32> = replayed.out.to_vec1()?;
    let graph = record(&stream, || replayed.run())?;
    let (replays, eager) = std::thread::scope(|scope| {
        let eager = scope.spawn(|| {
            let means = Means::new(&cuda())?;
            means.rounds(|| means.run())
        });
        (replayed.rounds(|| graph.launch().w()), eager.join().expect("no panic"))
    });
    for (what, rounds) in [("replays", replays?), ("eager calls", eager?)] {
        for (round, results) in rounds.into_iter().enumerate() {
            assert_eq!(results, alone, "round {round} of the {what}");
        }
    }
    Ok(())
}

/// Waiting for the device, or copying from it, ends a recording without a graph. The stream works on.
#[test]
fn waits_and_copies_to_the_host_invalidate_a_recording() -> Result<()> {
    let _turn = turn();
    let (device, stream) = device_with_stream()?;
    let loss = Var::ones((6, 5), DType::F32, &device)?.sum_all()?;
    let copy = || loss.to_scalar::<f32>().map(|_| ());
    let wait = || device.synchronize();
    let calls: [(&str, &dyn Fn() -> Result<()>); 2] = [("copy", &copy), ("wait", &wait)];
    for (name, call) in calls {
        begin(&stream)?;
        assert!(call().is_err(), "{name}");
        // the first call after a failed one in a destructor returns that one's error
        let _ = stream.context().check_err();
        assert_eq!(stream.capture_status().w()?, Status::CU_STREAM_CAPTURE_STATUS_INVALIDATED, "{name}");
        assert!(loss.affine(2.0, 0.0).is_err(), "{name}: the stream went on");
        let _ = stream.context().check_err();
        match stream.end_capture(Flags(0)) {
            Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)) => (),
            Err(other) => panic!("{name}: {other}"),
            Ok(_) => panic!("{name}: the recording is valid"),
        }
        assert_eq!(loss.to_scalar::<f32>()?, 30.0, "{name}");
    }
    Ok(())
}

#[test]
fn the_memory_pool_has_attributes() -> Result<()> {
    let _turn = turn();
    let (device, stream) = device_with_stream()?;
    // SAFETY: the device is the stream's
    let pool = unsafe { result::device::get_default_mem_pool(stream.context().cu_device()) }.w()?;
    let get = |attribute| {
        let mut value = 0u64;
        // SAFETY: these attributes are of 64 bits
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.w().map(|()| value)
    };
    let set = |attribute, mut value: u64| {
        // SAFETY: as above
        unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) }.w()
    };
    let (threshold, used) = (Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    let before = get(threshold)?;
    for bytes in [u64::MAX, 1 << 20] {
        set(threshold, bytes)?;
        assert_eq!(get(threshold)?, bytes);
    }
    set(threshold, before)?;
    let start = get(used)?;
    let numbers = Tensor::zeros(1 << 18, DType::F32, &device)?;
    assert!(get(used)? >= start + (1 << 20));
    drop(numbers);
    // it is freed once the stream gets there
    device.synchronize()?;
    assert_eq!(get(used)?, start);
    Ok(())
}
