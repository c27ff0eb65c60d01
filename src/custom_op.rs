//! What the families' custom ops share: their kernels' arguments and results, and the two devices behind one trait.
//!
//! candle calls `cpu_fwd` or `cuda_fwd` by the device of the first argument. Both are written once, in
//! [`device_passes`], and call the op's `run`, which is generic over the storage, `S: DeviceStorage`. The family's
//! trait of kernels, which [`CpuStorage`] and `CudaStorage` implement, does the rest.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Device, Error, Layout, Result, Shape, Storage, StorageRef, Tensor, Var, bail};
use std::sync::OnceLock;

/// A kernel's argument: where its elements are and how they lie.
pub(crate) type Arg<'a, S> = (&'a S, &'a Layout);

/// Which argument of a loss a gradient is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    /// The logits or probabilities. The gradient has their dtype.
    Input,
    /// The target, where it holds floats. The gradient is written in the arithmetic dtype.
    Target,
}

/// The memory of tensors on a device that has kernels.
pub(crate) trait DeviceStorage: BackendStorage {
    /// The storage as one of this device's.
    fn of(storage: &Storage) -> Option<&Self>;

    fn into_storage(self) -> Storage;

    /// A tensor of its own from what a kernel wrote.
    fn into_tensor(self, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_storage(self.into_storage(), shape, BackpropOp::none(), false)
    }
}

impl DeviceStorage for CpuStorage {
    fn of(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(self) -> Storage {
        Storage::Cpu(self)
    }
}

#[cfg(feature = "cuda")]
impl DeviceStorage for CudaStorage {
    fn of(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    fn into_storage(self) -> Storage {
        Storage::Cuda(self)
    }
}

/// candle's methods of an op of 1, 2 or 3 arguments that has a `run` for every storage: its name, at a path from
/// `self`, and a pass for each device.
macro_rules! device_passes {
    (1, $($name:ident).+) => { $crate::custom_op::device_passes!(@ $($name).+, s1 l1); };
    (2, $($name:ident).+) => { $crate::custom_op::device_passes!(@ $($name).+, s1 l1, s2 l2); };
    (3, $($name:ident).+) => { $crate::custom_op::device_passes!(@ $($name).+, s1 l1, s2 l2, s3 l3); };
    (@ $($name:ident).+, $($s:ident $l:ident),+) => {
        fn name(&self) -> &'static str {
            self.$($name).+
        }

        fn cpu_fwd(
            &self,
            $($s: &candle_core::CpuStorage, $l: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
            self.run($(($s, $l)),+)
        }

        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            $($s: &candle_core::CudaStorage, $l: &candle_core::Layout),+
        ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
            self.run($(($s, $l)),+)
        }
    };
}
pub(crate) use device_passes;

/// Whether there are kernels for the device. Elsewhere the losses are composed of candle's tensor ops.
pub(crate) fn has_kernels(device: &Device) -> bool {
    !device.is_metal()
}

/// Whether a loss of this input is composed of tensor ops: where that was asked for, or there are no kernels. On CUDA
/// candle's ops take no empty tensors, for which the kernels' path launches nothing.
pub(crate) fn is_composed(fused: bool, input: &Tensor) -> bool {
    let composable = !input.device().is_cuda() || input.elem_count() > 0;
    (!fused && composable) || !has_kernels(input.device())
}

/// As [`is_composed`] for a loss with autograd: also where gradients are to be differentiated again, which those of
/// tensor ops can be. The first operand is the input.
pub(crate) fn is_composed_in_graph(fused: bool, operands: &[&Tensor]) -> bool {
    let twice = operands.iter().any(|operand| operand.track_op()) && KEPT_AT_FORWARD.with(|kept| *kept);
    operands.first().is_some_and(|input| is_composed(fused && !twice, input))
}

/// The environment variable that makes candle keep the graph of a backward.
const KEEP_BACKWARD_GRAPH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

thread_local! {
    /// The variable as it was at a thread's first loss of tracked tensors, and at its first backward through one.
    /// candle reads it once a thread too, in the first backward, which may come later than the first loss.
    static KEPT_AT_FORWARD: bool = keeps_backward_graph();
    static KEPT_AT_BACKWARD: bool = keeps_backward_graph();
}

fn keeps_backward_graph() -> bool {
    std::env::var(KEEP_BACKWARD_GRAPH).is_ok_and(|value| !value.is_empty() && value != "0")
}

/// An `Err` where a backward by kernels, whose gradients have no graph, would take part in a backward that keeps its
/// graph: second derivatives would lack this loss.
pub(crate) fn check_first_order(name: &str) -> Result<()> {
    if !KEPT_AT_BACKWARD.with(|kept| *kept) {
        return Ok(());
    }
    bail!(
        "{name}: {KEEP_BACKWARD_GRAPH} asks for second derivatives, but was not set yet at this thread's first loss, \
         expected it to be set ahead of that, or with_fused(false)"
    )
}

/// An operand that is not an argument of the custom op, locked for the time of a call.
pub(crate) struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Locked { storage, layout }
    }

    /// As an argument of a kernel of `name`; an `Err` if it is on another device than the others.
    pub fn arg<S: DeviceStorage>(&self, name: &str) -> Result<Arg<'_, S>> {
        match S::of(&self.storage) {
            Some(storage) => Ok((storage, self.layout)),
            None => {
                bail!("{name}: an operand on {:?}, expected it on the input's device", self.storage.device().location())
            }
        }
    }
}

/// Whether a gradient of the argument leads anywhere.
pub(crate) fn takes_gradient(arg: &Tensor) -> bool {
    arg.track_op() && arg.dtype().is_float()
}

/// What the forward of an op left for its backward.
pub(crate) fn saved<'a, T>(slot: &'a OnceLock<T>, name: &str) -> Result<&'a T> {
    check_first_order(name)?;
    slot.get().ok_or_else(|| Error::Msg(format!("{name}: backward before forward")).bt())
}

/// What an op left in its side output.
pub(crate) fn taken<T>(slot: OnceLock<T>) -> Result<T> {
    slot.into_inner().ok_or_else(|| Error::msg("a loss kernel wrote no side output"))
}

pub(crate) fn put<T>(slot: &OnceLock<T>, value: T) -> Result<()> {
    slot.set(value).map_err(|_| Error::msg("a loss op ran twice"))
}

/// A loss that is composed of tensor ops, and its gradient for an upstream gradient of `grad_scale` everywhere.
pub(crate) fn through_autograd(
    input: &Tensor,
    grad_scale: f64,
    loss: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let input = Var::from_tensor(&input.detach())?;
    let loss = loss(&input)?;
    let grad = match loss.elem_count() {
        // candle's CUDA part has no ones of an empty shape
        0 => None,
        _ => (&loss * grad_scale)?.backward()?.remove(&input),
    };
    Ok((loss.detach(), grad.map_or_else(|| input.zeros_like(), Ok)?))
}
