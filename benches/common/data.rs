//! Random inputs: on the CPU made by all threads at once, on a GPU where they are needed.

use super::case::{Case, Loss, Shape};
use candle_core::{DType, Device, Result, Tensor, Var};
use half::{bf16, f16};
use rayon::prelude::*;

/// SplitMix64: a number from its position, so that the parts can be made in any order.
fn random(seed: u64, i: usize) -> u64 {
    let mut z = seed.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// About normal, with standard deviation 2: the sum of four uniform numbers.
fn normal(bits: u64) -> f32 {
    let sum: i32 = (0..4).map(|k| ((bits >> (16 * k)) & 0xFFFF) as i32 - 0x8000).sum();
    sum as f32 * (2.0 * 0.866 / 32768.0)
}

/// In [0, 1).
fn uniform(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 24) as f32
}

/// Where the numbers of a tensor come from.
struct Source<'a> {
    device: &'a Device,
    seed: u64,
}

impl Source<'_> {
    fn fill<T: Send + candle_core::WithDType>(
        &self,
        dims: &[usize],
        f: impl Fn(u64) -> T + Sync + Send,
    ) -> Result<Tensor> {
        let n = dims.iter().product::<usize>();
        let values: Vec<T> = (0..n).into_par_iter().map(|i| f(random(self.seed, i))).collect();
        Tensor::from_vec(values, dims, self.device)
    }

    fn floats(&self, dims: &[usize], dtype: DType, f: impl Fn(u64) -> f32 + Sync + Send) -> Result<Tensor> {
        match dtype {
            DType::F16 => self.fill(dims, |bits| f16::from_f32(f(bits))),
            DType::BF16 => self.fill(dims, |bits| bf16::from_f32(f(bits))),
            DType::F64 => self.fill(dims, |bits| f64::from(f(bits))),
            _ => self.fill(dims, f),
        }
    }

    /// With standard deviation 2.
    fn normals(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        if self.device.is_cpu() {
            return self.floats(dims, dtype, normal);
        }
        self.device.set_seed(self.seed)?;
        Tensor::randn(0f32, 2f32, dims, self.device)?.to_dtype(dtype)
    }

    fn uniforms(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        if self.device.is_cpu() {
            return self.floats(dims, dtype, uniform);
        }
        self.device.set_seed(self.seed)?;
        Tensor::rand(0f32, 1f32, dims, self.device)?.to_dtype(dtype)
    }

    fn classes(&self, dims: &[usize], classes: usize) -> Result<Tensor> {
        if self.device.is_cpu() {
            return self.fill(dims, |bits| (bits % classes as u64) as u32);
        }
        self.device.set_seed(self.seed)?;
        // the generator's interval is closed at its upper end
        let numbers = Tensor::rand(0f32, classes as f32, dims, self.device)?.clamp(0f32, classes as f32 - 1.0)?;
        numbers.to_dtype(DType::U32)
    }
}

/// One set of inputs.
pub struct Data {
    shape: Shape,
    /// What the gradient is of, as it lies in memory.
    pub leaf: Var,
    /// The linear layer's.
    pub weight: Option<Var>,
    pub target: Tensor,
    /// A copy of the target that asks for a gradient.
    pub tracked_target: Option<Var>,
    /// What `loss_and_grad_inplace` overwrites and `accumulate` takes for a gradient.
    pub scratch: Option<Tensor>,
}

impl Data {
    pub fn new(case: &Case, set: u64, device: &Device) -> Result<Self> {
        let seed = 0x5EED_0000 + 3 * set;
        let source = Source { device, seed };
        let (classes, dtype) = (case.shape.classes(), case.dtype);
        let (dims, target_dims) = match case.shape {
            Shape::Rows { rows, classes } => (vec![rows, classes], vec![rows]),
            Shape::Shifted { batch, length, classes } => (vec![batch, length + 1, classes], vec![batch, length]),
            Shape::Image { images, classes, height, width } => {
                (vec![images, classes, height, width], vec![images, height, width])
            }
            Shape::Linear { rows, features, .. } => (vec![rows, features], vec![rows]),
        };
        let leaf = match case.loss {
            Loss::Bce => source.uniforms(&dims, dtype)?.affine(0.98, 0.01)?,
            Loss::Nll => source.normals(&dims, dtype)?.abs()?.affine(-1.0, -0.5)?,
            _ => source.normals(&dims, dtype)?,
        };
        let source = Source { device, seed: seed + 1 };
        let target = match case.loss {
            Loss::CrossEntropyProbabilities => source.uniforms(&dims, dtype)?.affine(2.0 / classes as f64, 0.0)?,
            Loss::Bce | Loss::BceWithLogits | Loss::MultiLabel | Loss::Focal => {
                source.uniforms(&dims, dtype)?.ge(0.5)?.to_dtype(dtype)?
            }
            _ => source.classes(&target_dims, classes)?,
        };
        let weight = match case.shape {
            Shape::Linear { features, classes, .. } => {
                let source = Source { device, seed: seed + 2 };
                // logits with the standard deviation of the others
                let scale = 0.5 / (features as f64).sqrt();
                Some(Var::from_tensor(&source.normals(&[classes, features], dtype)?.affine(scale, 0.0)?)?)
            }
            _ => None,
        };
        Ok(Data {
            shape: case.shape,
            leaf: Var::from_tensor(&leaf)?,
            weight,
            target,
            tracked_target: None,
            scratch: None,
        })
    }

    /// The logits as the losses take them.
    pub fn input(&self, leaf: &Tensor) -> Result<Tensor> {
        match self.shape {
            Shape::Shifted { length, .. } => leaf.narrow(1, 0, length),
            _ => Ok(leaf.clone()),
        }
    }

    /// The logits and the target in the two axes that candle's losses take.
    pub fn two_axes(&self, input: &Tensor) -> Result<(Tensor, Tensor)> {
        match self.shape {
            Shape::Shifted { .. } => Ok((input.flatten_to(1)?, self.target.flatten_all()?)),
            _ => Ok((input.clone(), self.target.clone())),
        }
    }
}
