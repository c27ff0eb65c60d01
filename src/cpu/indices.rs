//! Class indices of any dtype.

use super::math::{Isa, LANES, Real, Vectorized, dispatch};
use crate::check;
use crate::custom_op::Arg;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result, WithDType};
use std::ops::Range;

pub(crate) enum Indices<'a> {
    U8(&'a [u8]),
    U32(&'a [u32]),
    I16(&'a [i16]),
    I32(&'a [i32]),
    I64(&'a [i64]),
}

/// Calls `body` with the indices as a slice of their own type.
macro_rules! with_indices {
    ($indices:expr, $slice:ident => $body:expr) => {
        match $indices {
            Indices::U8($slice) => $body,
            Indices::U32($slice) => $body,
            Indices::I16($slice) => $body,
            Indices::I32($slice) => $body,
            Indices::I64($slice) => $body,
        }
    };
}

impl<'a> Indices<'a> {
    /// Of a contiguous target: one for each of `rows`.
    pub fn new(name: &str, rows: usize, (storage, layout): Arg<'a, CpuStorage>) -> Result<Self> {
        let count = layout.shape().elem_count();
        if count != rows {
            return Err(check::wrong_count(name, count, rows));
        }
        let range = layout.start_offset()..layout.start_offset() + count;
        Ok(match storage {
            CpuStorage::U8(t) => Indices::U8(&t[range]),
            CpuStorage::U32(t) => Indices::U32(&t[range]),
            CpuStorage::I16(t) => Indices::I16(&t[range]),
            CpuStorage::I32(t) => Indices::I32(&t[range]),
            CpuStorage::I64(t) => Indices::I64(&t[range]),
            other => return Err(check::not_class_indices(name, other.dtype())),
        })
    }

    #[inline(always)]
    pub fn get(&self, row: usize) -> i64 {
        fn widen<I: Copy + Into<i64>>(index: I) -> i64 {
            index.into()
        }
        with_indices!(self, t => widen(t[row]))
    }

    /// The classes of up to [`LANES`] adjacent rows.
    #[inline(always)]
    pub fn load(&self, rows: Range<usize>) -> [i64; LANES] {
        fn widen<I: Copy + Into<i64>>(from: &[I]) -> [i64; LANES] {
            let mut classes = [0; LANES];
            classes.iter_mut().zip(from).for_each(|(to, &class)| *to = class.into());
            classes
        }
        with_indices!(self, t => widen(&t[rows]))
    }

    fn dtype(&self) -> DType {
        fn of<I: WithDType>(_: &[I]) -> DType {
            I::DTYPE
        }
        with_indices!(self, t => of(t))
    }

    fn len(&self) -> usize {
        with_indices!(self, t => t.len())
    }

    /// Checks the class index of every row that counts, and sums their weights. A row of weight 0 doesn't count.
    pub fn total<A: Real>(
        &self,
        name: &str,
        ignore_index: i64,
        classes: usize,
        (weight, row_weight): (Option<&[A]>, Option<&[A]>),
    ) -> Result<f64> {
        let Some(of_rows) = row_weight else {
            let counted = (0..self.len()).map(|row| self.get(row)).filter(|class| *class != ignore_index);
            let count = with_indices!(self, t => dispatch(CountRows { indices: t, ignore_index, classes }));
            if count.is_none() {
                let all = (0..self.len()).map(|row| self.get(row));
                check::class_range(name, all, self.dtype(), classes, ignore_index)?;
            }
            return Ok(match weight {
                None => count.unwrap_or_default() as f64,
                Some(weight) => counted.map(|class| weight[class as usize].to_f64()).sum(),
            });
        };
        let looked_at = |row: usize| if of_rows[row] == A::ZERO { ignore_index } else { self.get(row) };
        let all = || (0..self.len()).map(looked_at);
        check::class_range(name, all(), self.dtype(), classes, ignore_index)?;
        let counted = all().zip(of_rows).filter(|(class, _)| *class != ignore_index);
        Ok(counted
            .map(|(class, of_row)| weight.map_or(1.0, |weight| weight[class as usize].to_f64()) * of_row.to_f64())
            .sum())
    }
}

/// How many rows count, or nothing if a class is out of range.
struct CountRows<'k, I> {
    indices: &'k [I],
    ignore_index: i64,
    classes: usize,
}

impl<C: Copy + Into<i64>> Vectorized for CountRows<'_, C> {
    type Output = Option<usize>;

    #[inline(always)]
    fn run<I: Isa>(self) -> Option<usize> {
        let (mut count, mut good) = (0, true);
        for &class in self.indices {
            let class = class.into();
            let counts = class != self.ignore_index;
            // as an unsigned number a negative class is a large one
            good &= !counts | ((class as u64) < self.classes as u64);
            count += counts as usize;
        }
        good.then_some(count)
    }
}
