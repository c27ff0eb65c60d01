//! Modules, arguments and launches.

use crate::plan::Grid;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaView, CudaViewMut, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use half::{bf16, f16};

/// One compiled `kernels/*.cu`. Each device loads it at its first use and keeps it.
pub(crate) struct Module {
    /// Unique among all crates that load kernels into candle's devices.
    pub key: &'static str,
    pub ptx: &'static str,
}

impl Module {
    pub fn function(&self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        #[cfg(test)]
        USED.with_borrow_mut(|used| used.insert((self.key, name.to_string())));
        Ok(device.get_or_load_custom_func(name, self.key, self.ptx)?.into_cuda_function())
    }
}

/// The dtype of an operand in the kernels' parameters: `DType` of `kernels/common.cuh`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    U8 = 0,
    U32 = 1,
    I32 = 2,
    I64 = 3,
    F16 = 4,
    BF16 = 5,
    F32 = 6,
    F64 = 7,
}

impl Tag {
    pub fn of(dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::U8 => Tag::U8,
            DType::U32 => Tag::U32,
            DType::I32 => Tag::I32,
            DType::I64 => Tag::I64,
            DType::F16 => Tag::F16,
            DType::BF16 => Tag::BF16,
            DType::F32 => Tag::F32,
            DType::F64 => Tag::F64,
            other => bail!("no loss kernel reads an operand of dtype {other:?}"),
        })
    }
}

// SAFETY: an i32 to the device
unsafe impl DeviceRepr for Tag {}

/// The dtype of the arithmetic, the sums and the losses of an input of `dtype`.
pub(crate) fn arithmetic(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The memory of a tensor from its first element on, whatever its dtype. Pass it with `arg(&input.bytes)`.
pub(crate) struct Input<'a> {
    pub bytes: CudaView<'a, u8>,
    pub tag: Tag,
}

impl<'a> Input<'a> {
    pub fn new(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        let start = layout.start_offset();
        let bytes = match &storage.slice {
            CudaStorageSlice::U8(s) => from(s, start),
            CudaStorageSlice::U32(s) => from(s, start),
            CudaStorageSlice::I32(s) => from(s, start),
            CudaStorageSlice::I64(s) => from(s, start),
            CudaStorageSlice::F16(s) => from(s, start),
            CudaStorageSlice::BF16(s) => from(s, start),
            CudaStorageSlice::F32(s) => from(s, start),
            CudaStorageSlice::F64(s) => from(s, start),
            _ => None,
        };
        let Some(bytes) = bytes else { bail!("no loss kernel reads {:?} from element {start} on", storage.dtype()) };
        Ok(Input { bytes, tag: Tag::of(storage.dtype())? })
    }
}

fn from<T>(slice: &CudaSlice<T>, start: usize) -> Option<CudaView<'_, u8>> {
    let view = slice.try_slice(start..)?;
    let len = view.len() * std::mem::size_of::<T>();
    // SAFETY: every byte of a number is a u8, and this is a view of exactly the same memory
    unsafe { view.transmute(len) }
}

/// The memory of an output, whatever its dtype. Pass it with `arg(&mut bytes)`, so that cudarc records the write.
pub(crate) fn output(slice: &mut CudaStorageSlice) -> Result<CudaViewMut<'_, u8>> {
    fn all<T>(slice: &mut CudaSlice<T>) -> Option<CudaViewMut<'_, u8>> {
        let len = slice.len() * std::mem::size_of::<T>();
        // SAFETY: every byte of a number is a u8, and this is a view of exactly the same memory
        unsafe { slice.transmute_mut(len) }
    }
    let bytes = match slice {
        CudaStorageSlice::U8(s) => all(s),
        CudaStorageSlice::U32(s) => all(s),
        CudaStorageSlice::I32(s) => all(s),
        CudaStorageSlice::I64(s) => all(s),
        CudaStorageSlice::F16(s) => all(s),
        CudaStorageSlice::BF16(s) => all(s),
        CudaStorageSlice::F32(s) => all(s),
        CudaStorageSlice::F64(s) => all(s),
        _ => None,
    };
    match bytes {
        Some(bytes) => Ok(bytes),
        None => bail!("no loss kernel writes an output of this dtype"),
    }
}

