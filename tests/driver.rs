//! What a program built with the `cuda` feature asks of the driver, and what it does where that fails: a broken driver leaves
//! the CPU as `best_device`; no loss copies to the host or waits for the device, so that a CUDA graph can record it.
//!
//! This binary has functions of the driver's names, which the linker prefers to those of the driver's library. They fail
//! where a test says so and else call the library's.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{CrossEntropyLoss, best_device, cross_entropy, multi_label_soft_margin};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The functions that fail, with what they return.
static BROKEN: Mutex<&[(&CStr, c_int)]> = Mutex::new(&[]);
/// One of them that was called.
static REACHED: Mutex<Option<&CStr>> = Mutex::new(None);
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
fn find(function: &CStr) -> Option<*mut c_void> {
    // SAFETY: looks a name up
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, function.as_ptr()) };
    (!found.is_null()).then_some(found)
}

fn library(function: &CStr) -> *mut c_void {
    find(function).unwrap_or_else(|| panic!("the driver's library has no {function:?}"))
}

/// Says what no assertion does, also where the output of tests that pass is not shown.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
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
            if let Some(error) = failure(NAME) {
                return error;
            }
            // SAFETY: the signature is that of cuda.h
            let function: unsafe extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(library(NAME)) };
            // SAFETY: the caller's promise
            unsafe { function($($argument),*) }
        }
    )*};
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
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Relaxed);
        hook(info);
    }));
    let works = Device::new_cuda(0).is_ok();
    assert_eq!(best_device().is_cuda(), works);
    for broken in &FAILURES {
        set_broken(std::slice::from_ref(broken));
        assert!(best_device().is_cpu(), "{broken:?}");
        assert!(reached().is_some() || !works, "{broken:?} was not called");
        loss_on_the_cpu_is_right()?;
        assert_eq!(PANICS.load(Relaxed), 0, "{broken:?}");
    }
    // the failures were the reason
    set_broken(&[]);
    assert_eq!(best_device().is_cuda(), works);
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
    if !best_device().is_cuda() {
        say("no CUDA device: whether losses wait for it was not tested");
        return Ok(());
    }
    let device = Device::new_cuda(0)?;
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

/// Forward and backward recorded as a graph: nothing runs then, and each replay computes from what the logits are by then.
#[test]
fn losses_are_replayed_from_a_graph() -> Result<()> {
    let _turn = turn();
    if !best_device().is_cuda() || find(c"cuStreamBeginCapture_v2").is_none() {
        say("no CUDA device whose driver records graphs: their replay was not tested");
        return Ok(());
    }
    // the default stream can't be recorded, nor can it be waited in a recording for what came before
    let device = Device::new_cuda_with_stream(0)?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: all work is on one stream
    unsafe { cuda.disable_event_tracking() };
    let stream: Pointer = cuda.cuda_stream().cu_stream().cast();
    let work = Work::new(&device, DType::I64)?;
    let logits = work.logits.as_detached_tensor().copy()?;
    let mut eager = vec![];
    for sign in [-1.0, 1.0] {
        work.logits.set(&logits.affine(sign, 0.0)?)?;
        work.run()?;
        eager.push(work.results()?);
    }
    assert_ne!(eager[0], eager[1]);

    let (mut graph, mut executable): (Pointer, Pointer) = (std::ptr::null_mut(), std::ptr::null_mut());
    for out in &work.out {
        out.zero_set()?;
    }
    // SAFETY: the signatures are those of cuda.h
    unsafe {
        type Begin = unsafe extern "C" fn(Pointer, c_uint) -> c_int;
        type End = unsafe extern "C" fn(Pointer, *mut Pointer) -> c_int;
        type Instantiate = unsafe extern "C" fn(*mut Pointer, Pointer, u64) -> c_int;
        let begin = std::mem::transmute::<Pointer, Begin>(library(c"cuStreamBeginCapture_v2"));
        let end = std::mem::transmute::<Pointer, End>(library(c"cuStreamEndCapture"));
        let instantiate = std::mem::transmute::<Pointer, Instantiate>(library(c"cuGraphInstantiateWithFlags"));
        // CU_STREAM_CAPTURE_MODE_RELAXED
        assert_eq!(begin(stream, 2), 0);
        let recorded = work.run();
        assert_eq!(end(stream, &mut graph), 0);
        recorded?;
        assert_eq!(instantiate(&mut executable, graph, 0), 0);
    }
    assert!(work.results()?.iter().all(|&v| v == 0.0), "the recording ran");
    // SAFETY: the signature is that of cuda.h
    let launch: unsafe extern "C" fn(Pointer, Pointer) -> c_int =
        unsafe { std::mem::transmute(library(c"cuGraphLaunch")) };
    for (sign, eager) in [-1.0, 1.0].into_iter().zip(&eager) {
        work.logits.set(&logits.affine(sign, 0.0)?)?;
        // SAFETY: the graph's memory is that of `work`, which is alive
        assert_eq!(unsafe { launch(executable, stream) }, 0);
        assert_eq!(&work.results()?, eager);
    }
    Ok(())
}
