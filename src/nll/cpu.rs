//! NLL on the CPU.

use super::problem::{Nll, NllKernels};
use crate::cpu::element::{Element, Output, build};
use crate::cpu::indices::Indices;
use crate::cpu::math::{LANES, Real};
use crate::cpu::parallel::for_each_task;
use crate::cpu::{own_slice, sum_in_order, with_floats};
use crate::custom_op::{Arg, Locked};
use crate::reduction::Reduction;
use crate::rows::cpu::over_denominator;
use crate::rows::layout::Rows;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, Tensor, WithDType};
use std::mem::MaybeUninit;

/// The work of a row, one element that is rarely in the first cache: 4 ns.
const ROW_WORK: usize = 16;

impl NllKernels for CpuStorage {
    fn forward(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.lock_weight();
        with_floats!(problem.name, log_probs.0, data => {
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &weight)?;
            Ok((rows.loss(), WithDType::to_cpu_storage_owned(vec![rows.denominator()])))
        })
    }

    fn loss_and_grad(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let weight = problem.options.lock_weight();
        with_floats!(problem.name, log_probs.0, data => {
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &weight)?;
            Ok((rows.loss(), rows.gradient(rows.denominator(), &[Real::of(problem.options.grad_scale)])))
        })
    }

    fn backward(
        problem: &Nll,
        denominator: &Tensor,
        log_probs: Arg<Self>,
        target: Arg<Self>,
        upstream: Arg<Self>,
    ) -> Result<Self> {
        let weight = problem.options.lock_weight();
        with_floats!(problem.name, log_probs.0, data => {
            // a target that was overwritten since the forward is checked again, and must not lead outside of its row
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &weight)?;
            Ok(rows.gradient(denominator.to_scalar()?, own_slice(upstream)?))
        })
    }
}

/// The log-probabilities and checked targets of a call.
struct NllRows<'a, T: Element> {
    problem: &'a Nll,
    x: &'a [T],
    rows: Rows,
    indices: Indices<'a>,
    weight: Option<&'a [T::Acc]>,
    /// What the sum of the losses is divided by.
    denominator: f64,
}

impl<'a, T: Element> NllRows<'a, T> {
    fn new(
        problem: &'a Nll,
        x: &'a [T],
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        weight: &'a Option<Locked>,
    ) -> Result<Self> {
        let Nll { name, options, .. } = problem;
        let weight = weight.as_ref().map(|weight| own_slice(weight.arg(name)?)).transpose()?;
        let indices = Indices::new(name, rows.count(), target)?;
        let total = indices.total(name, options.ignore_index, rows.classes, weight)?;
        Ok(NllRows { problem, x, rows, indices, weight, denominator: options.denominator(total) })
    }

    fn denominator(&self) -> T::Acc {
        T::Acc::of(self.denominator)
    }

    /// The class of a row that counts, and its weight.
    #[inline(always)]
    fn own(&self, row: usize) -> Option<(usize, T::Acc)> {
        let class = self.indices.get(row);
        if class == self.problem.options.ignore_index {
            return None;
        }
        Some((class as usize, self.weight.map_or(T::Acc::ONE, |weight| weight[class as usize])))
    }

    fn loss(&self) -> CpuStorage {
        let count = self.rows.count();
        let mut losses = vec![T::Acc::ZERO; count];
        let out = Output::in_place(&mut losses).1;
        for_each_task(count.div_ceil(LANES), LANES * ROW_WORK, |tiles| {
            let range = tiles.start * LANES..(tiles.end * LANES).min(count);
            // SAFETY: these rows are this task's alone
            let losses = unsafe { out.slice(range.start, range.len()) };
            let ignored = self.problem.options.ignore_index;
            for (losses, first) in losses.chunks_mut(LANES).zip(range.step_by(LANES)) {
                let rows = first..first + losses.len();
                let classes = self.indices.load(rows.clone());
                // all reads of a tile before the first use of one: a row's number is rarely in the cache
                let mut xs = [T::Acc::ZERO; LANES];
                for ((x, row), class) in xs.iter_mut().zip(rows).zip(classes) {
                    let class = if class == ignored { 0 } else { class as usize };
                    *x = self.x[self.rows.start(row) + class * self.rows.class_stride].to_acc();
                }
                for ((loss, x), class) in losses.iter_mut().zip(xs).zip(classes) {
                    let weight = match self.weight {
                        _ if class == ignored => T::Acc::ZERO,
                        Some(weight) => weight[class as usize],
                        None => T::Acc::ONE,
                    };
                    loss.write(if weight == T::Acc::ZERO { T::Acc::ZERO } else { -weight * x });
                }
            }
        });
        T::Acc::to_cpu_storage_owned(match self.problem.options.reduction {
            Reduction::None => losses,
            Reduction::Mean | Reduction::Sum => vec![T::Acc::of(sum_in_order(&losses) / self.denominator)],
        })
    }

    /// Zeros, and a number at each row's own class.
    fn gradient(&self, denominator: T::Acc, upstream: &[T::Acc]) -> CpuStorage {
        let len = self.rows.count() * self.rows.classes;
        // SAFETY: all of it is filled, through the only slice of it; with a constant, which makes it a call of memset
        let mut grad: Vec<T> =
            unsafe { build(len, |out| out.slice(0, len).fill(MaybeUninit::new(T::from_acc(T::Acc::ZERO)))) };
        for row in 0..self.rows.count() {
            let Some((class, weight)) = self.own(row) else { continue };
            let upstream = over_denominator(upstream[if upstream.len() == 1 { 0 } else { row }], denominator);
            let at = self.rows.written_start(row) + class * self.rows.written_stride();
            grad[at] = T::from_acc(-(weight * upstream));
        }
        T::to_cpu_storage_owned(grad)
    }
}

#[cfg(test)]
mod tests {
    use crate::nll::problem::Nll;
    use crate::rows::options::RowOptions;
    use candle_core::{Device, Result, Tensor, Var};

    /// For Miri.
    #[test]
    fn small_rows_keep_to_their_memory() -> Result<()> {
        for dims in [vec![40, 3], vec![2, 3, 4]] {
            let x = Var::from_tensor(&Tensor::rand(-2f32, -1., dims.clone(), &Device::Cpu)?)?;
            let target = Tensor::ones([&dims[..1], &dims[2..]].concat(), candle_core::DType::U8, &Device::Cpu)?;
            let problem = Nll { name: "test", axis: 1, options: RowOptions::default() };
            let loss = problem.clone().forward(&x, &target)?;
            loss.backward()?;
            let (again, _) = problem.loss_and_grad(&x, &target)?;
            assert_eq!(loss.to_scalar::<f32>()?, again.to_scalar::<f32>()?);
        }
        Ok(())
    }
}