/// Memory for an output that a kernel writes completely.
///
/// # Safety
/// It is not initialised: a kernel writes every element before anything reads it. `len` is not 0.
pub(crate) unsafe fn alloc(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorageSlice> {
    tally(|work| work.allocations += 1);
    // SAFETY: by this function's contract
    unsafe {
        Ok(match dtype {
            DType::U8 => CudaStorageSlice::U8(device.alloc(len)?),
            DType::U32 => CudaStorageSlice::U32(device.alloc(len)?),
            DType::I32 => CudaStorageSlice::I32(device.alloc(len)?),
            DType::I64 => CudaStorageSlice::I64(device.alloc(len)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc::<f16>(len)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc::<bf16>(len)?),
            DType::F32 => CudaStorageSlice::F32(device.alloc(len)?),
            DType::F64 => CudaStorageSlice::F64(device.alloc(len)?),
            other => bail!("no loss kernel writes an output of dtype {other:?}"),
        })
    }
}

/// Memory for partial results, which a kernel writes before another one, or its last block, reads them.
///
/// # Safety
/// As for [`alloc`].
pub(crate) unsafe fn partials<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    tally(|work| work.allocations += 1);
    // SAFETY: by this function's contract
    unsafe { device.alloc::<T>(len) }
}

/// A copy to the host, which waits for the device.
pub(crate) fn to_host<T: DeviceRepr>(device: &CudaDevice, view: &CudaView<T>) -> Result<Vec<T>> {
    tally(|work| work.waits += 1);
    device.clone_dtoh(view)
}

/// An operand that may be absent: a null pointer then.
pub(crate) fn push<'a>(builder: &mut LaunchArgs<'a>, input: &'a Option<Input>) {
    match input {
        Some(input) => builder.arg(&input.bytes),
        None => builder.arg(&NULL),
    };
}

/// An output that may be absent: a null pointer then.
pub(crate) fn push_output<'a>(builder: &mut LaunchArgs<'a>, output: &'a mut Option<CudaViewMut<u8>>) {
    match output {
        Some(bytes) => builder.arg(bytes),
        None => builder.arg(&NULL),
    };
}

/// The argument for a pointer that a kernel does not get.
pub(crate) static NULL: u64 = 0;

/// One element of a tensor, in row-major order: a copy to the host that waits for the device.
pub(crate) fn read_element(storage: &CudaStorage, layout: &Layout, mut element: usize) -> Result<f64> {
    let mut index = layout.start_offset();
    for (&size, &stride) in layout.dims().iter().zip(layout.stride()).rev() {
        index += element % size * stride;
        element /= size;
    }
    fn at<T: candle_core::WithDType + DeviceRepr>(
        device: &CudaDevice,
        slice: &CudaSlice<T>,
        index: usize,
    ) -> Result<f64> {
        let Some(view) = slice.try_slice(index..index + 1) else {
            bail!("no element {index} in {} elements", slice.len())
        };
        Ok(to_host(device, &view)?.first().map_or(f64::NAN, |v| v.to_f64()))
    }
    let device = &storage.device;
    match &storage.slice {
        CudaStorageSlice::U8(s) => at(device, s, index),
        CudaStorageSlice::U32(s) => at(device, s, index),
        CudaStorageSlice::I32(s) => at(device, s, index),
        CudaStorageSlice::I64(s) => at(device, s, index),
        CudaStorageSlice::F16(s) => at(device, s, index),
        CudaStorageSlice::BF16(s) => at(device, s, index),
        CudaStorageSlice::F32(s) => at(device, s, index),
        CudaStorageSlice::F64(s) => at(device, s, index),
        _ => bail!("no loss kernel reads {:?}", storage.dtype()),
    }
}

/// # Safety
/// The arguments are what the kernel expects, and the grid keeps it inside of their memory.
pub(crate) unsafe fn launch(builder: &mut LaunchArgs, grid: Grid) -> Result<()> {
    tally(|work| work.launches += 1);
    let config = LaunchConfig {
        grid_dim: grid.blocks.into(),
        block_dim: grid.threads.into(),
        shared_mem_bytes: grid.shared_bytes,
    };
    // SAFETY: by this function's contract
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// What a call made the driver do.
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

/// Counts what is done, in tests.
fn tally(count: impl FnOnce(&mut Work)) {
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
impl Module {
    /// The kernels that this thread has not asked for.
    pub fn unused(&self) -> Vec<&str> {
        let entries = self.ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.split('(').next());
        USED.with_borrow(|used| entries.filter(|name| !used.contains(&(self.key, name.to_string()))).collect())
    }
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
