use super::gpu::{Gpu, Image, first_accepted};
use super::kernels::ALL;
use super::launch::{Workspace, output};
use candle_core::cuda_backend::{WrapErr, kernels as candles};
use candle_core::{DType, Device, Result};
use cudarc::driver::DriverError;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use std::collections::HashSet;
use std::sync::OnceLock;
use std::time::Instant;

fn gpu() -> Device {
    Device::new_cuda(0).expect("a CUDA device: softgpu/README.md says how to have one in software")
}

/// Whether that device is the software GPU.
pub(crate) fn in_software() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let stream = gpu().as_cuda_device().expect("a CUDA device").cuda_stream();
        stream.context().name().is_ok_and(|name| name.starts_with("softgpu"))
    })
}

/// Every module loads, and those of candle that a training step asks for. With `--nocapture` it says how long each
/// took: PTX is compiled by a GPU's driver, which keeps the result in its cache for whatever runs next. `MODULES=2/8`
/// leaves the third of eight parts, for several processes at once: within one the driver may compile one module after
/// the other.
#[test]
fn every_module_loads() -> Result<()> {
    let candles = [
        ("candle's affine", candles::AFFINE),
        ("candle's binary", candles::BINARY),
        ("candle's cast", candles::CAST),
        ("candle's fill", candles::FILL),
        ("candle's indexing", candles::INDEXING),
        ("candle's reduce", candles::REDUCE),
        ("candle's ternary", candles::TERNARY),
        ("candle's unary", candles::UNARY),
    ];
    let part = std::env::var("MODULES").unwrap_or("0/1".to_string());
    let numbers = part.split_once('/').and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)));
    let (part, of): (usize, usize) = numbers.expect("MODULES is a part and how many there are, such as 2/8");
    let device = gpu();
    let device = device.as_cuda_device()?;
    for module in ALL.into_iter().skip(part).step_by(of) {
        let begun = Instant::now();
        for kernel in module.kernels {
            Gpu::of(device)?.kernel(module, kernel)?;
        }
        let image = Gpu::of(device)?.image_of(module);
        println!("{}: {:.2} s, from {image:?}", module.name, begun.elapsed().as_secs_f64());
    }
    let context = device.cuda_stream().context().clone();
    for (name, module) in candles.into_iter().skip(part).step_by(of) {
        let begun = Instant::now();
        let loaded = context.load_module(module.ptx().into());
        assert!(loaded.is_ok(), "{name}: {:?}", loaded.err());
        println!("{name}: {:.2} s", begun.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A GPU of the build's architecture takes the machine code; one that refuses it, as the software GPU does, gets the
/// PTX.
#[test]
fn machine_code_comes_first() -> Result<()> {
    let asked = |refusal: Option<CUresult>| {
        let mut asked = Vec::new();
        let chosen = first_accepted(|image| {
            asked.push(image);
            Ok(match refusal {
                Some(error) if image == Image::MachineCode => Err(DriverError(error)),
                _ => Ok(()),
            })
        });
        (asked, chosen.map(|((), image)| image).ok())
    };
    assert_eq!(asked(None), (vec![Image::MachineCode], Some(Image::MachineCode)));
    for refusal in [CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU, CUresult::CUDA_ERROR_INVALID_IMAGE] {
        assert_eq!(asked(Some(refusal)), (vec![Image::MachineCode, Image::Ptx], Some(Image::Ptx)), "{refusal:?}");
    }
    // what PTX can't mend is told
    assert_eq!(asked(Some(CUresult::CUDA_ERROR_OUT_OF_MEMORY)), (vec![Image::MachineCode], None));

    let device = gpu();
    let device = device.as_cuda_device()?;
    let gpu = Gpu::of(device)?;
    gpu.kernel(ALL[0], ALL[0].kernels[0])?;
    let stream = device.cuda_stream();
    let context = stream.context();
    let capability = context.compute_capability().map(|(major, minor)| (10 * major + minor) as u32).ok();
    let takes_it = !in_software() && capability == Some(super::kernels::ARCHITECTURE);
    let expected = if takes_it { Image::MachineCode } else { Image::Ptx };
    assert_eq!(gpu.image_of(ALL[0]), Some(expected), "a GPU of capability {capability:?}");
    Ok(())
}

/// All devices of a GPU share what the process keeps for it, in all threads, and so each kernel's handle. The name of
/// no kernel is an error.
#[test]
fn a_gpu_is_kept_once() -> Result<()> {
    let kept = |device: &Device| Gpu::of(device.as_cuda_device()?);
    let kernel = |gpu: &Gpu| Ok(gpu.kernel(ALL[0], ALL[0].kernels[0])?.function as usize);
    let here = kept(&gpu())?;
    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(move || (kept(&gpu()), kernel(here)))).collect();
    for thread in threads {
        let (there, handle): (_, Result<usize>) = thread.join().expect("no panic");
        assert!(std::ptr::eq(there?, here));
        assert_eq!(handle?, kernel(here)?);
    }
    for module in ALL {
        assert!(module.kernels.is_sorted(), "{}: {:?}", module.name, module.kernels);
        let error = here.kernel(module, "softmax").expect_err("there is no such kernel").to_string();
        assert!(error.contains("has no kernel softmax"), "{error}");
    }
    Ok(())
}

/// The arrays of a workspace do not overlap, and all of them are inside of it.
#[test]
fn a_workspace_holds_its_arrays() -> Result<()> {
    let device = gpu();
    let device = device.as_cuda_device()?;
    for dtype in [DType::F32, DType::F64] {
        // SAFETY: nothing reads it
        assert!(unsafe { Workspace::default().alloc(device, dtype)? }.is_none());
        let mut workspace = Workspace::default();
        let mut end = 0;
        for bytes in [4, 0, 8, 1000, 16, 24, 17] {
            let start = workspace.add(bytes);
            assert!(start >= end && start < end + 16 && start % 16 == 0, "{start} after {end}");
            end = start + bytes as u64;
        }
        // SAFETY: as above
        let mut memory = unsafe { workspace.alloc(device, dtype)? }.expect("there are arrays");
        assert_eq!(output(&mut memory)?.len() as u64, end.next_multiple_of(dtype.size_in_bytes() as u64));
    }
    Ok(())
}

/// As many kernels as a program should carry, and a driver load.
#[test]
fn kernels_are_few() -> Result<()> {
    let counts = ALL.map(|module| module.kernels.len());
    assert!(counts.iter().sum::<usize>() <= 200, "{counts:?}");
    Ok(())
}

/// The machine code is an ELF file for the architecture that the build names, and PTX is text that names it.
#[test]
fn modules_are_for_the_architecture() -> Result<()> {
    for module in ALL {
        let code = module.image(Image::MachineCode)?;
        assert_eq!(&code[..4], b"\x7fELF", "{}", module.name);
        let ptx = String::from_utf8(module.image(Image::Ptx)?).expect("PTX is text");
        let target = format!(".target sm_{}", super::kernels::ARCHITECTURE);
        assert!(ptx.contains(&target) && ptx.ends_with('\0'), "{}: no {target}", module.name);
    }
    Ok(())
}

/// A stream keeps its ticket, as its launches follow each other; each thread has a stream; a launch in a capture shares
/// its ticket with none. Where captures have used up what was allocated, that is an error until a loss outside of them
/// allocates more.
#[test]
fn tickets_are_not_shared() -> Result<()> {
    let device = gpu();
    let ticket = |device: &Device| -> Result<u64> {
        let device = device.as_cuda_device()?;
        Gpu::of(device)?.ticket(&device.cuda_stream())
    };
    let mine = ticket(&device)?;
    assert_eq!(ticket(&device)?, mine);
    let other = std::thread::scope(|scope| scope.spawn(|| ticket(&device)).join().expect("no panic"))?;
    let with_stream = Device::new_cuda_with_stream(0)?;
    let of_stream = ticket(&with_stream)?;
    let mut given = HashSet::from([mine, other, of_stream]);
    assert_eq!(given.len(), 3);

    let stream = with_stream.as_cuda_device()?.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let mut captured = 0;
    let error = loop {
        match ticket(&with_stream) {
            Ok(ticket) => assert!(given.insert(ticket), "ticket {captured} of a capture is not new"),
            Err(error) => break error.to_string(),
        }
        captured += 1;
    };
    stream.end_capture(CUgraphInstantiate_flags(0)).w()?;
    assert!(captured >= 2000, "{captured} launches in a capture, then: {error}");
    assert!(error.contains("compute one outside of a capture first"), "{error}");
    assert_eq!(ticket(&with_stream)?, of_stream);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
    let more = ticket(&with_stream);
    stream.end_capture(CUgraphInstantiate_flags(0)).w()?;
    assert!(given.insert(more?));
    Ok(())
}
