//! The time of a loss's backward within candle's `backward()`, which does more than that.

use super::machine::{Clock, Mark};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The time that a loss takes for the gradient of `x`. candle goes on with zeros, to which it adds the gradient, and
/// leaves no moment before: so that is done once more, and its time is taken off.
///
/// candle walks back through the nodes in the reverse of the order in which the last of them names them. So one whose
/// only use is that it has been reached tells the moment before the loss's backward, and another one the moment after.
pub fn time(clock: &Clock, x: &Tensor, loss: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Duration> {
    let marks = Arc::new(Mutex::new(vec![]));
    let moment = |at| Moment { at, clock: clock.clone(), marks: marks.clone() };
    let end = x.apply_op1(moment(At::End))?;
    let loss = loss(x)?;
    let begin = loss.apply_op1(moment(At::Begin))?;
    end.apply_op3(&loss, &begin, InThisOrder)?.backward()?;
    let marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
    let [begin, end, again, done] = marks.as_slice() else {
        bail!("{} moments on the way back, expected 4", marks.len())
    };
    let (with_sum, sum) = (clock.between(begin, end)?, clock.between(again, done)?);
    Ok(with_sum.saturating_sub(sum))
}

#[derive(Clone, Copy)]
enum At {
    Begin,
    End,
}

/// Notes when `backward()` has come to its argument, to which it adds nothing.
struct Moment {
    at: At,
    clock: Clock,
    marks: Arc<Mutex<Vec<Mark>>>,
}

impl Moment {
    fn mark(&self) -> Result<()> {
        let mark = self.clock.mark()?;
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).push(mark);
        Ok(())
    }
}

impl CustomOp1 for Moment {
    fn name(&self) -> &'static str {
        "moment"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        one_zero(storage)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        match self.at {
            At::Begin => {
                self.clock.flush()?;
                self.mark()?;
            }
            At::End => {
                self.mark()?;
                // the cache and the host's lead as they were
                self.clock.flush()?;
                let gradient = x.zeros_like()?;
                self.mark()?;
                x.zeros_like()?.add(&gradient)?;
                self.mark()?;
            }
        }
        Ok(None)
    }
}

/// The end of the graph: gives each argument a gradient of ones, the last one first.
struct InThisOrder;

impl CustomOp3 for InThisOrder {
    fn name(&self) -> &'static str {
        "in_this_order"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(
        &self,
        storage: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        one_zero(storage)
    }

    fn bwd(
        &self,
        end: &Tensor,
        loss: &Tensor,
        begin: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((Some(end.ones_like()?), Some(loss.ones_like()?), Some(begin.ones_like()?)))
    }
}

/// A scalar where another storage lies.
fn one_zero(beside: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let scalar = Shape::from(());
    Ok((beside.device().zeros_impl(&scalar, DType::F32)?, scalar))
}
