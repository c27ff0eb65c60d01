//! NLL on the CPU.

use super::problem::{Nll, NllKernels};
use crate::cpu::element::{Element, Output, build};
use crate::cpu::indices::Indices;
use crate::cpu::math::{Isa, LANES, Real, Vectorized, dispatch};
use crate::cpu::parallel::for_each_task;
use crate::cpu::{own_slice, stream, sum_in_order, with_floats};
use crate::custom_op::Arg;
use crate::reduction::LossForm;
use crate::rows::cpu::{ignore_weightless, over_denominator, row_weights, weigh_losses};
use crate::rows::layout::Rows;
use crate::rows::options::LockedRowOptions;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result, Tensor, WithDType};
use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The work of a row, one element that is rarely in the first cache: 4 ns.
const ROW_WORK: usize = 16;
/// Gradients of rows of fewer bytes than this stay in the cache: each has a line that is written twice.
const LONG_ROW: usize = 1024;

impl NllKernels for CpuStorage {
    fn forward(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let locked = problem.options.lock(&problem.form);
        with_floats!(problem.name, log_probs.0, data => {
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &locked)?;
            Ok((rows.loss(), WithDType::to_cpu_storage_owned(vec![rows.denominator()])))
        })
    }

    fn loss_and_grad(problem: &Nll, log_probs: Arg<Self>, target: Arg<Self>) -> Result<(Self, Self)> {
        let locked = problem.options.lock(&problem.form);
        with_floats!(problem.name, log_probs.0, data => {
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &locked)?;
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
        let locked = problem.options.lock(&problem.form);
        with_floats!(problem.name, log_probs.0, data => {
            // a target that was overwritten since the forward is checked again, and must not lead outside of its row
            let rows = NllRows::new(problem, data, problem.rows(log_probs.1)?, target, &locked)?;
            Ok(rows.gradient(denominator.to_scalar()?, own_slice(upstream)?))
        })
    }
}

/// Where the losses of tiles go: those of each row, or their sums.
#[derive(Clone, Copy)]
enum TileLosses<'k, A> {
    Each(&'k Output<'k, A>),
    Sums(&'k Output<'k, f64>),
}

/// The losses of tiles of [`LANES`] rows.
struct NllTiles<'k, 'a, T: Element> {
    rows: &'k NllRows<'a, T>,
    tiles: Range<usize>,
    to: TileLosses<'k, T::Acc>,
}

impl<T: Element> Vectorized for NllTiles<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let NllRows { problem, x, rows: place, indices, weight, row_weight, .. } = self.rows;
        let (count, ignored) = (place.count(), problem.options.ignore_index);
        for tile in self.tiles {
            let rows = tile * LANES..((tile + 1) * LANES).min(count);
            let len = rows.len();
            let mut classes = indices.load(rows.clone());
            if let Some(weights) = row_weight {
                ignore_weightless(&mut classes, &weights[rows.clone()], ignored);
            }
            // all reads of a tile before the first use of one: a row's number is rarely in the cache
            let mut xs = [T::Acc::ZERO; LANES];
            for ((to, row), class) in xs.iter_mut().zip(rows.clone()).zip(classes) {
                let class = if class == ignored { 0 } else { class as usize };
                *to = x[place.start(row) + class * place.class_stride].to_acc();
            }
            let mut losses = [T::Acc::ZERO; LANES];
            match weight {
                None => {
                    for ((loss, x), class) in losses.iter_mut().zip(xs).zip(classes) {
                        *loss = if class == ignored { T::Acc::ZERO } else { -x };
                    }
                }
                Some(weights) => {
                    for ((loss, x), class) in losses[..len].iter_mut().zip(xs).zip(classes) {
                        let weight = if class == ignored { T::Acc::ZERO } else { weights[class as usize] };
                        *loss = if weight == T::Acc::ZERO { T::Acc::ZERO } else { -weight * x };
                    }
                }
            }
            if let Some(weights) = row_weight {
                weigh_losses(&mut losses, &weights[rows.clone()]);
            }
            match self.to {
                // SAFETY: the rows of a tile are one task's alone
                TileLosses::Each(out) => T::Acc::narrow(&losses[..len], unsafe { out.slice(rows.start, len) }),
                TileLosses::Sums(out) => {
                    // there is no row behind the last one
                    losses[len..].fill(T::Acc::ZERO);
                    let mut sums = [0f64; 8];
                    for losses in losses.chunks_exact(sums.len()) {
                        for (sum, loss) in sums.iter_mut().zip(losses) {
                            *sum += loss.to_f64();
                        }
                    }
                    // SAFETY: a tile is one task's alone
                    unsafe { out.slice(tile, 1)[0].write(sums.iter().sum()) };
                }
            }
        }
    }
}

