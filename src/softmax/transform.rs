//! Row transforms: what becomes of the negative log-likelihood of a row's own class.

use crate::check;
use candle_core::{Result, bail};

/// A function of the own class's negative log-likelihood, which takes its place in the loss of a row: see
/// [`CrossEntropyLoss::with_row_transform`](crate::CrossEntropyLoss::with_row_transform).
///
/// With `n = log sum_c exp(x_c) - x_t`, the probability `p = exp(-n)` of the target class, and `u = 1 - p`:
///
/// | | value | derivative by n | source |
/// | --- | --- | --- | --- |
/// | `Focal` | `u^gamma n` | `u^gamma (1 + gamma p n / u)` | Lin et al. 2017 |
/// | `Poly1` | `n + epsilon u` | `1 + epsilon p` | Leng et al. 2022 |
/// | `Dft` | `p n`, p being a constant | `p` | dynamic fine-tuning, Wu et al. 2025 |
/// | `GeneralizedCe` | `(1 - p^q) / q` | `p^q` | Zhang and Sabuncu 2018 |
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_loss::{CrossEntropyLoss, RowTransform};
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 2., 3.], [1., 2., 0.]], &Device::Cpu)?;
/// let target = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let focal = CrossEntropyLoss::new().with_row_transform(RowTransform::Focal { gamma: 2.0 });
/// assert!((focal.forward(&logits, &target)?.to_scalar::<f32>()? - 0.424313).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowTransform {
    /// Softmax focal loss: confident rows count less. `gamma` is a finite number of 0 or more.
    Focal {
        /// The exponent of `1 - p`.
        gamma: f64,
    },
    /// Poly-1: a finite number more of `1 - p`, the first term of the loss's series.
    Poly1 {
        /// The factor of `1 - p`.
        epsilon: f64,
    },
    /// Dynamic fine-tuning: a token counts as much as it is probable, without a gradient through that weight.
    Dft,
    /// Generalised cross-entropy, bounded and so robust against wrong labels. `q` is in (0, 1]: near 0 it is
    /// cross-entropy, at 1 the absolute error.
    GeneralizedCe {
        /// The exponent of p.
        q: f64,
    },
}

impl RowTransform {
    pub(crate) fn check(&self, name: &str) -> Result<()> {
        match *self {
            RowTransform::Focal { gamma } if !gamma.is_finite() || gamma < 0.0 => {
                bail!("{name}: gamma {gamma}, expected a finite number of 0 or more")
            }
            RowTransform::Poly1 { epsilon } => check::finite(name, "epsilon", epsilon),
            RowTransform::GeneralizedCe { q } if !(q > 0.0 && q <= 1.0) => {
                bail!("{name}: q {q}, expected a number in (0, 1]")
            }
            RowTransform::Focal { .. } | RowTransform::Dft | RowTransform::GeneralizedCe { .. } => Ok(()),
        }
    }

    /// The value and its derivative at n. What is infinite or 0 there is their limit.
    pub(crate) fn at(self, n: f64) -> (f64, f64) {
        let (p, u) = ((-n).exp(), -(-n).exp_m1());
        match self {
            RowTransform::Focal { gamma } => {
                let power = u.powf(gamma);
                // p n / u: 1 where u is 0, and 0 where the own class is at -inf
                let ratio = match (p, u) {
                    (0.0, _) => 0.0,
                    (_, 0.0) => 1.0,
                    (p, u) => p * n / u,
                };
                (power * n, power * (1.0 + gamma * ratio))
            }
            RowTransform::Poly1 { epsilon } => (n + epsilon * u, 1.0 + epsilon * p),
            RowTransform::Dft => (if p == 0.0 { 0.0 } else { p * n }, p),
            RowTransform::GeneralizedCe { q } => (-(-q * n).exp_m1() / q, (-q * n).exp()),
        }
    }

    /// Its number among `RowTransform` of `kernels/softmax/state.cuh`, and its parameter there.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_kernels(self) -> (i32, f64) {
        match self {
            RowTransform::Focal { gamma } => (1, gamma),
            RowTransform::Poly1 { epsilon } => (2, epsilon),
            RowTransform::Dft => (3, 0.0),
            RowTransform::GeneralizedCe { q } => (4, q),
        }
    }
}
