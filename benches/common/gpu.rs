//! Timing on a CUDA device, by events.

use super::machine::{self, Machine};
use candle_core::cuda_backend::cudarc;
use candle_core::{CudaDevice, Device, Error, Result};
use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUevent_flags};
use cudarc::driver::{CudaEvent, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;
use std::time::Duration;

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
        self.read(&self.flush)?;
        let start = self.event()?;
        work()?;
        let end = self.event()?;
        end.synchronize().map_err(failed)?;
        Ok(Duration::from_secs_f64(f64::from(start.elapsed_ms(&end).map_err(failed)?) / 1e3))
    }
}

pub fn machine(device: &CudaDevice) -> Result<Machine> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let name = context.name().map_err(failed)?;
    let cache_bytes = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map_err(failed)?;
    let cache_bytes = (cache_bytes.max(0) as usize).max(1 << 20);
    let read = context.load_module(Ptx::from_src(READ)).and_then(|m| m.load_function("read_all")).map_err(failed)?;
    // 100 us on the fastest cards; hardly anything where there is hardly any memory
    let (_, total) = context.mem_get_info().map_err(failed)?;
    let flush = stream.alloc_zeros((384 << 20).max(3 * cache_bytes).min(total / 64)).map_err(failed)?;
    let out = stream.alloc_zeros(1).map_err(failed)?;
    let clock = machine::Clock::Gpu(Clock { stream, read, out, flush });
    Ok(Machine { device: Device::Cuda(device.clone()), name, cache_bytes, clock })
}
