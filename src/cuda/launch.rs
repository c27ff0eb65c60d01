//! Memory as kernels take it, and launches.

use super::gpu::{Gpu, Kernel, Module};
use super::work::tally;
use crate::cuda::grid::Grid;
use crate::custom_op::Arg;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice, WrapErr};
use candle_core::{DType, Layout, Result, bail};
use cudarc::driver::{
    CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, sys,
};
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Calls a macro with the dtypes that kernels read and write, ahead of its arguments.
macro_rules! with_dtypes {
    ($macro:ident!($($args:tt)*)) => { $macro!([U8 U32 I16 I32 I64 F16 BF16 F32 F64] $($args)*) };
}

/// Applies an expression to the typed memory of a storage: `Some` of its result, or `None` for a dtype of no kernel.
macro_rules! map_slice {
    ([$($dtype:ident)*] $slice:expr, |$typed:ident| $result:expr) => {
        match $slice {
            $(CudaStorageSlice::$dtype($typed) => Some($result),)*
            _ => None,
        }
    };
}

/// Allocates memory for numbers of a dtype: `Some` of the result, or `None` for a dtype of no kernel.
macro_rules! alloc_slice {
    ([$($dtype:ident)*] $device:expr, $of:expr, $len:expr) => {
        match $of {
            $(DType::$dtype => Some($device.alloc($len).map(CudaStorageSlice::$dtype)),)*
            _ => None,
        }
    };
}

macro_rules! tag_of {
    ([$($dtype:ident)*] $of:expr) => {
        match $of {
            $(DType::$dtype => Some(Tag::$dtype),)*
            _ => None,
        }
    };
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
    I16 = 8,
}

impl Tag {
    pub fn of(dtype: DType) -> Result<Self> {
        match with_dtypes!(tag_of!(dtype)) {
            Some(tag) => Ok(tag),
            None => bail!("no loss kernel reads an operand of dtype {dtype:?}"),
        }
    }
}

// SAFETY: an i32 to the device
unsafe impl DeviceRepr for Tag {}

/// The memory of a tensor from its first element on, whatever its dtype. Pass it with [`Launch::read`].
pub(crate) struct InputView<'a> {
    pub bytes: CudaView<'a, u8>,
    pub tag: Tag,
}

impl<'a> InputView<'a> {
    pub fn new(storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        let start = layout.start_offset();
        let bytes = with_dtypes!(map_slice!(&storage.slice, |s| from(s, start))).flatten();
        let Some(bytes) = bytes else { bail!("no loss kernel reads {:?} from element {start} on", storage.dtype()) };
        Ok(InputView { bytes, tag: Tag::of(storage.dtype())? })
    }
}

fn from<T>(slice: &CudaSlice<T>, start: usize) -> Option<CudaView<'_, u8>> {
    let view = slice.try_slice(start..)?;
    let len = view.len() * std::mem::size_of::<T>();
    // SAFETY: every byte of a number is a u8, and this is a view of exactly the same memory
    unsafe { view.transmute(len) }
}

/// The upstream gradient of `count` losses in the dtype `arithmetic`, and whether it has a number for each of them, not
/// one for all.
pub(crate) fn upstream_view<'a>(
    name: &str,
    (count, arithmetic): (usize, DType),
    (storage, layout): Arg<'a, CudaStorage>,
) -> Result<(InputView<'a>, bool)> {
    let numbers = layout.shape().elem_count();
    if !layout.is_contiguous() || (numbers != 1 && numbers != count) || storage.dtype() != arithmetic {
        bail!(
            "{name}: upstream gradient {:?} of dtype {:?}, expected 1 or {count} contiguous numbers of {arithmetic:?}",
            layout.dims(),
            storage.dtype()
        );
    }
    Ok((InputView::new(storage, layout)?, numbers != 1))
}

