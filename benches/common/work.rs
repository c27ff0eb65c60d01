//! What is timed: one call of one implementation's pass, each call on the next set of inputs.

use super::case::{Case, Implementation, Loss, Pass, SOFTCAP};
use super::data::Data;
use super::machine::{Clock, Machine, Mark};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Tensor};
use candle_fused_loss as fused;
use candle_fused_loss::unfused;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The inputs of a case: as many sets as push each other out of the cache, but not more than [`MAX_SETS`].
pub struct Inputs {
    case: Case,
    sets: Vec<Data>,
}

/// Small problems stay in the cache of a CPU with this many sets, as they do in training, where the logits have just
/// been written. On a GPU the clock empties the cache.
const MAX_SETS: usize = 16;

impl Inputs {
    pub fn new(case: Case, machine: &Machine) -> Result<Self> {
        let needed = (3 * machine.cache_bytes).div_ceil(case.input_bytes().max(1));
        let sets = needed.clamp(1, MAX_SETS) as u64;
        let sets = (0..sets).map(|set| Data::new(&case, set, &machine.device)).collect::<Result<_>>()?;
        Ok(Inputs { case, sets })
    }

    /// Prepares what a pass needs besides the inputs, once.
    pub fn prepare(&mut self, pass: Pass) -> Result<()> {
        for set in &mut self.sets {
            if matches!(pass, Pass::LossAndGradInplace | Pass::Accumulate) && set.scratch.is_none() {
                set.scratch = Some(set.leaf.as_detached_tensor().copy()?);
            }
        }
        Ok(())
    }

    /// The sets of inputs.
    #[allow(dead_code)]
    pub fn sets(&self) -> usize {
        self.sets.len()
    }

    fn set(&self, i: usize) -> &Data {
        &self.sets[i % self.sets.len()]
    }

    /// One call on the `i`-th set, modulo their number.
    pub fn call(&self, implementation: Implementation, pass: Pass, i: usize) -> Result<()> {
        let data = self.set(i);
        let leaf = data.leaf.as_detached_tensor();
        let scratch = || data.scratch.as_ref().ok_or_else(|| candle_core::Error::Msg("call without prepare".into()));
        match pass {
            Pass::Forward | Pass::HostCall => {
                self.forward(implementation, data, &leaf, false)?;
            }
            Pass::Backward | Pass::ForwardBackward => {
                self.forward(implementation, data, &data.leaf, true)?.backward()?;
            }
            Pass::LossAndGrad => self.loss_and_grad(data, &leaf)?,
            Pass::LossAndGradInplace => {
                self.cross_entropy().loss_and_grad_inplace(scratch()?, &data.target)?;
            }
            Pass::Accumulate => {
                leaf.zeros_like()?.add(scratch()?)?;
            }
        }
        Ok(())
    }

    /// The time of `count` calls, the sets in turn from the `first` on.
    pub fn time(
        &self,
        machine: &Machine,
        implementation: Implementation,
        pass: Pass,
        first: usize,
        count: usize,
    ) -> Result<Duration> {
        let mut calls = first..first + count;
        match pass {
            Pass::Backward => calls.map(|i| self.time_backward(machine, implementation, i)).sum(),
            Pass::HostCall => {
                let start = Instant::now();
                calls.try_for_each(|i| self.call(implementation, pass, i))?;
                let elapsed = start.elapsed();
                machine.device.synchronize()?;
                Ok(elapsed)
            }
            _ => machine.clock.time(|| calls.try_for_each(|i| self.call(implementation, pass, i))),
        }
    }

    /// The time of the loss's backward alone. candle's `backward()` goes on with zeros and a sum for the gradient that
    /// it gets, which can't be had without: so they are done once more, and their time is taken off.
    fn time_backward(&self, machine: &Machine, implementation: Implementation, i: usize) -> Result<Duration> {
        let data = self.set(i);
        let marks = Arc::new(Mutex::new(vec![]));
        let marker = |side| Marker { side, clock: machine.clock.clone(), marks: marks.clone() };
        let leaf = data.leaf.apply_op1(marker(Side::Input))?;
        let loss = self.forward(implementation, data, &leaf, true)?;
        loss.apply_op1(marker(Side::Loss))?.backward()?;
        let marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
        let [begin, end, again] = marks.as_slice() else {
            candle_core::bail!("{} marks on the way back, expected 3", marks.len())
        };
        let (with_sum, sum) = (machine.clock.between(begin, end)?, machine.clock.between(end, again)?);
        Ok(with_sum.saturating_sub(sum))
    }

    fn cross_entropy(&self) -> fused::CrossEntropyLoss {
        match self.case.loss {
            Loss::CrossEntropySoftcap => fused::CrossEntropyLoss::new().with_softcap(SOFTCAP),
            _ => fused::CrossEntropyLoss::new(),
        }
    }

