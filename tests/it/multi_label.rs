//! Multi-label soft margin against the f64 reference: options, dtypes, shapes and layouts.

use super::losses::{FUSED, MultiLabelSoftMarginLoss, Reduction};
use crate::common::{
    Check, FLOATS, Memory, Operand, REDUCTIONS, Random, cases, devices, element_layouts, tensor, values,
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
    weight: bool,
}

impl Case<'_> {
    fn check(&self, device: &Device, random: &mut Random) -> Result<()> {
        let Case { dims, dtype, .. } = *self;
        let n: usize = dims.iter().product();
        let classes = dims[dims.len() - 1];
        let input = Operand::new(&random.normals(n, 4.0), dims, dtype, device, self.memory)?;
        let labels: Vec<_> = random.labels(n);
        let labels: Vec<_> = labels.iter().map(|t| if self.target.is_float() { *t } else { t.round() }).collect();
        let target = Operand::new(&labels, dims, self.target, device, self.target_memory)?;
        let mut reference = Elements { group: classes, ..Elements::new(Term::BceWithLogits) };
        let mut loss = MultiLabelSoftMarginLoss::new();
        if self.weight {
            let weight = tensor(&random.uniforms(classes), &[classes], random.pick(&FLOATS), device)?;
            reference.weight = Some(values(&weight.broadcast_as(dims)?)?);
            loss = loss.with_weight(weight);
        }
        let (x, t) = (input.values()?, target.values()?);
        for reduction in REDUCTIONS {
            let loss = loss.clone().with_reduction(reduction);
            let reference = Elements { reduction, ..reference.clone() };
            Check {
                what: format!("{self:?} {reduction:?}"),
                input: &input,
                target: &target,
                loss_dims: if reduction == Reduction::None { dims[..dims.len() - 1].to_vec() } else { vec![] },
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

const TARGETS: [DType; 5] = [DType::F16, DType::F32, DType::F64, DType::U8, DType::I64];

#[test]
fn options_and_dtypes() -> Result<()> {
    let (memory, target_memory) = (Memory::Contiguous, Memory::Contiguous);
    for device in devices() {
        let mut random = Random::new(21);
        let dtypes = FLOATS.iter().flat_map(|&d| TARGETS.map(|t| (d, t)));
        let shapes = [(&[4, 7][..], false), (&[4, 7], true), (&[9], true), (&[2, 3, 33], true)];
        let all = dtypes.flat_map(|dtypes| shapes.map(|shape| (dtypes, shape)));
        for ((dtype, target), (dims, weight)) in cases(&device, FUSED, all) {
            Case { dims, dtype, memory, target, target_memory, weight }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn layouts() -> Result<()> {
    for device in devices() {
        let mut random = Random::new(22);
        let all = element_layouts().into_iter().filter(|(dims, ..)| !dims.is_empty());
        for (dims, memory, target_memory) in cases(&device, FUSED, all) {
            let (dtype, target, weight) = (random.pick(&FLOATS), random.pick(&TARGETS), random.below(2) == 1);
            Case { dims, dtype, memory, target, target_memory, weight }.check(&device, &mut random)?;
        }
    }
    Ok(())
}

/// Rows of a few classes share a block, rows of many take several.
#[test]
fn numbers_of_classes() -> Result<()> {
    let (target_memory, target) = (Memory::Odd, DType::F32);
    for device in devices() {
        let mut random = Random::new(23);
        let all = [1, 2, 17, 1000, 2047, 2048, 2049, 5003].iter().flat_map(|&c| FLOATS.map(|d| (c, d)));
        for (classes, dtype) in cases(&device, FUSED, all) {
            let memory = random.pick(&[Memory::Contiguous, Memory::Odd]);
            let dims = &[if classes < 100 { 131 } else { 3 }, classes];
            Case { dims, dtype, memory, target, target_memory, weight: true }.check(&device, &mut random)?;
        }
    }
    Ok(())
}