/// The log-probabilities and checked targets of a call.
struct NllRows<'a, T: Element> {
    problem: &'a Nll,
    x: &'a [T],
    rows: Rows,
    indices: Indices<'a>,
    weight: Option<&'a [T::Acc]>,
    /// A factor of each row, 0 where it doesn't count.
    row_weight: Option<Cow<'a, [T::Acc]>>,
    /// What the sum of the losses is divided by.
    denominator: f64,
}

impl<'a, T: Element> NllRows<'a, T> {
    fn new(
        problem: &'a Nll,
        x: &'a [T],
        rows: Rows,
        target: Arg<'a, CpuStorage>,
        locked: &'a LockedRowOptions,
    ) -> Result<Self> {
        let Nll { name, options, .. } = problem;
        let [weight, row_weight, _] = locked.args(name)?;
        let (weight, row_weight) = (weight.map(own_slice).transpose()?, row_weights(row_weight)?);
        let indices = Indices::new(name, rows.count(), target)?;
        let total = indices.total(name, options.ignore_index, rows.classes, (weight, row_weight.as_deref()))?;
        let denominator = problem.form.denominator(|| total)?;
        Ok(NllRows { problem, x, rows, indices, weight, row_weight, denominator })
    }

    fn denominator(&self) -> T::Acc {
        T::Acc::of(self.denominator)
    }

    /// The class of a row that counts, and its weight.
    #[inline(always)]
    fn own(&self, row: usize) -> Option<(usize, T::Acc)> {
        let class = self.indices.get(row);
        let of_row = self.row_weight.as_ref().map_or(T::Acc::ONE, |weights| weights[row]);
        if class == self.problem.options.ignore_index || of_row == T::Acc::ZERO {
            return None;
        }
        let of_class = self.weight.map_or(T::Acc::ONE, |weight| weight[class as usize]);
        Some((class as usize, of_class * of_row))
    }

    fn loss(&self) -> CpuStorage {
        let (count, tiles) = (self.rows.count(), self.rows.count().div_ceil(LANES));
        let run = |to: TileLosses<T::Acc>| {
            for_each_task(tiles, LANES * ROW_WORK, |tiles| dispatch(NllTiles { rows: self, tiles, to }));
        };
        T::Acc::to_cpu_storage_owned(match self.problem.form {
            // SAFETY: the tiles have all rows
            LossForm::Each => unsafe { build(count, |out| run(TileLosses::Each(out))) },
            LossForm::Scalar(_) => {
                // SAFETY: each tile has a sum
                let sums = unsafe { build(tiles, |out| run(TileLosses::Sums(out))) };
                vec![T::Acc::of(sum_in_order(&sums) / self.denominator)]
            }
        })
    }

    /// Zeros, and a number at each row's own class.
    fn gradient(&self, denominator: T::Acc, upstream: &[T::Acc]) -> CpuStorage {
        let Rows { classes, outer, inner, .. } = self.rows;
        // the rows of a unit are written next to each other
        let (units, of_unit) = if self.rows.class_last() { (self.rows.count(), 1) } else { (outer, inner) };
        let len = units * of_unit * classes;
        let past_cache = stream::exceeds_cache(len * size_of::<T>()) && classes * size_of::<T>() >= LONG_ROW;
        let fill = |out: &Output<T>| {
            for_each_task(units, of_unit * classes, |units| {
                let rows = units.start * of_unit..units.end * of_unit;
                let first = rows.start * classes;
                // SAFETY: these rows are this task's alone
                let out = unsafe { out.slice(first, rows.len() * classes) };
                self.fill_gradient(rows, denominator, upstream, past_cache, out);
            })
        };
        // SAFETY: all rows are filled
        let grad = unsafe { build(len, fill) };
        T::to_cpu_storage_owned(grad)
    }