/// The memory of an output, whatever its dtype. Pass it with [`Launch::write`].
pub(crate) fn output(slice: &mut CudaStorageSlice) -> Result<CudaViewMut<'_, u8>> {
    fn all<T>(slice: &mut CudaSlice<T>) -> Option<CudaViewMut<'_, u8>> {
        let len = slice.len() * std::mem::size_of::<T>();
        // SAFETY: every byte of a number is a u8, and this is a view of exactly the same memory
        unsafe { slice.transmute_mut(len) }
    }
    let bytes = with_dtypes!(map_slice!(slice, |s| all(s))).flatten();
    match bytes {
        Some(bytes) => Ok(bytes),
        None => bail!("no loss kernel writes an output of this dtype"),
    }
}

/// The arrays that a call keeps in one allocation, as each allocation costs the host about as much as a launch. They
/// begin on 16 bytes.
#[derive(Default)]
pub(crate) struct Workspace {
    bytes: usize,
}

impl Workspace {
    /// Plans an array of that many bytes. Returns where it begins, in bytes from the allocation's start.
    pub fn add(&mut self, bytes: usize) -> u64 {
        let start = self.bytes.next_multiple_of(16);
        self.bytes = start + bytes;
        start as u64
    }

    /// The memory, as numbers of a dtype; `None` if no array was added.
    ///
    /// # Safety
    /// It is not initialised: kernels write what others, or the backward, read.
    pub unsafe fn alloc(self, device: &CudaDevice, dtype: DType) -> Result<Option<CudaStorageSlice>> {
        let numbers = self.bytes.div_ceil(dtype.size_in_bytes());
        // SAFETY: by this function's contract; there is a number
        (numbers > 0).then(|| unsafe { alloc(device, dtype, numbers) }).transpose()
    }
}

/// Memory for an output that a kernel writes completely.
///
/// # Safety
/// It is not initialised: a kernel writes every element before anything reads it. `len` is not 0.
pub(crate) unsafe fn alloc(device: &CudaDevice, dtype: DType, len: usize) -> Result<CudaStorageSlice> {
    tally(|work| work.allocations += 1);
    // SAFETY: by this function's contract
    match unsafe { with_dtypes!(alloc_slice!(device, dtype, len)) } {
        Some(slice) => slice,
        None => bail!("no loss kernel writes an output of dtype {dtype:?}"),
    }
}

/// A copy to the host, which waits for the device.
pub(crate) fn to_host<T: DeviceRepr>(device: &CudaDevice, view: &CudaView<T>) -> Result<Vec<T>> {
    tally(|work| work.waits += 1);
    device.clone_dtoh(view)
}

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
    match with_dtypes!(map_slice!(&storage.slice, |s| at(device, s, index))) {
        Some(element) => element,
        None => bail!("no loss kernel reads {:?}", storage.dtype()),
    }
}

/// A launch in the making: the kernel's parameters, in their order.
///
/// Where cudarc orders the streams of a context, the stream waits for the memory of each parameter when the parameter
/// is added, and marks that memory as used when this is dropped, after the launch.
pub(crate) struct Launch<'a> {
    stream: &'a Arc<CudaStream>,
    kernel: Kernel,
    /// In the order of the parameters that they are of.
    addresses: Vec<u64>,
    parameters: Vec<Parameter<'a>>,
    used: Vec<SyncOnDrop<'a>>,
}

enum Parameter<'a> {
    /// An address, or a struct of them: where it begins among the addresses.
    Addresses(usize),
    /// The bytes of a value, padding included.
    Value(&'a [MaybeUninit<u8>]),
}

/// Room for what most launches have of parameters, and of pointers in them.
const USUAL_PARAMETERS: usize = 16;

impl<'a> Launch<'a> {
    pub fn new(gpu: &Gpu, stream: &'a Arc<CudaStream>, module: &Module, name: &str) -> Result<Self> {
        Ok(Launch {
            stream,
            kernel: gpu.kernel(module, name)?,
            addresses: Vec::with_capacity(USUAL_PARAMETERS),
            parameters: Vec::with_capacity(USUAL_PARAMETERS),
            used: Vec::with_capacity(USUAL_PARAMETERS),
        })
    }

