//! The state that the process keeps for each GPU: its limits, the modules that were loaded, the tickets of launches.

use super::kernels;
use crate::cuda::grid::Grid;
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Result, bail};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Limit, CUfunction_attribute as Attribute, CUresult};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// One compiled file of `kernels/modules/`, as `build.rs` embeds it, compressed.
pub(crate) struct Module {
    /// Its place among all modules.
    pub index: usize,
    pub name: &'static str,
    /// The names of its kernels, sorted.
    pub kernels: &'static [&'static str],
    /// The machine code of the build's architecture. A GPU of another one refuses it.
    pub machine_code: &'static [u8],
    /// Text that the driver compiles for that architecture or, up to 89, a later one.
    pub ptx: &'static [u8],
}

/// The form in which a module was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    MachineCode,
    Ptx,
}

impl Module {
    /// The bytes that the driver takes: an ELF file, or text with a 0 at its end.
    pub fn image(&self, image: Image) -> Result<Vec<u8>> {
        let bytes = match image {
            Image::MachineCode => self.machine_code,
            Image::Ptx => self.ptx,
        };
        match miniz_oxide::inflate::decompress_to_vec_zlib(bytes) {
            Ok(mut bytes) => {
                bytes.extend((image == Image::Ptx).then_some(0));
                Ok(bytes)
            }
            Err(e) => bail!("the kernels of {} in this program are damaged: {e}", self.name),
        }
    }
}

/// Loads the machine code, or the PTX where the GPU or the driver has no use for that machine code.
pub(super) fn first_accepted<T>(
    mut load: impl FnMut(Image) -> Result<std::result::Result<T, DriverError>>,
) -> Result<(T, Image)> {
    match load(Image::MachineCode)? {
        Err(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE)) => {
            Ok((load(Image::Ptx)?.w()?, Image::Ptx))
        }
        loaded => Ok((loaded.w()?, Image::MachineCode)),
    }
}

/// A kernel of a loaded module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    pub function: sys::CUfunction,
}

// SAFETY: a handle of the driver, which any thread may use
unsafe impl Send for Kernel {}
// SAFETY: a handle of the driver, which several threads may use at once
unsafe impl Sync for Kernel {}

struct Loaded {
    module: sys::CUmodule,
    #[cfg(test)]
    image: Image,
    /// In the order of [`Module::kernels`].
    kernels: Box<[OnceLock<Kernel>]>,
}

// SAFETY: handles of the driver, which any thread may use
unsafe impl Send for Loaded {}
// SAFETY: handles of the driver, which several threads may use at once
unsafe impl Sync for Loaded {}

/// The first architecture with clusters.
const CLUSTERS: u32 = 90;
/// Tickets that one allocation holds.
const TICKETS: usize = 4096;

/// Counters in device memory by which the blocks of a launch find out which of them is the last (`is_last_block` of
/// `kernels/common.cuh`). A launch finds its ticket at 0 and leaves it at 0, so the launches of one stream, which run
/// one after the other, share a ticket. Launches of different streams run at once and have tickets of their own;
/// candle's devices give each thread a stream of its own.
#[derive(Default)]
struct Tickets {
    memory: Vec<CudaSlice<u32>>,
    /// Where the last allocation begins, and how many tickets of it were given out.
    first: u64,
    used: usize,
    /// By the number of the stream, which the driver gives no other stream, and no other thread's default stream.
    of_stream: HashMap<u64, u64>,
}

impl Tickets {
    /// One that was never given out.
    fn fresh(&mut self) -> Result<u64> {
        if self.memory.is_empty() || self.used == TICKETS {
            bail!("no counter is left for a loss in a CUDA graph's capture: compute one outside of a capture first");
        }
        self.used += 1;
        Ok(self.first + (size_of::<u32>() * (self.used - 1)) as u64)
    }

