//! Timing on a CUDA device, by events; and graphs, which replay work without the host.

use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice, Device, Error, Result};
use cudarc::driver::sys::{
    CUdevice_attribute_enum as Attribute, CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, result,
};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;
use std::time::Duration;

/// Reads a buffer, 16 KB a block: each thread four independent vectors of 16 bytes. Their exclusive or is stored only
/// where it is a number that the buffer was not made to give.
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
    /// Read before each sample, which has two purposes. What is timed finds neither its inputs in the cache nor lines
    /// there that have to be written back; and the device is busy while the host enqueues the work, so that the host's
    /// overhead is not measured as long as it is shorter than this.
    flush: CudaSlice<u8>,
}

/// A moment of the stream's work.
pub struct Mark(CudaEvent);

impl Mark {
    /// The time to a later moment, for which it waits.
    pub fn until(&self, end: &Mark) -> Result<Duration> {
        end.0.synchronize().map_err(failed)?;
        Ok(Duration::from_secs_f64(f64::from(self.0.elapsed_ms(&end.0).map_err(failed)?) / 1e3))
    }
}

impl Clock {
    // not every bench that includes this file asks for it
    #[allow(dead_code)]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub fn flush(&self) -> Result<()> {
        self.read(&self.flush).map(|_| ())
    }

    pub fn mark(&self) -> Result<Mark> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map(Mark).map_err(failed)
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

    /// Records what `work` starts, without starting it. It must not wait for the device or copy from the host, and
    /// frees what it allocates.
    #[allow(dead_code)]
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Box<dyn Fn() -> Result<()>>> {
        // relaxed: allocations and loaded modules of other threads are none of this recording's business
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(failed)?;
        let worked = work();
        // cudarc keeps the error of what was freed after a failure, and would return it instead of ending the recording
        let _ = self.stream.context().check_err();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        worked?;
        let Some(graph) = graph.map_err(failed)? else { return Err(Error::msg("nothing was recorded")) };
        Ok(Box::new(move || graph.launch().map_err(failed)))
    }

    #[allow(dead_code)]
    pub fn release(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed)?;
        // SAFETY: the device is the context's and the pool is the device's
        unsafe {
            let pool = result::device::get_mem_pool(self.stream.context().cu_device()).map_err(failed)?;
            result::mem_pool::trim_to(pool, 0).map_err(failed)
        }
    }
}

/// The first GPU with a stream of its own, all of whose work can be recorded.
#[allow(dead_code)]
pub fn recorder(rehearsal: bool) -> Result<Gpu> {
    let device = Device::new_cuda_with_stream(0)?;
    let Device::Cuda(cuda) = &device else { return Err(Error::msg("no CUDA device")) };
    // SAFETY: nothing that this device allocates is used on another stream. A recording can't wait for events from
    // before.
    unsafe { cuda.disable_event_tracking() };
    Gpu::new(cuda, rehearsal)
}

/// A device with its clock.
pub struct Gpu {
    pub device: Device,
    pub name: String,
    pub cache_bytes: usize,
    pub clock: Arc<Clock>,
}

impl Gpu {
    pub fn new(device: &CudaDevice, rehearsal: bool) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let name = context.name().map_err(failed)?;
        let cache_bytes = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map_err(failed)?;
        let cache_bytes = (cache_bytes.max(0) as usize).max(1 << 20);
        let read =
            context.load_module(Ptx::from_src(READ)).and_then(|m| m.load_function("read_all")).map_err(failed)?;
        // 100 us on the fastest cards
        let flush = if rehearsal { 2 * READ_BLOCK } else { (384 << 20).max(3 * cache_bytes) };
        let flush = stream.alloc_zeros(flush).map_err(failed)?;
        let out = stream.alloc_zeros(1).map_err(failed)?;
        // one set of inputs is enough to see that all runs
        let cache_bytes = if rehearsal { 1 } else { cache_bytes };
        let clock = Arc::new(Clock { stream, read, out, flush });
        Ok(Gpu { device: Device::Cuda(device.clone()), name, cache_bytes, clock })
    }
}