    fn forward(&self, implementation: Implementation, data: &Data, leaf: &Tensor, tracked: bool) -> Result<Tensor> {
        use Implementation::{Candle, Fused, Unfused};
        let (x, t) = (&data.input(leaf)?, &data.target);
        match (self.case.loss, implementation) {
            (Loss::CrossEntropy | Loss::CrossEntropySoftcap | Loss::CrossEntropyProbabilities, Fused) => {
                self.cross_entropy().forward(x, t)
            }
            (Loss::CrossEntropy | Loss::CrossEntropySoftcap | Loss::CrossEntropyProbabilities, Unfused) => {
                let loss = fused::CrossEntropyLoss::new().with_fused(false);
                let loss = if self.case.loss == Loss::CrossEntropySoftcap { loss.with_softcap(SOFTCAP) } else { loss };
                loss.forward(x, t)
            }
            (Loss::CrossEntropy, Candle) => {
                let (x, t) = data.two_axes(x)?;
                candle_nn::loss::cross_entropy(&x, &t)
            }
            (Loss::Nll, Fused) => fused::nll(x, t),
            (Loss::Nll, Unfused) => unfused::nll(x, t),
            (Loss::Nll, Candle) => candle_nn::loss::nll(x, t),
            (Loss::LogSoftmax, Fused) => fused::log_softmax(x, 1),
            (Loss::LogSoftmax, Unfused) => unfused::log_softmax(x, 1),
            (Loss::LogSoftmax, Candle) => candle_nn::ops::log_softmax(x, 1),
            (Loss::Bce, Fused) => fused::binary_cross_entropy(x, t),
            (Loss::Bce, Unfused) => unfused::binary_cross_entropy(x, t),
            (Loss::BceWithLogits, Fused) => fused::binary_cross_entropy_with_logits(x, t),
            (Loss::BceWithLogits, Unfused) => unfused::binary_cross_entropy_with_logits(x, t),
            (Loss::BceWithLogits, Candle) => candle_nn::loss::binary_cross_entropy_with_logit(x, t),
            (Loss::MultiLabel, Fused) => fused::multi_label_soft_margin(x, t),
            (Loss::MultiLabel, Unfused) => unfused::multi_label_soft_margin(x, t),
            (Loss::Focal, Fused) => fused::sigmoid_focal(x, t),
            (Loss::Focal, Unfused) => unfused::sigmoid_focal(x, t),
            (Loss::LinearCrossEntropy, _) => {
                let weight = weight(data, tracked)?;
                match implementation {
                    Fused => fused::linear_cross_entropy(x, &weight, t),
                    Unfused => unfused::linear_cross_entropy(x, &weight, t),
                    Candle => candle_nn::loss::cross_entropy(&x.matmul(&weight.t()?)?, t),
                }
            }
            (_, Candle) => candle_core::bail!("candle has no {}", self.case.loss.name()),
        }
    }

    fn loss_and_grad(&self, data: &Data, leaf: &Tensor) -> Result<()> {
        let (x, t) = (&data.input(leaf)?, &data.target);
        match self.case.loss {
            Loss::CrossEntropy | Loss::CrossEntropySoftcap | Loss::CrossEntropyProbabilities => {
                self.cross_entropy().loss_and_grad(x, t)?;
            }
            Loss::LinearCrossEntropy => {
                fused::LinearCrossEntropyLoss::new().loss_and_grad(x, &weight(data, false)?, None, t)?;
            }
            Loss::Nll => drop(fused::NllLoss::new().loss_and_grad(x, t)?),
            Loss::Bce => drop(fused::BceLoss::new().loss_and_grad(x, t)?),
            Loss::BceWithLogits => drop(fused::BceWithLogitsLoss::new().loss_and_grad(x, t)?),
            Loss::MultiLabel => drop(fused::MultiLabelSoftMarginLoss::new().loss_and_grad(x, t)?),
            Loss::Focal => drop(fused::SigmoidFocalLoss::new().loss_and_grad(x, t)?),
            Loss::LogSoftmax => candle_core::bail!("log_softmax is no loss"),
        }
        Ok(())
    }
}

fn weight(data: &Data, tracked: bool) -> Result<Tensor> {
    match &data.weight {
        Some(weight) if tracked => Ok(weight.as_tensor().clone()),
        Some(weight) => Ok(weight.as_detached_tensor()),
        None => candle_core::bail!("the case has no linear layer"),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Input,
    Loss,
}

/// Passes a tensor on, and its gradient when that comes back, noting the time.
struct Marker {
    side: Side,
    clock: Clock,
    marks: Arc<Mutex<Vec<Mark>>>,
}

impl Marker {
    fn mark(&self) -> Result<()> {
        let mark = self.clock.mark()?;
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).push(mark);
        Ok(())
    }
}

impl CustomOp1 for Marker {
    fn name(&self) -> &'static str {
        "marker"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, candle_core::Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, candle_core::Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(&self, input: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        match self.side {
            Side::Loss => {
                self.clock.flush()?;
                self.mark()?;
            }
            Side::Input => {
                self.mark()?;
                // as `backward()` did between the loss's gradient and this call
                input.zeros_like()?.add(gradient)?;
                self.mark()?;
            }
        }
        Ok(Some(gradient.clone()))
    }
}