    /// A launch in a capture is replayed whenever and wherever its graph is: it has its ticket to itself.
    fn of(&mut self, stream: &Arc<CudaStream>) -> Result<u64> {
        if is_capturing(stream)? {
            return self.fresh();
        }
        // the other half is for captures, in which nothing can be allocated
        if self.memory.is_empty() || self.used > TICKETS / 2 {
            let memory = stream.alloc_zeros(TICKETS).w()?;
            self.first = memory.device_ptr(stream).0;
            self.used = 0;
            self.memory.push(memory);
            // other streams use it too
            stream.synchronize().w()?;
        }
        let number = number_of(stream)?;
        if let Some(&ticket) = self.of_stream.get(&number) {
            return Ok(ticket);
        }
        let ticket = self.fresh()?;
        self.of_stream.insert(number, ticket);
        Ok(ticket)
    }
}

fn is_capturing(stream: &CudaStream) -> Result<bool> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the stream is alive, and the result is written to a variable of its type
    unsafe { sys::cuStreamIsCapturing(stream.cu_stream(), &mut status) }.result().w()?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

fn number_of(stream: &CudaStream) -> Result<u64> {
    let mut number = 0;
    // SAFETY: the stream is alive, and the result is written to a variable of its type
    unsafe { sys::cuStreamGetId(stream.cu_stream(), &mut number) }.result().w()?;
    Ok(number)
}

/// A GPU that losses have been computed on. It is kept until the process ends, with its context and modules.
pub(crate) struct Gpu {
    context: Arc<CudaContext>,
    pub processors: u32,
    /// Shared memory of a block, static and dynamic.
    pub shared_bytes: u32,
    /// Whether the GPU and this build's kernels have clusters, and launches that overlap.
    pub clusters: bool,
    /// In the order of [`kernels::ALL`].
    modules: [OnceLock<Loaded>; kernels::ALL.len()],
    /// Held while a module is loaded, so that none is loaded twice.
    loading: Mutex<()>,
    /// Whether a cluster of that size and dynamic shared memory finds room, by kernel.
    fits: Mutex<HashMap<(usize, u32, u32), bool>>,
    tickets: Mutex<Tickets>,
    /// The GPU that the process used next.
    next: OnceLock<Box<Gpu>>,
}

