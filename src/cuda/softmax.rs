//! The softmax family.

use crate::softmax::{Arg, CrossEntropy, Operand, Rows, Saved, Statistics};
use candle_core::{bail, CudaStorage, Layout, Result};

pub(crate) fn forward(p: &CrossEntropy, _: Arg<CudaStorage>, _: Arg<CudaStorage>) -> Result<(CudaStorage, Saved)> {
    bail!("{}: no CUDA kernel yet", p.name)
}

pub(crate) fn backward(
    p: &CrossEntropy,
    _: &Saved,
    _: Operand,
    _: Arg<CudaStorage>,
    _: Arg<CudaStorage>,
    _: Arg<CudaStorage>,
) -> Result<CudaStorage> {
    bail!("{}: no CUDA kernel yet", p.name)
}

pub(crate) fn loss_and_grad(p: &CrossEntropy, _: Arg<CudaStorage>, _: Arg<CudaStorage>) -> Result<(CudaStorage, CudaStorage)> {
    bail!("{}: no CUDA kernel yet", p.name)
}

pub(crate) fn loss_and_grad_inplace(p: &CrossEntropy, _: &mut CudaStorage, _: &Layout, _: Arg<CudaStorage>) -> Result<CudaStorage> {
    bail!("{}: no CUDA kernel yet", p.name)
}

pub(crate) fn statistics(p: &CrossEntropy, _: Arg<CudaStorage>, _: Arg<CudaStorage>) -> Result<(CudaStorage, Statistics<CudaStorage>)> {
    bail!("{}: no CUDA kernel yet", p.name)
}

pub(crate) fn log_softmax(name: &str, _: &CudaStorage, _: &Rows) -> Result<CudaStorage> {
    bail!("{name}: no CUDA kernel yet")
}

pub(crate) fn log_softmax_backward(name: &str, _: (&CudaStorage, &Rows), _: (&CudaStorage, &Rows)) -> Result<CudaStorage> {
    bail!("{name}: no CUDA kernel yet")
}
