//! What the tests share: devices, dtypes, random data, memory layouts, comparison.

use crate::reference::{Expected, Near};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_loss::Reduction;

/// The CPU, and the CUDA device of a build for CUDA.
pub fn devices() -> Vec<Device> {
    vec![
        Device::Cpu,
        #[cfg(feature = "cuda")]
        cuda(),
    ]
}

/// The CUDA device. Without one that works a test of a build for CUDA fails: passing would say that CUDA was tested.
#[cfg(feature = "cuda")]
pub fn cuda() -> Device {
    let remedy = "run these tests on a machine with a GPU, or on the software GPU (`. softgpu/env`)";
    Device::new_cuda(0).unwrap_or_else(|e| panic!("no CUDA device works here: {remedy}: {e}"))
}

/// Runs a body on every device.
pub fn everywhere(body: impl Fn(&Device) -> Result<()>) -> Result<()> {
    devices().iter().try_for_each(body)
}

/// The first number of a tensor.
pub fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(values(tensor)?[0])
}

/// Whether a device's work is interpreted, and takes too long for more than a little of it.
pub fn is_slow(device: &Device) -> bool {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device.cuda_stream().context().name().is_ok_and(|name| name.contains("softgpu")),
        _ => false,
    }
}

/// The cases of a suite on a device. Composed losses run dozens of candle's kernels each: where these are interpreted,
/// one case in 31 has to do; all of them run on the CPU, by the same code.
pub fn cases<T>(device: &Device, fused: bool, all: impl IntoIterator<Item = T>) -> Vec<T> {
    let step = if !fused && is_slow(device) { 31 } else { 1 };
    all.into_iter().step_by(step).collect()
}

/// The same for suites that draw their cases: whether one is left out.
pub fn is_left_out(device: &Device, fused: bool, random: &mut Random) -> bool {
    !fused && is_slow(device) && random.below(31) != 0
}

pub const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];
pub const INDICES: [DType; 5] = [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64];
/// What targets and masks of the element-wise family may be.
pub const NUMBERS: [DType; 9] =
    [DType::F16, DType::BF16, DType::F32, DType::F64, DType::U8, DType::U32, DType::I16, DType::I32, DType::I64];
pub const REDUCTIONS: [Reduction; 3] = [Reduction::None, Reduction::Mean, Reduction::Sum];

/// The dtype of the loss for an input's dtype.
pub fn arithmetic(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The spacing of a dtype's numbers at 1.
pub fn epsilon(dtype: DType) -> f64 {
    2.0 * half_ulp(dtype, 1.0)
}

/// Half the distance between a number and its neighbours: what one rounding may cost.
pub fn half_ulp(dtype: DType, value: f64) -> f64 {
    let (digits, least) = match dtype {
        DType::F16 => (11, -14),
        DType::BF16 => (8, -126),
        DType::F32 => (24, -126),
        _ => (53, -1022),
    };
    let exponent = if value == 0.0 { least } else { (value.abs().log2().floor() as i32).max(least) };
    2f64.powi(exponent - digits)
}

/// A number as a dtype holds it.
pub fn stored(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F16 => half::f16::from_f64(value).to_f64(),
        DType::BF16 => half::bf16::from_f64(value).to_f64(),
        DType::F32 => value as f32 as f64,
        _ => value,
    }
}

/// SplitMix64: reproducible data, the same on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
    }

    pub fn normals(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| scale * self.normal()).collect()
    }

    pub fn uniforms(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.uniform()).collect()
    }

    pub fn classes(&mut self, n: usize, classes: usize) -> Vec<i64> {
        (0..n).map(|_| self.below(classes) as i64).collect()
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Numbers in [0, 1], a quarter of them 0 and a quarter 1.
    pub fn labels(&mut self, n: usize) -> Vec<f64> {
        let label = |random: &mut Self| match random.below(4) {
            0 => 0.0,
            1 => 1.0,
            _ => random.uniform(),
        };
        (0..n).map(|_| label(self)).collect()
    }
}