/// A mutex that another thread poisoned still guards consistent data: nothing panics between two changes that belong
/// together.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Found by the driver's context, which all devices of one GPU share, without a lock or a call of the driver.
    pub fn of(device: &CudaDevice) -> Result<&'static Gpu> {
        static FIRST: OnceLock<Box<Gpu>> = OnceLock::new();
        let stream = device.cuda_stream();
        let context = stream.context();
        let mut place = &FIRST;
        loop {
            match place.get() {
                Some(gpu) if gpu.context.cu_ctx() == context.cu_ctx() => return Ok(gpu),
                Some(gpu) => place = &gpu.next,
                // of two threads that are here at once, the second finds the first one's GPU in this place
                None => drop(place.set(Box::new(Gpu::new(context)?))),
            }
        }
    }

    fn new(context: &Arc<CudaContext>) -> Result<Gpu> {
        let limit = |limit| context.attribute(limit).w();
        Ok(Gpu {
            context: context.clone(),
            processors: limit(Limit::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_bytes: limit(Limit::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            clusters: kernels::ARCHITECTURE >= CLUSTERS && limit(Limit::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? != 0,
            modules: [const { OnceLock::new() }; kernels::ALL.len()],
            loading: Default::default(),
            fits: Default::default(),
            tickets: Default::default(),
            next: OnceLock::new(),
        })
    }

    /// The kernel of that name, allowed all the shared memory that a block can have, and clusters of any size.
    pub fn kernel(&self, module: &Module, name: &str) -> Result<Kernel> {
        #[cfg(test)]
        super::work::note_use(module.name, name);
        let place = module.kernels.binary_search_by(|kernel| (*kernel).cmp(name)).ok();
        let loaded = self.loaded(module)?;
        let Some(place) = place.and_then(|place| loaded.kernels.get(place)) else {
            bail!("module {} has no kernel {name}", module.name)
        };
        if let Some(&kernel) = place.get() {
            return Ok(kernel);
        }
        // threads that are here at once get the same handle
        let kernel = self.load_kernel(loaded, name)?;
        Ok(*place.get_or_init(|| kernel))
    }

    fn loaded(&self, module: &Module) -> Result<&Loaded> {
        let Some(place) = self.modules.get(module.index) else { bail!("module {} is none of all", module.name) };
        if let Some(loaded) = place.get() {
            return Ok(loaded);
        }
        let _loading = lock(&self.loading);
        if let Some(loaded) = place.get() {
            return Ok(loaded);
        }
        self.context.bind_to_thread().w()?;
        let (loaded, _image) = first_accepted(|image| {
            let bytes = module.image(image)?;
            // SAFETY: an ELF file as the compiler wrote it, or text with a 0 at its end
            Ok(unsafe { result::module::load_data(bytes.as_ptr().cast::<c_void>()) })
        })?;
        Ok(place.get_or_init(|| Loaded {
            module: loaded,
            #[cfg(test)]
            image: _image,
            kernels: module.kernels.iter().map(|_| OnceLock::new()).collect(),
        }))
    }

    fn load_kernel(&self, loaded: &Loaded, name: &str) -> Result<Kernel> {
        self.context.bind_to_thread().w()?;
        let Ok(c_name) = CString::new(name) else { bail!("{name:?} is no kernel's name") };
        // SAFETY: the module is loaded and never unloaded
        let function = unsafe { result::module::get_function(loaded.module, c_name) }.w()?;
        let set = |attribute, value: u32| {
            // SAFETY: the function is of a loaded module
            unsafe { result::function::set_function_attribute(function, attribute, value as i32) }.w()
        };
        // SAFETY: the function is of a loaded module
        let fixed = unsafe {
            result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        };
        let dynamic = self.shared_bytes.saturating_sub(fixed.w()? as u32);
        set(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic)?;
        if self.clusters {
            set(Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
        }
        Ok(Kernel { function })
    }

    /// The form in which a module was loaded.
    #[cfg(test)]
    pub fn image_of(&self, module: &Module) -> Option<Image> {
        Some(self.modules.get(module.index)?.get()?.image)
    }

    /// Whether a launch's cluster finds room on this GPU. Where a process has only a part of the GPU, or others hold
    /// some of its multiprocessors, there may be too few neighbours for a large cluster.
    pub fn has_room(&self, kernel: Kernel, grid: &Grid) -> Result<bool> {
        let key = (kernel.function as usize, grid.cluster, grid.shared_bytes);
        if let Some(&fits) = lock(&self.fits).get(&key) {
            return Ok(fits);
        }
        self.context.bind_to_thread().w()?;
        let mut attributes = grid.attributes();
        let config = grid.config(&mut attributes, std::ptr::null_mut());
        let mut clusters = 0;
        // SAFETY: the configuration and its attributes live through the call, which writes a number to one
        let asked = unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, kernel.function, &config) }.result();
        let fits = match asked {
            Err(DriverError(CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE)) => false,
            asked => asked.w().map(|()| clusters > 0)?,
        };
        lock(&self.fits).insert(key, fits);
        Ok(fits)
    }

    /// The address of a counter that no launch that may run beside the next one in `stream` uses.
    pub fn ticket(&self, stream: &Arc<CudaStream>) -> Result<u64> {
        stream.context().bind_to_thread().w()?;
        lock(&self.tickets).of(stream)
    }
}

impl Grid {
    /// The cluster, where there is one, and the leave to overlap.
    pub fn attributes(&self) -> Vec<sys::CUlaunchAttribute> {
        let mut attributes = Vec::new();
        if self.cluster > 1 {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes.push(sys::CUlaunchAttribute { id, pad: [0; 4], value });
        }
        if self.overlaps {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            value.programmaticStreamSerializationAllowed = 1;
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes.push(sys::CUlaunchAttribute { id, pad: [0; 4], value });
        }
        attributes
    }

    /// For as long as the attributes live.
    pub fn config(&self, attributes: &mut [sys::CUlaunchAttribute], stream: sys::CUstream) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.blocks[0],
            gridDimY: self.blocks[1],
            gridDimZ: self.blocks[2],
            blockDimX: self.threads[0],
            blockDimY: self.threads[1],
            blockDimZ: self.threads[2],
            sharedMemBytes: self.shared_bytes,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }
}

#[cfg(test)]
impl Module {
    /// The kernels that this thread has not asked for.
    pub fn unused(&self) -> Vec<&'static str> {
        self.kernels.iter().copied().filter(|name| !super::work::is_used(self.name, name)).collect()
    }
}
