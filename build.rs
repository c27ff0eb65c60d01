//! Compiles `kernels/*.cu` to PTX for the `cuda` feature; does nothing without it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile_kernels();
}

#[cfg(feature = "cuda")]
mod cuda {
    use cudaforge::{CudaToolkit, Error, GpuArch, KernelBuilder};
    use std::path::PathBuf;

    /// The oldest architecture that the kernels and today's CUDA toolkits support: Turing.
    const OLDEST: usize = 75;

    pub fn compile_kernels() {
        println!("cargo::rerun-if-env-changed=NVCC");
        if let Err(message) = compile() {
            // cargo shows these lines as the error; returning an `Err` from main would print it in Debug form
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            std::process::exit(1);
        }
    }

    fn compile() -> Result<(), String> {
        let toolkit = CudaToolkit::detect().map_err(|_| {
            "the feature `cuda` needs NVIDIA's CUDA compiler, and no nvcc was found: install the CUDA toolkit and put its bin \
             folder on PATH (or set NVCC or CUDA_HOME), or build without `--features cuda`"
        })?;
        let arch = architecture(&toolkit)?;
        let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this through cargo")?);
        // Line numbers cost nothing at run time and let profilers and sanitizers name the source. No --use_fast_math: it
        // would flush subnormal results and break the infinities that the losses rely on.
        let ptx = KernelBuilder::new()
            .source_dir("kernels")
            .watch(["kernels"])
            .compute_cap_arch(&arch.to_string())
            .args(["-std=c++17", "-O3", "-lineinfo"])
            .build_ptx()
            .map_err(|e| match e {
                Error::CompilationFailed { path, .. } => format!(
                    "{} could not compile {} for compute capability {arch} (its messages are above): if the GPU is newer than \
                     the toolkit, update the toolkit; if its host compiler is too new, name an older one with NVCC_CCBIN",
                    toolkit.nvcc_path.display(),
                    path.display()
                ),
                e => e.to_string(),
            })?;
        ptx.write(out.join("ptx.rs")).map_err(|e| e.to_string())
    }

    /// What candle's own kernels are built for: CUDA_COMPUTE_CAP, or else the first GPU of this machine.
    fn architecture(toolkit: &CudaToolkit) -> Result<GpuArch, String> {
        let arch = cudaforge::detect_compute_cap().map_err(|_| match std::env::var("CUDA_COMPUTE_CAP") {
            Ok(v) => format!("CUDA_COMPUTE_CAP is \"{v}\", which names no compute capability: write for example 90 for 9.0"),
            Err(_) => "no GPU to compile the CUDA kernels for: nvidia-smi does not answer here, so set CUDA_COMPUTE_CAP to the compute \
                       capability of the GPU that will run them (80: A100, 86: RTX 30, 89: RTX 40 and L4, 90: H100 and H200, 100: B200)"
                .to_string(),
        })?;
        let known = toolkit.supported_architectures();
        if arch.base() < OLDEST {
            return Err(format!(
                "the CUDA kernels need compute capability 7.5 or newer, and CUDA_COMPUTE_CAP or the GPU says {}",
                arch.base()
            ));
        }
        if !known.is_empty() && !known.contains(&arch.base()) {
            return Err(format!(
                "{} (CUDA {}) cannot compile for compute capability {}, only for {known:?}: set CUDA_COMPUTE_CAP to one of these \
                 or use another toolkit",
                toolkit.nvcc_path.display(),
                toolkit.version.as_deref().unwrap_or("of unknown version"),
                arch.base()
            ));
        }
        Ok(arch)
    }
}
