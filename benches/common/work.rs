//! What is timed: one call of one implementation's pass, each call on the next set of inputs.

use super::case::{Case, Implementation, Loss, Pass};
use super::data::Data;
use super::machine::Machine;
use candle_core::{Result, Tensor};
use candle_fused_loss as fused;
use candle_fused_loss::unfused;
use std::time::Duration;

/// The inputs of a case: as many sets as push each other out of the cache, but not more than [`MAX_SETS`].
pub struct Inputs {
    case: Case,
    sets: Vec<Data>,
}

/// Small problems stay in the cache of a CPU with this many sets, as they do in training, where the logits have just been
/// written. On a GPU the clock empties the cache.
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
                set.scratch = Some(set.input.as_detached_tensor().copy()?);
            }
        }
        Ok(())
    }

    /// The sets of inputs.
    #[allow(dead_code)]
    pub fn sets(&self) -> usize {
        self.sets.len()
    }

    /// One call on the `i`-th set, modulo their number.
    pub fn call(&self, implementation: Implementation, pass: Pass, i: usize) -> Result<()> {
        let data = &self.sets[i % self.sets.len()];
        let input = data.input.as_detached_tensor();
        let scratch = || data.scratch.as_ref().ok_or_else(|| candle_core::Error::Msg("call without prepare".into()));
        match pass {
            Pass::Forward => {
                forward(implementation, self.case.loss, &input, &data.target)?;
            }
            Pass::ForwardBackward => {
                forward(implementation, self.case.loss, data.input.as_tensor(), &data.target)?.backward()?;
            }
            Pass::LossAndGrad => {
                loss_and_grad(self.case.loss, &input, &data.target)?;
            }
            Pass::LossAndGradInplace => {
                fused::CrossEntropyLoss::new().loss_and_grad_inplace(scratch()?, &data.target)?;
            }
            Pass::Accumulate => {
                input.zeros_like()?.add(scratch()?)?;
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
        machine.clock.time(|| (first..first + count).try_for_each(|i| self.call(implementation, pass, i)))
    }
}

fn forward(implementation: Implementation, loss: Loss, x: &Tensor, t: &Tensor) -> Result<Tensor> {
    use Implementation::{Candle, Fused, Unfused};
    match (loss, implementation) {
        (Loss::CrossEntropy | Loss::CrossEntropyProbabilities, Fused) => fused::cross_entropy(x, t),
        (Loss::CrossEntropy | Loss::CrossEntropyProbabilities, Unfused) => unfused::cross_entropy(x, t),
        (Loss::CrossEntropy, Candle) => candle_nn::loss::cross_entropy(x, t),
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
        (_, Candle) => candle_core::bail!("candle has no {}", loss.name()),
    }
}

fn loss_and_grad(loss: Loss, x: &Tensor, t: &Tensor) -> Result<(Tensor, Tensor)> {
    match loss {
        Loss::CrossEntropy | Loss::CrossEntropyProbabilities => fused::CrossEntropyLoss::new().loss_and_grad(x, t),
        Loss::Nll => fused::NllLoss::new().loss_and_grad(x, t),
        Loss::Bce => fused::BceLoss::new().loss_and_grad(x, t),
        Loss::BceWithLogits => fused::BceWithLogitsLoss::new().loss_and_grad(x, t),
        Loss::MultiLabel => fused::MultiLabelSoftMarginLoss::new().loss_and_grad(x, t),
        Loss::Focal => fused::SigmoidFocalLoss::new().loss_and_grad(x, t),
        Loss::LogSoftmax => candle_core::bail!("log_softmax is no loss"),
    }
}
