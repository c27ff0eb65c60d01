//! Sigmoid focal loss against the f64 reference: options, dtypes, shapes and layouts.

use super::losses::{FUSED, Reduction, SigmoidFocalLoss};
use crate::common::{
    Check, ELEMENT_COUNTS, FLOATS, Memory, Operand, REDUCTIONS, Random, arithmetic, cases, devices, element_layouts,
    stored,
};
use crate::reference::{Elements, Term};
use candle_core::{DType, Device, Result};

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    dims: &'a [usize],
    dtype: DType,
    memory: Memory,
    target: DType,
    target_memory: Memory,
    alpha: f64,
    gamma: f64,
}

const ALPHAS: [f64; 4] = [0.25, -1.0, 0.0, 1.0];
const GAMMAS: [f64; 6] = [2.0, 0.0, 0.5, 1.0, 1.5, 5.0];
const TARGETS: [DType; 5] = [DType::BF16, DType::F32, DType::F64, DType::U8, DType::U32];

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        let Case { dims, dtype, alpha, gamma, .. } = *self;
        let n: usize = dims.iter().product();
        let input = Operand::new(&random.normals(n, 5.0), dims, dtype, device, self.memory)?;
        let labels = random.labels(n);
        let labels: Vec<_> = labels.iter().map(|t| if self.target.is_float() { *t } else { t.round() }).collect();
        let target = Operand::new(&labels, dims, self.target, device, self.target_memory)?;
        let x = input.values()?;
        // the label as the arithmetic has it: near 1, most of `1 - t` may be what its rounding left
        let t: Vec<_> = target.values()?.into_iter().map(|t| stored(arithmetic(dtype), t)).collect();
        let term = Term::Focal { alpha: (alpha >= 0.0).then_some(alpha), gamma };
        for reduction in REDUCTIONS {
            let loss = SigmoidFocalLoss::new().with_alpha(alpha).with_gamma(gamma).with_reduction(reduction);
            let reference = Elements { reduction, ..Elements::new(term) };
            Check {
                what: format!("{self:?} {reduction:?}"),
                input: &input,
                target: &target,
                loss_dims: if reduction == Reduction::None { dims.to_vec() } else { vec![] },
                forward: &|x, t| loss.forward(x, t),
                loss_and_grad: &|x, t| loss.loss_and_grad(x, t),
                // composed too, these losses have the accuracy of the kernels
                absolute: 0.0,
                expected: &|upstream| reference.expected(&x, &t, upstream),
            }
            .run(random)?;
        }
        Ok(())
    }
}

#[test]
fn options_and_dtypes() -> Result<()> {
    let (memory, target_memory) = (Memory::Contiguous, Memory::Contiguous);
    for device in devices() {
        let mut random = Random::new(31);
        let dtypes = FLOATS.iter().flat_map(|&d| TARGETS.map(|t| (d, t)));
        let all = dtypes.flat_map(|dtypes| ALPHAS.iter().flat_map(move |&a| GAMMAS.map(|g| (dtypes, a, g))));
        for ((dtype, target), alpha, gamma) in cases(&device, FUSED, all) {
            Case { dims: &[5, 11], dtype, memory, target, target_memory, alpha, gamma }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(32);
        for (dims, memory, target_memory) in cases(&device, FUSED, element_layouts()) {
            let (dtype, target) = (random.pick(&FLOATS), random.pick(&TARGETS));
            let (alpha, gamma) = (random.pick(&ALPHAS), random.pick(&GAMMAS));
            Case { dims, dtype, memory, target, target_memory, alpha, gamma }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn sizes() -> Result<()> {
    let (target, target_memory) = (DType::U8, Memory::Contiguous);
    for device in devices() {
        let mut random = Random::new(33);
        let all = ELEMENT_COUNTS.iter().flat_map(|&n| FLOATS.map(|d| (n, d)));
        for (n, dtype) in cases(&device, FUSED, all) {
            let (alpha, gamma) = (random.pick(&ALPHAS), random.pick(&GAMMAS));
            let memory = random.pick(&[Memory::Contiguous, Memory::Odd]);
            Case { dims: &[n], dtype, memory, target, target_memory, alpha, gamma }.check(&device, &mut random)?;
        }
    }
    Ok(())
}