/// A tensor of a dtype from f64 values.
pub fn tensor(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Class indices of a dtype.
pub fn indices(values: &[i64], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// The values of a tensor, exactly.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
}

/// The bits of a tensor's values: equal exactly where the tensors are, NaN included.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(values(tensor)?.into_iter().map(f64::to_bits).collect())
}

/// The same bits in both tensors; the first that differs is the message.
#[track_caller]
pub fn assert_same_bits(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    let (got, want) = (values(got)?, values(want)?);
    let differs = |(got, want): (&f64, &f64)| got.to_bits() != want.to_bits();
    if let Some(i) = got.iter().zip(&want).position(differs) {
        panic!("{what}[{i}]: got {:e}, expected the bits of {:e}", got[i], want[i]);
    }
    Ok(())
}

/// How a tensor's elements lie in memory. What lies around them is NaN (99 in integers), to be noticed if it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    Contiguous,
    /// Contiguous behind three other elements, so that nothing is aligned.
    Odd,
    /// The middle of a longer axis.
    Window(usize),
    /// Two axes swapped.
    Swapped(usize, usize),
    /// One position of an axis, repeated with stride 0.
    Repeated(usize),
}

/// A tensor in some layout, and the leaf of the graph that it is a view of.
pub struct Operand {
    leaf: Tensor,
    dims: Vec<usize>,
    memory: Memory,
}

impl Operand {
    /// Floats become a variable. Of an axis that is [`Memory::Repeated`], only the first position's values are used.
    pub fn new(values: &[f64], dims: &[usize], dtype: DType, device: &Device, memory: Memory) -> Result<Self> {
        let filler = if dtype.is_float() { f64::NAN } else { 99.0 };
        let whole = Tensor::from_slice(values, dims, &Device::Cpu)?;
        let leaf = match memory {
            Memory::Contiguous => whole,
            Memory::Odd => Tensor::cat(&[&Tensor::full(filler, 3, &Device::Cpu)?, &whole.flatten_all()?], 0)?,
            Memory::Window(axis) => {
                let mut one = dims.to_vec();
                one[axis] = 1;
                let pad = Tensor::full(filler, one, &Device::Cpu)?;
                Tensor::cat(&[&pad, &whole, &pad, &pad], axis)?
            }
            Memory::Swapped(a, b) => whole.transpose(a, b)?,
            Memory::Repeated(axis) => whole.narrow(axis, 0, 1)?,
        };
        let leaf = leaf.contiguous()?.to_dtype(dtype)?.to_device(device)?;
        let leaf = if dtype.is_float() { Var::from_tensor(&leaf)?.into_inner() } else { leaf };
        Ok(Operand { leaf, dims: dims.to_vec(), memory })
    }

    fn seen_through(&self, leaf: &Tensor) -> Result<Tensor> {
        match self.memory {
            Memory::Contiguous | Memory::Repeated(_) => Ok(leaf.clone()),
            Memory::Odd => leaf.narrow(0, 3, leaf.elem_count() - 3)?.reshape(self.dims.as_slice()),
            Memory::Window(axis) => leaf.narrow(axis, 1, self.dims[axis]),
            Memory::Swapped(a, b) => leaf.transpose(a, b),
        }
    }

    /// The tensor, tracked if it holds floats.
    pub fn tracked(&self) -> Result<Tensor> {
        match self.memory {
            Memory::Repeated(_) => self.leaf.broadcast_as(self.dims.as_slice()),
            _ => self.seen_through(&self.leaf),
        }
    }

    /// The tensor without a graph, in the same layout.
    pub fn detached(&self) -> Result<Tensor> {
        Ok(self.tracked()?.detach())
    }

    pub fn dtype(&self) -> DType {
        self.leaf.dtype()
    }

    pub fn values(&self) -> Result<Vec<f64>> {
        values(&self.detached()?)
    }

