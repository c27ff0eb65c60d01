//! Compiles `kernels/modules/*.cu` for the `cuda` feature: to PTX, and that to the machine code of the architecture
//! that the build is for. Does nothing without the feature.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile_kernels();
}

#[cfg(feature = "cuda")]
mod cuda {
    use cudaforge::{CudaToolkit, Error, GpuArch, KernelBuilder};
    use rayon::prelude::*;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{fs, io};

    /// The oldest architecture that the kernels and today's CUDA toolkits support: Turing.
    const OLDEST: usize = 75;
    /// Set to 1, it adds line numbers, by which profilers and sanitizers name the source. They cost nothing at run
    /// time, and double the PTX.
    const LINEINFO: &str = "CANDLE_FUSED_LOSS_LINEINFO";

    pub fn compile_kernels() {
        println!("cargo::rerun-if-env-changed=NVCC");
        println!("cargo::rerun-if-env-changed={LINEINFO}");
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
        let lineinfo = match std::env::var(LINEINFO).as_deref() {
            Ok("1") => true,
            Ok("" | "0") | Err(_) => false,
            Ok(other) => return Err(format!("{LINEINFO} is \"{other}\", expected 0 or 1")),
        };
        // No --use_fast_math: it would flush subnormal results and break the infinities that the losses rely on.
        let mut args = vec!["-std=c++17", "-O3"];
        args.extend(lineinfo.then_some("-lineinfo"));
        let failed = |path: &Path| {
            format!(
                "{} could not compile {} for compute capability {arch} (its messages are above): if the GPU is newer than \
                 the toolkit, update the toolkit; if its host compiler is too new, name an older one with NVCC_CCBIN",
                toolkit.nvcc_path.display(),
                path.display()
            )
        };
        KernelBuilder::new()
            .source_dir("kernels/modules")
            .watch(["kernels"])
            .thread_percentage(1.0)
            .compute_cap_arch(&arch.to_string())
            .args(&args)
            .build_ptx()
            .map_err(|e| match e {
                Error::CompilationFailed { path, .. } => failed(&path),
                e => e.to_string(),
            })?;
        let modules = modules().map_err(|e| format!("kernels/modules can't be listed: {e}"))?;
        modules.par_iter().try_for_each(|name| {
            let (ptx, code) = (out.join(format!("{name}.ptx")), out.join(format!("{name}.cubin")));
            // what is written last
            if is_newer(&out.join(format!("{name}.cubin.z")), &ptx) {
                return Ok(());
            }
            let mut nvcc = Command::new(&toolkit.nvcc_path);
            nvcc.args(["-cubin", &format!("-arch={}", arch.to_nvcc_arch())]).args(lineinfo.then_some("-lineinfo"));
            match nvcc.arg("-o").arg(&code).arg(&ptx).status() {
                Ok(status) if status.success() => {}
                _ => return Err(failed(&ptx)),
            }
            [ptx, code].iter().try_for_each(|file| compress(file).map_err(|e| format!("{}: {e}", file.display())))
        })?;
        let names =
            modules.iter().map(|name| kernels(&out.join(format!("{name}.ptx")))).collect::<io::Result<Vec<_>>>();
        let names = names.map_err(|e| format!("the PTX of a module can't be read: {e}"))?;
        fs::write(out.join("kernels.rs"), embedded(&modules, &names, &arch)).map_err(|e| e.to_string())
    }

    /// The names of a module's kernels, sorted.
    fn kernels(ptx: &Path) -> io::Result<Vec<String>> {
        let ptx = fs::read_to_string(ptx)?;
        let entries = ptx.lines().filter_map(|line| line.strip_prefix(".visible .entry ")?.split('(').next());
        let mut names: Vec<_> = entries.map(str::to_string).collect();
        names.sort();
        Ok(names)
    }

    /// The names of `kernels/modules/*.cu`, without the suffix.
    fn modules() -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for file in fs::read_dir("kernels/modules")? {
            let path = file?.path();
            if path.extension().is_some_and(|e| e == "cu") {
                names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether the file was made after another one was.
    fn is_newer(file: &Path, than: &Path) -> bool {
        let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
        time(file).is_some() && time(file) > time(than)
    }

    /// Puts a compressed copy beside a file: PTX shrinks to a fifth, machine code to a quarter.
    fn compress(file: &Path) -> io::Result<()> {
        let mut to = file.as_os_str().to_owned();
        to.push(".z");
        fs::write(to, miniz_oxide::deflate::compress_to_vec_zlib(&fs::read(file)?, 9))
    }

    /// The source of the Rust module that holds all of them.
    fn embedded(modules: &[String], kernels: &[Vec<String>], arch: &GpuArch) -> String {
        let mut source = format!(
            "/// The compute capability that the kernels were compiled for, times 10.\npub(crate) const ARCHITECTURE: u32 = {};\n",
            arch.base()
        );
        for (index, (name, kernels)) in modules.iter().zip(kernels).enumerate() {
            let constant = name.to_uppercase();
            // writing to a string doesn't fail
            let _ = writeln!(
                source,
                "pub(crate) static {constant}: Module = Module {{ index: {index}, name: \"{name}\", kernels: &{kernels:?}, machine_code: \
                 include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.cubin.z\")), ptx: \
                 include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.ptx.z\")) }};"
            );
        }
        let all = modules.iter().map(|name| format!("&{}", name.to_uppercase())).collect::<Vec<_>>().join(", ");
        let _ = writeln!(source, "pub(crate) static ALL: [&Module; {}] = [{all}];", modules.len());
        source
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