    /// The gradients of some rows, in memory that is theirs.
    fn fill_gradient(
        &self,
        rows: Range<usize>,
        denominator: T::Acc,
        upstream: &[T::Acc],
        past_cache: bool,
        out: &mut [MaybeUninit<T>],
    ) {
        let zero = MaybeUninit::new(T::from_acc(T::Acc::ZERO));
        if past_cache {
            let zeros = [zero; LONG_ROW];
            out.chunks_mut(LONG_ROW).for_each(|out| stream::copy_past_cache(&zeros[..out.len()], out));
            // before other stores to the same memory, too
            stream::fence();
        } else {
            // with a constant, which makes it a call of memset
            out.fill(MaybeUninit::new(T::from_acc(T::Acc::ZERO)));
        }
        let first = rows.start * self.rows.classes;
        for row in rows {
            let Some((class, weight)) = self.own(row) else { continue };
            let upstream = over_denominator(upstream[if upstream.len() == 1 { 0 } else { row }], denominator);
            let at = self.rows.written_start(row) + class * self.rows.written_stride();
            out[at - first].write(T::from_acc(-(weight * upstream)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::options::RowOptions;
    use candle_core::{Device, Storage, Var};

    /// A gradient that is written past the cache is the one that is written through it, of classes in a row and apart.
    #[test]
    fn a_gradient_past_the_cache_is_the_same() -> Result<()> {
        for dims in [vec![5, 1037], vec![3, 40, 7], vec![2, 1, 3]] {
            let x = Tensor::rand(-2f32, -1., dims.clone(), &Device::Cpu)?;
            let count: usize = x.elem_count() / dims[1];
            let target: Vec<_> =
                (0..count).map(|row| if row == 1 { -100 } else { (row * 31 % dims[1]) as i64 }).collect();
            let target = Tensor::new(target, &Device::Cpu)?;
            let problem = Nll { name: "test", axis: 1, form: LossForm::MEAN, options: RowOptions::default() };
            let (input, target) = (x.storage_and_layout(), target.storage_and_layout());
            let (Storage::Cpu(CpuStorage::F32(data)), Storage::Cpu(t)) = (&*input.0, &*target.0) else {
                panic!("tensors on the CPU")
            };
            let locked = problem.options.lock(&problem.form);
            let rows = NllRows::new(&problem, data, problem.rows(input.1)?, (t, target.1), &locked)?;
            let CpuStorage::F32(grad) = rows.gradient(4.0, &[1.0]) else { panic!("a gradient of the input's dtype") };
            assert_eq!(grad.iter().filter(|&&v| v == -0.25).count(), count - 1);
            let mut past = vec![MaybeUninit::new(f32::NAN); grad.len()];
            rows.fill_gradient(0..count, 4.0, &[1.0], true, &mut past);
            // SAFETY: all were initialised from the start
            let past: Vec<_> = past.iter().map(|v| unsafe { v.assume_init() }).collect();
            assert_eq!(grad, past);
        }
        Ok(())
    }

    /// For Miri.
    #[test]
    fn small_rows_keep_to_their_memory() -> Result<()> {
        for dims in [vec![40, 3], vec![2, 3, 4]] {
            let x = Var::from_tensor(&Tensor::rand(-2f32, -1., dims.clone(), &Device::Cpu)?)?;
            let target = Tensor::ones([&dims[..1], &dims[2..]].concat(), candle_core::DType::U8, &Device::Cpu)?;
            let problem = Nll { name: "test", axis: 1, form: LossForm::MEAN, options: RowOptions::default() };
            let loss = problem.clone().forward(&x, &target)?;
            loss.backward()?;
            let (again, _) = problem.loss_and_grad(&x, &target)?;
            assert_eq!(loss.to_scalar::<f32>()?, again.to_scalar::<f32>()?);
        }
        Ok(())
    }
}
