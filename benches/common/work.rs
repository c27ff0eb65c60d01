//! What is timed: one call of one implementation's pass, each call on the next set of inputs.

use super::backward;
use super::case::{Case, Implementation, LABEL_SMOOTHING, Loss, Pass, SOFTCAP, Shape};
use super::data::Data;
use super::machine::Machine;
use candle_core::{Result, Tensor, Var};
use candle_fused_loss as fused;
use candle_fused_loss::unfused;
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
            if pass == Pass::TargetGradient && set.tracked_target.is_none() {
                set.tracked_target = Some(Var::from_tensor(&set.target)?);
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
        let scratch = || prepared(data.scratch.as_ref());
        match pass {
            Pass::Forward | Pass::HostCall => {
                self.forward(implementation, data, (&data.input(&leaf)?, &data.target))?;
            }
            Pass::Backward | Pass::ForwardBackward => {
                self.forward(implementation, data, (&data.input(&data.leaf)?, &data.target))?.backward()?;
            }
            Pass::TargetGradient => {
                let target = prepared(data.tracked_target.as_ref())?;
                self.forward(implementation, data, (&data.input(&leaf)?, target))?.backward()?;
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
            Pass::Backward | Pass::TargetGradient => {
                calls.map(|i| self.time_backward(machine, implementation, pass, i)).sum()
            }
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

    /// The time of the loss's backward alone.
    fn time_backward(
        &self,
        machine: &Machine,
        implementation: Implementation,
        pass: Pass,
        i: usize,
    ) -> Result<Duration> {
        let data = self.set(i);
        let loss = |x: &Tensor, t: &Tensor| self.forward(implementation, data, (x, t));
        if pass == Pass::TargetGradient {
            let (x, t) = (data.input(&data.leaf.as_detached_tensor())?, prepared(data.tracked_target.as_ref())?);
            return backward::time(&machine.clock, t, |t| loss(&x, t));
        }
        backward::time(&machine.clock, &data.input(&data.leaf)?, |x| loss(x, &data.target))
    }

    fn cross_entropy(&self) -> fused::CrossEntropyLoss {
        let loss = match self.case.shape {
            Shape::Shifted { .. } => fused::CrossEntropyLoss::new().with_class_axis(-1),
            _ => fused::CrossEntropyLoss::new(),
        };
        match self.case.loss {
            Loss::CrossEntropySoftcap => loss.with_softcap(SOFTCAP),
            Loss::CrossEntropySmoothing => loss.with_label_smoothing(LABEL_SMOOTHING),
            _ => loss,
        }
    }

    /// The loss of logits and a target, or of a linear layer's input, whose weight asks for a gradient if that does.
    fn forward(&self, implementation: Implementation, data: &Data, (x, t): (&Tensor, &Tensor)) -> Result<Tensor> {
        use Implementation::{Candle, Fused, Unfused};
        match (self.case.loss, implementation) {
            (Loss::CrossEntropy, Candle) => {
                let (x, t) = data.two_axes(x)?;
                candle_nn::loss::cross_entropy(&x, &t)
            }
            (
                Loss::CrossEntropy
                | Loss::CrossEntropySoftcap
                | Loss::CrossEntropySmoothing
                | Loss::CrossEntropyProbabilities,
                Fused | Unfused,
            ) => self.cross_entropy().with_fused(implementation == Fused).forward(x, t),
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
                let weight = weight(data, x.track_op())?;
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
            Loss::CrossEntropy
            | Loss::CrossEntropySoftcap
            | Loss::CrossEntropySmoothing
            | Loss::CrossEntropyProbabilities => drop(self.cross_entropy().loss_and_grad(x, t)?),
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

fn prepared<T>(what: Option<&T>) -> Result<&T> {
    what.ok_or_else(|| candle_core::Error::Msg("call without prepare".into()))
}

fn weight(data: &Data, tracked: bool) -> Result<Tensor> {
    match &data.weight {
        Some(weight) if tracked => Ok(weight.as_tensor().clone()),
        Some(weight) => Ok(weight.as_detached_tensor()),
        None => candle_core::bail!("the case has no linear layer"),
    }
}
