//! The CUDA kernels: what is launched, with which arguments. The kernels themselves are in `kernels/`, the launch shapes in
//! [`plan`](crate::plan).
//!
//! Nothing here copies to the host or waits for the device, except where a loss was asked to check its targets.

pub(crate) mod indices;
pub(crate) mod launch;
pub(crate) mod logistic;
pub(crate) mod matmul;
pub(crate) mod softmax;

/// The PTX of each `kernels/*.cu`: `kernels/logistic.cu` is `ptx::LOGISTIC`.
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

#[cfg(test)]
mod tests {
    use super::ptx;
    use candle_core::Device;
    use candle_core::cuda_backend::kernels;
    use std::time::Instant;

    const MODULES: [(&str, &str); 16] = [
        ("indices", ptx::INDICES),
        ("logistic_bf16", ptx::LOGISTIC_BF16),
        ("logistic_f16", ptx::LOGISTIC_F16),
        ("logistic_f32", ptx::LOGISTIC_F32),
        ("logistic_f64", ptx::LOGISTIC_F64),
        ("softmax_bf16", ptx::SOFTMAX_BF16),
        ("softmax_f16", ptx::SOFTMAX_F16),
        ("softmax_f32", ptx::SOFTMAX_F32),
        ("softmax_f64", ptx::SOFTMAX_F64),
        ("softmax_general_bf16", ptx::SOFTMAX_GENERAL_BF16),
        ("softmax_general_f16", ptx::SOFTMAX_GENERAL_F16),
        ("softmax_general_f32", ptx::SOFTMAX_GENERAL_F32),
        ("softmax_general_f64", ptx::SOFTMAX_GENERAL_F64),
        ("softmax_uniform_bf16", ptx::SOFTMAX_UNIFORM_BF16),
        ("softmax_uniform_f16", ptx::SOFTMAX_UNIFORM_F16),
        ("softmax_uniform_f32", ptx::SOFTMAX_UNIFORM_F32),
    ];

    /// Every module loads, and those of candle that a training step asks for. With `--nocapture` it says how long each took:
    /// on a GPU the driver compiles it, and keeps the result in its cache for whatever runs next. `MODULES=2/8` leaves the
    /// third of eight parts, for several processes at once: within one the driver may compile one module after the other.
    #[test]
    fn every_module_loads() {
        let all = include_str!(concat!(env!("OUT_DIR"), "/ptx.rs")).matches("pub const").count();
        assert_eq!(MODULES.len(), all, "modules listed here, of those that were compiled");
        let candles = [
            ("candle's affine", kernels::AFFINE),
            ("candle's binary", kernels::BINARY),
            ("candle's cast", kernels::CAST),
            ("candle's fill", kernels::FILL),
            ("candle's indexing", kernels::INDEXING),
            ("candle's reduce", kernels::REDUCE),
            ("candle's ternary", kernels::TERNARY),
            ("candle's unary", kernels::UNARY),
        ];
        let part = std::env::var("MODULES").unwrap_or("0/1".to_string());
        let numbers = part.split_once('/').and_then(|(part, of)| Some((part.parse().ok()?, of.parse().ok()?)));
        let (part, of): (usize, usize) = numbers.expect("MODULES is a part and how many there are, such as 2/8");
        let modules = MODULES.into_iter().chain(candles.iter().map(|(name, module)| (*name, module.ptx())));
        let device = Device::new_cuda(0).expect("a CUDA device: softgpu/README.md says how to have one in software");
        let context = device.as_cuda_device().expect("a CUDA device").cuda_stream().context().clone();
        for (name, ptx) in modules.skip(part).step_by(of) {
            let begun = Instant::now();
            let loaded = context.load_module(ptx.into());
            assert!(loaded.is_ok(), "{name}: {:?}", loaded.err());
            println!("{name}: {:.2} s, {:.2} MB of PTX", begun.elapsed().as_secs_f64(), ptx.len() as f64 / 1e6);
        }
    }
}
