//! What a program built with the `cuda` feature asks of the driver, and what it does where that fails: a broken driver leaves
//! the CPU as `best_device`, and no loss copies to the host or waits for the device.
//!
//! This binary has functions of the driver's names, which the linker prefers to those of the driver's library. They fail
//! where a test says so and else call the library's.
#![cfg(all(feature = "cuda", target_os = "linux"))]

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::{CrossEntropyLoss, best_device, cross_entropy, multi_label_soft_margin};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The function that fails, with what it returns.
static BROKEN: Mutex<Option<(&'static CStr, c_int)>> = Mutex::new(None);
/// Whether it was called.
static REACHED: AtomicBool = AtomicBool::new(false);
static PANICS: AtomicUsize = AtomicUsize::new(0);
/// Tests in turn: they share the driver.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_broken(function: Option<(&'static CStr, c_int)>) {
    *BROKEN.lock().unwrap() = function;
    REACHED.store(false, Relaxed);
}

/// What `function` returns instead of being called, if it is the broken one.
fn failure(function: &CStr) -> Option<c_int> {
    let (broken, error) = (*BROKEN.lock().unwrap())?;
    if broken != function {
        return None;
    }
    REACHED.store(true, Relaxed);
    Some(error)
}

/// The library's function of that name.
fn library(function: &CStr) -> *mut c_void {
    // SAFETY: looks a name up
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, function.as_ptr()) };
    assert!(!found.is_null(), "the driver's library has no {function:?}");
    found
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
    cuMemAllocAsync(memory: *mut u64, bytes: usize, stream: Pointer);
    cuModuleLoadData(module: *mut Pointer, image: *const c_char);
    cuLaunchKernel(
        function: Pointer, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Pointer, parameters: *mut Pointer, extra: *mut Pointer
    );
    cuMemcpyDtoHAsync_v2(to: Pointer, from: u64, bytes: usize, stream: Pointer);
    cuStreamSynchronize(stream: Pointer);
    cuCtxSynchronize();
    cuEventSynchronize(event: Pointer);
}

/// What a driver answers, from the first call to the last: no device, a library that doesn't fit the kernel's module, a
/// device that went away or belongs to another process, no memory, kernels newer than the driver, a device that fails.
const FAILURES: [(&CStr, c_int); 10] = [
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
    for broken in FAILURES {
        set_broken(Some(broken));
        assert!(best_device().is_cpu(), "{broken:?}");
        assert!(REACHED.load(Relaxed) || !works, "{broken:?} was not called");
        loss_on_the_cpu_is_right()?;
        assert_eq!(PANICS.load(Relaxed), 0, "{broken:?}");
    }
    // the failures were the reason
    set_broken(None);
    assert_eq!(best_device().is_cuda(), works);
    Ok(())
}

/// Where class indices lie apart, in every dtype of theirs, and with every pass.
#[test]
fn losses_do_not_wait_for_the_device() -> Result<()> {
    let _turn = turn();
    if !best_device().is_cuda() {
        println!("no CUDA device: nothing was tested");
        return Ok(());
    }
    for waiting in [c"cuMemcpyDtoHAsync_v2", c"cuStreamSynchronize", c"cuCtxSynchronize", c"cuEventSynchronize"] {
        // an error stays with the device that had it
        let device = Device::new_cuda(0)?;
        let logits = Var::ones((6, 5, 4), DType::F32, &device)?;
        let labels = Tensor::ones((6, 5, 4), DType::F32, &device)?;
        let target = Tensor::new(&[0u32, 1, 2, 3, 4, 0], &Device::Cpu)?.broadcast_as((4, 6))?.contiguous()?;
        for index in [DType::U8, DType::U32, DType::I32, DType::I64] {
            let target = target.to_dtype(index)?.to_device(&device)?.t()?;
            set_broken(Some((waiting, 700)));
            cross_entropy(&logits, &target)?.backward()?;
            CrossEntropyLoss::new().with_label_smoothing(0.1).loss_and_grad(&logits, &target)?;
            CrossEntropyLoss::new().statistics(&logits, &target)?;
            multi_label_soft_margin(&logits, &labels)?.backward()?;
            assert!(!REACHED.load(Relaxed), "{waiting:?} with class indices of {index:?}");
            set_broken(None);
        }
    }
    // what waits would be seen
    let device = Device::new_cuda(0)?;
    let loss = Var::ones((6, 5), DType::F32, &device)?.sum_all()?;
    set_broken(Some((c"cuMemcpyDtoHAsync_v2", 700)));
    assert!(loss.to_scalar::<f32>().is_err() && REACHED.load(Relaxed));
    set_broken(Some((c"cuStreamSynchronize", 700)));
    assert!(device.synchronize().is_err() && REACHED.load(Relaxed));
    set_broken(None);
    Ok(())
}