    /// The gradient that arrived, as a tensor of this one's shape (but for a repeated axis, over which it was summed).
    fn grad(&self, grads: &GradStore) -> Result<Tensor> {
        // candle leaves out what it knows to be zeros
        let grad = grads.get(&self.leaf).map_or_else(|| self.leaf.zeros_like(), |grad| Ok(grad.clone()))?;
        self.seen_through(&grad)
    }

    /// What arrives of a gradient, see [`Self::grad`].
    fn arriving(&self, gradient: Vec<Near>, arithmetic: DType) -> Vec<Near> {
        let Memory::Repeated(axis) = self.memory else { return gradient };
        let (n, inner) = (self.dims[axis], self.dims[axis + 1..].iter().product::<usize>());
        let outer = self.dims[..axis].iter().product::<usize>();
        let at = |o: usize, i: usize| (0..n).map(move |k| (o * n + k) * inner + i);
        let sum = |o: usize, i: usize| {
            let size = at(o, i).map(|k| gradient[k].value.abs()).sum();
            // candle sums in the gradient's dtype: each addend and each partial sum is rounded to it
            let rounding = |k: usize| half_ulp(self.dtype(), gradient[k].value) + half_ulp(self.dtype(), size);
            Near {
                value: at(o, i).map(|k| gradient[k].value).sum(),
                slack: at(o, i).map(|k| gradient[k].slack + rounding(k) / epsilon(arithmetic)).sum(),
            }
        };
        (0..outer * inner).map(|k| sum(k / inner, k % inner)).collect()
    }
}

/// Compares elementwise: off by at most the reference's slack in epsilons of the arithmetic dtype and one rounding to
/// the tensor's own dtype. Kernels may flush what is below the smallest normal number, and factors of it, to zero.
pub fn compare(what: &str, got: &Tensor, want: &[Near], arithmetic: DType) -> Result<()> {
    let dtype = got.dtype();
    let got = values(got)?;
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let flushed = if arithmetic == DType::F64 { f64::MIN_POSITIVE } else { f32::MIN_POSITIVE as f64 };
    for (i, (&got, want)) in got.iter().zip(want).enumerate() {
        let tolerance = want.slack * epsilon(arithmetic) + 64.0 * flushed;
        let off = (got - want.value).abs();
        let near = off <= tolerance + half_ulp(dtype, want.value.abs() + tolerance);
        let same = got == stored(dtype, want.value) || (got.is_nan() && want.value.is_nan());
        let Near { value, .. } = want;
        assert!(near || same, "{what}[{i}]: got {got:e}, expected {value:e}, off by {off:e} of {tolerance:e}");
    }
    Ok(())
}

/// Numbers that may be off by more epsilons, as results of the size 1 are.
pub fn widened(all: &[Near], absolute: f64) -> Vec<Near> {
    all.iter().map(|near| Near { slack: near.slack + absolute * (1.0 + near.value.abs()), ..*near }).collect()
}

/// A loss's one-pass gradient.
pub type LossAndGrad<'a> = dyn Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)> + 'a;

/// One loss object with its reduction set, on one pair of tensors.
pub struct Check<'a> {
    pub what: String,
    pub input: &'a Operand,
    pub target: &'a Operand,
    pub loss_dims: Vec<usize>,
    pub forward: &'a dyn Fn(&Tensor, &Tensor) -> Result<Tensor>,
    pub loss_and_grad: &'a LossAndGrad<'a>,
    /// The epsilons that each result may be off beside the reference's slack, as results of the size 1 are.
    pub absolute: f64,
    /// The reference for an upstream gradient.
    pub expected: &'a dyn Fn(&[f64]) -> Expected,
}