    pub fn value<T: DeviceRepr>(&mut self, value: &'a T) -> &mut Self {
        // SAFETY: the bytes of one value, borrowed for as long as it is, whose padding need not be initialised
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) };
        self.parameters.push(Parameter::Value(bytes));
        self
    }

    pub fn null(&mut self) -> &mut Self {
        self.address(0)
    }

    /// An address that [`Self::place`] gave, or one in memory that no tensor or slice owns.
    pub fn address(&mut self, address: u64) -> &mut Self {
        self.parameters.push(Parameter::Addresses(self.addresses.len()));
        self.addresses.push(address);
        self
    }

    /// Where memory begins that the kernel writes, for parameters that point into it. Adds none.
    pub fn place<T>(&mut self, memory: &'a mut impl DevicePtrMut<T>) -> u64 {
        let (address, used) = memory.device_ptr_mut(self.stream);
        self.used.push(used);
        address
    }

    pub fn read<T>(&mut self, memory: &'a impl DevicePtr<T>) -> &mut Self {
        let (address, used) = memory.device_ptr(self.stream);
        self.used.push(used);
        self.address(address)
    }

    pub fn write<T>(&mut self, memory: &'a mut impl DevicePtrMut<T>) -> &mut Self {
        let address = self.place(memory);
        self.address(address)
    }

    /// Operands that the kernel takes as one struct of pointers, null where they are absent.
    pub fn read_all<T: DevicePtr<U> + 'a, U>(&mut self, memories: &[Option<&'a T>]) -> &mut Self {
        self.parameters.push(Parameter::Addresses(self.addresses.len()));
        for memory in memories {
            let address = memory.map_or(0, |memory| {
                let (address, used) = memory.device_ptr(self.stream);
                self.used.push(used);
                address
            });
            self.addresses.push(address);
        }
        self
    }

    /// Outputs that the kernel takes as one struct of pointers.
    pub fn write_all<T: DevicePtrMut<U> + 'a, U>(&mut self, memories: &'a mut [T]) -> &mut Self {
        self.parameters.push(Parameter::Addresses(self.addresses.len()));
        for memory in memories {
            let address = self.place(memory);
            self.addresses.push(address);
        }
        self
    }

    /// An operand, or a null pointer where it is absent.
    pub fn read_if<T: DevicePtr<U> + 'a, U>(&mut self, memory: Option<&'a T>) -> &mut Self {
        match memory {
            Some(memory) => self.read(memory),
            None => self.null(),
        }
    }

    /// An output, or a null pointer where it is absent.
    pub fn write_if<T: DevicePtrMut<U> + 'a, U>(&mut self, memory: Option<&'a mut T>) -> &mut Self {
        match memory {
            Some(memory) => self.write(memory),
            None => self.null(),
        }
    }

    /// # Safety
    /// The parameters are what the kernel expects, and the grid keeps it inside of their memory.
    pub unsafe fn run(self, grid: Grid) -> Result<()> {
        tally(|work| work.launches += 1);
        self.stream.context().bind_to_thread().w()?;
        let pointer = |parameter: &Parameter| -> *const c_void {
            match parameter {
                Parameter::Addresses(first) => self.addresses.as_ptr().wrapping_add(*first).cast(),
                Parameter::Value(bytes) => bytes.as_ptr().cast(),
            }
        };
        let mut parameters: Vec<*mut c_void> = self.parameters.iter().map(|p| pointer(p).cast_mut()).collect();
        let mut attributes = grid.attributes();
        let config = grid.config(&mut attributes, self.stream.cu_stream());
        // SAFETY: by this function's contract; the driver copies the parameters, which live until here, and the
        // configuration
        unsafe {
            sys::cuLaunchKernelEx(&config, self.kernel.function, parameters.as_mut_ptr(), std::ptr::null_mut()).result()
        }
        .w()
    }
}
