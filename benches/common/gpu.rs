//! Timing on a CUDA device, by events; and graphs, which replay work without the host.

use super::machine::{self, Machine};
use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice, Device, Error, Result};
use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUevent_flags};
use cudarc::driver::{CudaEvent, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::ffi::{CStr, c_ulonglong, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reads a buffer, 16 KB a block: each thread four independent vectors of 16 bytes. Their exclusive or is stored only where
/// it is a number that the buffer was not made to give.
const READ: &str = "
.version 7.0
.target sm_70
.address_size 64

.visible .entry read_all(.param .u64 data, .param .u64 out)
{
    .reg .b64 %rd<6>;
    .reg .b32 %r<24>;
    .reg .pred %p;
    ld.param.u64 %rd1, [data];
    ld.param.u64 %rd2, [out];
    cvta.to.global.u64 %rd1, %rd1;
    cvta.to.global.u64 %rd2, %rd2;
    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 16384;
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd4, %r2, 16;
    add.u64 %rd1, %rd1, %rd3;
    add.u64 %rd1, %rd1, %rd4;
    ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd1];
    ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%rd1+4096];
    ld.global.v4.u32 {%r11, %r12, %r13, %r14}, [%rd1+8192];
    ld.global.v4.u32 {%r15, %r16, %r17, %r18}, [%rd1+12288];
    xor.b32 %r3, %r3, %r4;
    xor.b32 %r5, %r5, %r6;
    xor.b32 %r7, %r7, %r8;
    xor.b32 %r9, %r9, %r10;
    xor.b32 %r11, %r11, %r12;
    xor.b32 %r13, %r13, %r14;
    xor.b32 %r15, %r15, %r16;
    xor.b32 %r17, %r17, %r18;
    xor.b32 %r3, %r3, %r5;
    xor.b32 %r7, %r7, %r9;
    xor.b32 %r11, %r11, %r13;
    xor.b32 %r15, %r15, %r17;
    xor.b32 %r3, %r3, %r7;
    xor.b32 %r11, %r11, %r15;
    xor.b32 %r3, %r3, %r11;
    setp.eq.u32 %p, %r3, 0x5EED5EED;
    @%p st.global.u32 [%rd2], %r3;
    ret;
}
";
const READ_BLOCK: usize = 16384;

pub fn failed(e: DriverError) -> Error {
    Error::msg(format!("{e:?}"))
}

pub struct Clock {
    stream: Arc<CudaStream>,
    read: CudaFunction,
    out: CudaSlice<u32>,
    /// Read before each sample, which has two purposes. What is timed finds neither its inputs in the cache nor lines there
    /// that have to be written back; and the device is busy while the host enqueues the work, so that the host's overhead is
    /// not measured as long as it is shorter than this.
    flush: CudaSlice<u8>,
    /// Whether the device's own clock may stand still, and the host's is good enough.
    rehearsal: bool,
}

impl Clock {
    fn event(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed)
    }

    // not every bench that includes this file asks for it
    #[allow(dead_code)]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Starts to read whole blocks of a buffer; the number of bytes.
    pub fn read(&self, data: &CudaSlice<u8>) -> Result<usize> {
        let blocks = data.len() / READ_BLOCK;
        let config = LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(&self.read);
        launch.arg(data).arg(&self.out);
        // SAFETY: the kernel reads 16 KB a block, which the buffer has, and may write the one number of `out`
        unsafe { launch.launch(config) }.map_err(failed)?;
        Ok(blocks * READ_BLOCK)
    }

    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let begun = Instant::now();
        self.read(&self.flush)?;
        let start = self.event()?;
        work()?;
        let end = self.event()?;
        end.synchronize().map_err(failed)?;
        let elapsed = Duration::from_secs_f64(f64::from(start.elapsed_ms(&end).map_err(failed)?) / 1e3);
        Ok(if self.rehearsal { begun.elapsed() } else { elapsed })
    }

    /// Records what `work` starts, without starting it. It must not wait for the device or copy from the host, and frees what
    /// it allocates.
    #[allow(dead_code)]
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let Some(driver) = GraphFunctions::find() else { return Err(Error::msg(NO_GRAPHS)) };
        self.stream.context().bind_to_thread().map_err(failed)?;
        let stream = self.stream.cu_stream().cast();
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the signatures are those of cuda.h, and the stream lives as long as `self`
        unsafe {
            check("cuStreamBeginCapture", (driver.begin)(stream, RELAXED))?;
            let worked = work();
            let ended = (driver.end)(stream, &mut graph);
            worked?;
            check("cuStreamEndCapture", ended)?;
            check("cuGraphInstantiate", (driver.instantiate)(&mut executable, graph, 0))?;
            check("cuGraphDestroy", (driver.destroy)(graph))?;
        }
        Ok(Graph { executable, driver, stream: self.stream.clone() })
    }
}