impl Check<'_> {
    /// `forward`, `backward` twice for a random upstream gradient, and `loss_and_grad`.
    pub fn run(&self, random: &mut Random) -> Result<()> {
        let Check { what, input, target, .. } = self;
        let arithmetic = arithmetic(input.dtype());
        let compare =
            |what: &str, got: &Tensor, want: &[Near]| compare(what, got, &widened(want, self.absolute), arithmetic);
        let loss = (self.forward)(&input.tracked()?, &target.tracked()?)?;
        assert_eq!(loss.dims(), self.loss_dims, "{what}: shape of the loss");
        assert_eq!(loss.dtype(), arithmetic, "{what}: dtype of the loss");
        let upstream = random.normals(loss.elem_count(), 1.0);
        let upstream = tensor(&upstream, loss.dims(), arithmetic, loss.device())?;
        let expected = (self.expected)(&values(&upstream)?);
        compare(&format!("{what} loss"), &loss, &expected.loss)?;

        let scalar = (&loss * &upstream)?.sum_all()?;
        let grads = scalar.backward()?;
        let again = scalar.backward()?;
        for (name, operand, want) in
            [("gradient", input, expected.grad), ("target gradient", target, expected.target_grad)]
        {
            if !operand.dtype().is_float() {
                continue;
            }
            let grad = operand.grad(&grads)?;
            assert_eq!(grad.dtype(), operand.dtype(), "{what}: dtype of the {name}");
            compare(&format!("{what} {name}"), &grad, &operand.arriving(want, arithmetic))?;
            assert_same_bits(&format!("{what}: the {name} the second time"), &operand.grad(&again)?, &grad)?;
        }
        self.run_loss_and_grad()
    }

    /// `loss_and_grad` alone.
    pub fn run_loss_and_grad(&self) -> Result<()> {
        let Check { what, input, target, .. } = self;
        let arithmetic = arithmetic(input.dtype());
        let compare =
            |what: &str, got: &Tensor, want: &[Near]| compare(what, got, &widened(want, self.absolute), arithmetic);
        let (loss, grad) = (self.loss_and_grad)(&input.detached()?, &target.detached()?)?;
        let expected = (self.expected)(&vec![1.0; loss.elem_count()]);
        assert_eq!((loss.dims(), grad.dims()), (&*self.loss_dims, &*input.dims), "{what}: loss_and_grad's shapes");
        assert_eq!((loss.dtype(), grad.dtype()), (arithmetic, input.dtype()), "{what}: loss_and_grad's dtypes");
        compare(&format!("{what} loss_and_grad's loss"), &loss, &expected.loss)?;
        compare(&format!("{what} loss_and_grad's gradient"), &grad, &expected.grad)
    }
}

/// A shape that broadcasts to `dims`, as the random numbers have it: fewer axes, or axes of size 1.
pub fn broadcastable(dims: &[usize], random: &mut Random) -> Vec<usize> {
    let skipped = random.below(dims.len() + 1);
    dims[skipped..].iter().map(|&d| if random.below(3) == 0 { 1 } else { d }).collect()
}

/// Shapes and layouts of input and target for losses of elements: each layout of the one with each of the other.
pub fn element_layouts() -> Vec<(&'static [usize], Memory, Memory)> {
    use Memory::{Contiguous, Odd, Repeated, Swapped, Window};
    let shapes: [(&'static [usize], &[Memory]); 5] = [
        (&[], &[Contiguous, Odd]),
        (&[7], &[Contiguous, Odd, Window(0), Repeated(0)]),
        (&[5, 9], &[Contiguous, Odd, Window(0), Window(1), Swapped(0, 1), Repeated(0), Repeated(1)]),
        (&[2, 3, 70], &[Contiguous, Window(1), Window(2), Swapped(0, 2), Swapped(1, 2), Repeated(1)]),
        (&[2, 3, 4, 5], &[Odd, Window(3), Swapped(0, 3), Swapped(1, 2), Repeated(0), Repeated(3)]),
    ];
    let mut all = vec![];
    for (dims, memories) in shapes {
        all.extend(memories.iter().flat_map(|&a| memories.iter().map(move |&b| (dims, a, b))));
    }
    all
}

/// Sizes at which a loop over elements changes its way, and one off: lanes, blocks, tasks.
pub const ELEMENT_COUNTS: [usize; 14] = [1, 2, 3, 15, 16, 17, 31, 33, 255, 2047, 2048, 2049, 4097, 5003];