/// `CU_STREAM_CAPTURE_MODE_RELAXED`
const RELAXED: u32 = 2;
const NO_GRAPHS: &str = "this driver cannot record a graph";

type Pointer = *mut c_void;

type Begin = unsafe extern "C" fn(Pointer, u32) -> u32;
type End = unsafe extern "C" fn(Pointer, *mut Pointer) -> u32;
type Instantiate = unsafe extern "C" fn(*mut Pointer, Pointer, c_ulonglong) -> u32;
type Launch = unsafe extern "C" fn(Pointer, Pointer) -> u32;
type Destroy = unsafe extern "C" fn(Pointer) -> u32;

/// The driver's functions for graphs, looked up by name: a driver without them runs everything else.
#[derive(Clone, Copy)]
struct GraphFunctions {
    begin: Begin,
    end: End,
    instantiate: Instantiate,
    launch: Launch,
    destroy: Destroy,
    destroy_executable: Destroy,
}

impl GraphFunctions {
    fn find() -> Option<Self> {
        // SAFETY: the signatures are those of cuda.h
        unsafe {
            Some(GraphFunctions {
                begin: std::mem::transmute::<Pointer, Begin>(symbol(c"cuStreamBeginCapture_v2")?),
                end: std::mem::transmute::<Pointer, End>(symbol(c"cuStreamEndCapture")?),
                instantiate: std::mem::transmute::<Pointer, Instantiate>(symbol(c"cuGraphInstantiateWithFlags")?),
                launch: std::mem::transmute::<Pointer, Launch>(symbol(c"cuGraphLaunch")?),
                destroy: std::mem::transmute::<Pointer, Destroy>(symbol(c"cuGraphDestroy")?),
                destroy_executable: std::mem::transmute::<Pointer, Destroy>(symbol(c"cuGraphExecDestroy")?),
            })
        }
    }
}

/// A function of the libraries that this program is linked to.
#[cfg(target_os = "linux")]
fn symbol(name: &CStr) -> Option<Pointer> {
    // SAFETY: looks a name up
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

#[cfg(not(target_os = "linux"))]
fn symbol(_: &CStr) -> Option<Pointer> {
    None
}

fn check(what: &str, status: u32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(Error::msg(format!("{what}: CUDA error {status}"))) }
}

/// Recorded work.
pub struct Graph {
    executable: Pointer,
    driver: GraphFunctions,
    stream: Arc<CudaStream>,
}

impl Graph {
    /// Starts all of it.
    #[allow(dead_code)]
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the signature is that of cuda.h, and the stream lives as long as `self`
        check("cuGraphLaunch", unsafe { (self.driver.launch)(self.executable, self.stream.cu_stream().cast()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the signature is that of cuda.h; a replay that still runs goes on
        unsafe { (self.driver.destroy_executable)(self.executable) };
    }
}

/// The first GPU with a stream that can be recorded, which the default one can't.
#[allow(dead_code)]
pub fn recorder(rehearsal: bool) -> Result<Machine> {
    if GraphFunctions::find().is_none() {
        return Err(Error::msg(NO_GRAPHS));
    }
    let device = Device::new_cuda_with_stream(0)?;
    let Device::Cuda(cuda) = &device else { return Err(Error::msg("no CUDA device")) };
    // SAFETY: nothing that this device allocates is used on another stream. A recording can't wait for events from before.
    unsafe { cuda.disable_event_tracking() };
    machine(cuda, rehearsal)
}

pub fn machine(device: &CudaDevice, rehearsal: bool) -> Result<Machine> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let name = context.name().map_err(failed)?;
    let cache_bytes = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map_err(failed)?;
    let cache_bytes = (cache_bytes.max(0) as usize).max(1 << 20);
    let read = context.load_module(Ptx::from_src(READ)).and_then(|m| m.load_function("read_all")).map_err(failed)?;
    // 100 us on the fastest cards
    let flush = if rehearsal { 2 * READ_BLOCK } else { (384 << 20).max(3 * cache_bytes) };
    let flush = stream.alloc_zeros(flush).map_err(failed)?;
    let out = stream.alloc_zeros(1).map_err(failed)?;
    let clock = machine::Clock::Gpu(Clock { stream, read, out, flush, rehearsal });
    Ok(Machine { device: Device::Cuda(device.clone()), name, cache_bytes, clock })
}
