//! The formulas of the element-wise family on the CPU, over one element.
//!
//! A formula is all that a term needs on the CPU. It is written without branches, so that the loops of [`super::cpu`]
//! vectorise it.

use super::problem::Term;
use crate::cpu::math::{Isa, Real};

/// Loss and gradients of one element: input x, target t, positive weight p (1 where a loss has none).
pub(super) trait Formula<A: Real>: Copy + Sync {
    fn loss<I: Isa>(self, x: A, t: A, p: A) -> A;
    /// The derivative in x.
    fn grad<I: Isa>(self, x: A, t: A, p: A) -> A;
    /// The derivative in t.
    fn target_grad<I: Isa>(self, x: A, t: A, p: A) -> A;
    /// Loss and derivative in x: the compiler computes once what both need.
    #[inline(always)]
    fn loss_and_grad<I: Isa>(self, x: A, t: A, p: A) -> (A, A) {
        (self.loss::<I>(x, t, p), self.grad::<I>(x, t, p))
    }
}

/// Something to be done with a formula, whichever it is.
pub(super) trait WithFormula<A: Real> {
    type Output;

    fn with(self, formula: impl Formula<A>) -> Self::Output;
}

impl Term {
    /// The term's formula for `task`, with its parameters in the arithmetic type.
    pub(super) fn formula<A: Real, W: WithFormula<A>>(&self, task: W) -> W::Output {
        match *self {
            Term::Bce => task.with(Bce),
            Term::BceWithLogits => task.with(BceWithLogits),
            Term::Focal { alpha, gamma } => {
                let (alpha, gamma) = (alpha.map(A::of), A::of(gamma));
                if gamma == A::of(2.0) {
                    task.with(Focal::<A, true> { alpha, gamma })
                } else {
                    task.with(Focal::<A, false> { alpha, gamma })
                }
            }
            Term::L1 => task.with(L1),
        }
    }
}

/// `factor * value`, 0 where the factor is 0 though the value may be infinite.
#[inline(always)]
fn scaled<A: Real>(factor: A, value: A) -> A {
    let product = factor * value;
    if factor == A::ZERO && !value.is_nan() { A::ZERO } else { product }
}

/// As [`scaled`], whichever of the two is 0: NaN comes from NaN alone.
#[inline(always)]
pub(super) fn product<A: Real>(a: A, b: A) -> A {
    let product = a * b;
    let made_nan = product.is_nan() & !(a.is_nan() | b.is_nan());
    if made_nan { A::ZERO } else { product }
}

/// Binary cross-entropy of a probability, the logarithms clamped at -100 as in PyTorch.
#[derive(Clone, Copy)]
struct Bce;

impl Bce {
    #[inline(always)]
    fn clamped_logs<A: Real, I: Isa>(x: A) -> (A, A) {
        let floor = A::of(-100.0);
        let clamp = |v: A| if v < floor { floor } else { v };
        (clamp(x.vln::<I>()), clamp((-x).vln_1p::<I>()))
    }
}

impl<A: Real> Formula<A> for Bce {
    #[inline(always)]
    fn loss<I: Isa>(self, x: A, t: A, _: A) -> A {
        let (log_x, log_not_x) = Self::clamped_logs::<A, I>(x);
        -(t * log_x + (A::ONE - t) * log_not_x)
    }

    #[inline(always)]
    fn grad<I: Isa>(self, x: A, t: A, _: A) -> A {
        let variance = x * (A::ONE - x);
        let floor = A::of(1e-12);
        (x - t) / if variance < floor { floor } else { variance }
    }

    #[inline(always)]
    fn target_grad<I: Isa>(self, x: A, _: A, _: A) -> A {
        let (log_x, log_not_x) = Self::clamped_logs::<A, I>(x);
        log_not_x - log_x
    }
}

/// The parts of every loss on logits: softplus(x), softplus(-x), sigmoid(x) and sigmoid(-x), each with its full
/// relative accuracy at both ends.
struct Logit<A> {
    softplus: A,
    softplus_neg: A,
    sigmoid: A,
    sigmoid_neg: A,
}

impl<A: Real> Logit<A> {
    #[inline(always)]
    fn new<I: Isa>(x: A) -> Self {
        let e = (-x.abs()).vexp::<I>();
        let log = e.vln_1p_unit::<I>();
        let large = A::ONE / (A::ONE + e);
        let small = e * large;
        let positive = x > A::ZERO;
        Logit {
            softplus: if positive { x + log } else { log },
            softplus_neg: if positive { log } else { log - x },
            sigmoid: if positive { large } else { small },
            sigmoid_neg: if positive { small } else { large },
        }
    }
}

/// Binary cross-entropy of a logit, from the parts that the focal loss needs as well; the CUDA kernels, which are short
/// of instructions, compute the same from the class that x speaks against and the one that it speaks for.
#[derive(Clone, Copy)]
struct BceWithLogits;

impl<A: Real> Formula<A> for BceWithLogits {
    #[inline(always)]
    fn loss<I: Isa>(self, x: A, t: A, p: A) -> A {
        let logit = Logit::new::<I>(x);
        scaled(product(p, t), logit.softplus_neg) + scaled(A::ONE - t, logit.softplus)
    }

    /// `(1 - t) sigmoid(x) - p t sigmoid(-x)`: nothing cancels at a confident logit.
    #[inline(always)]
    fn grad<I: Isa>(self, x: A, t: A, p: A) -> A {
        let logit = Logit::new::<I>(x);
        (A::ONE - t) * logit.sigmoid - product(p, t) * logit.sigmoid_neg
    }

    #[inline(always)]
    fn target_grad<I: Isa>(self, x: A, _: A, p: A) -> A {
        // p softplus(-x) - softplus(x) with the logarithm that both have taken out
        let log = (-x.abs()).vexp::<I>().vln_1p_unit::<I>();
        let (negative, positive) = if x > A::ZERO { (A::ZERO, x) } else { (-x, A::ZERO) };
        product(p - A::ONE, log) + product(p, negative) - positive
    }
}

/// Sigmoid focal loss.
///
/// `SQUARE`: gamma is 2, as it is by default; a square costs neither the logarithm nor the exponential of other powers.
#[derive(Clone, Copy)]
struct Focal<A, const SQUARE: bool> {
    /// The balance of the classes, if any.
    alpha: Option<A>,
    gamma: A,
}

/// The parts that the focal loss and its gradients share: `u = t sigmoid(-x) + (1 - t) sigmoid(x)` is how wrong the
/// prediction is.
struct FocalParts<A> {
    logit: Logit<A>,
    alpha: A,
    /// `u^gamma`
    modulation: A,
    cross_entropy: A,
    u: A,
}

impl<A: Real, const SQUARE: bool> Focal<A, SQUARE> {
    /// `u^gamma`
    #[inline(always)]
    fn modulation<I: Isa>(self, logit: &Logit<A>, t: A, u: A) -> A {
        if SQUARE {
            return u * u;
        }
        // for a hard label the logarithm of a sigmoid, which does not underflow with it
        let log_u = if t == A::ZERO {
            -logit.softplus_neg
        } else if t == A::ONE {
            -logit.softplus
        } else {
            u.vln::<I>()
        };
        if self.gamma == A::ZERO { A::ONE } else { (self.gamma * log_u).vexp::<I>() }
    }

    #[inline(always)]
    fn parts<I: Isa>(self, x: A, t: A) -> FocalParts<A> {
        let logit = Logit::new::<I>(x);
        let not_t = A::ONE - t;
        let u = scaled(t, logit.sigmoid_neg) + scaled(not_t, logit.sigmoid);
        let modulation = self.modulation::<I>(&logit, t, u);
        let alpha = match self.alpha {
            Some(alpha) => alpha * t + (A::ONE - alpha) * not_t,
            None => A::ONE,
        };
        let cross_entropy = scaled(t, logit.softplus_neg) + scaled(not_t, logit.softplus);
        FocalParts { logit, alpha, modulation, cross_entropy, u }
    }
}

impl<A: Real, const SQUARE: bool> Formula<A> for Focal<A, SQUARE> {
    #[inline(always)]
    fn loss<I: Isa>(self, x: A, t: A, _: A) -> A {
        let FocalParts { alpha, modulation, cross_entropy, .. } = self.parts::<I>(x, t);
        scaled(alpha * modulation, cross_entropy)
    }

    /// `alpha u^gamma (sigmoid(x) - t + gamma (u'/u) cross_entropy)`
    #[inline(always)]
    fn grad<I: Isa>(self, x: A, t: A, _: A) -> A {
        let FocalParts { logit, alpha, modulation, cross_entropy, u } = self.parts::<I>(x, t);
        let not_t = A::ONE - t;
        // u'/u, where for a hard label u itself cancels
        let ratio = if t == A::ZERO {
            logit.sigmoid_neg
        } else if t == A::ONE {
            -logit.sigmoid
        } else {
            logit.sigmoid * logit.sigmoid_neg * (not_t - t) / u
        };
        let direct = not_t * logit.sigmoid - t * logit.sigmoid_neg;
        alpha * modulation * (direct + self.gamma * scaled(ratio, cross_entropy))
    }

    /// `alpha' u^gamma ce + alpha (u^gamma ce' + gamma u^(gamma - 1) u' ce)` with the derivatives in t
    #[inline(always)]
    fn target_grad<I: Isa>(self, x: A, t: A, _: A) -> A {
        let FocalParts { logit, alpha, modulation, cross_entropy, u } = self.parts::<I>(x, t);
        let alpha_slope = match self.alpha {
            Some(alpha) => alpha + alpha - A::ONE,
            None => A::ZERO,
        };
        // ce / u stays finite where both vanish: there both are sigmoids of the same large |x|, and ce / u -> 1
        let per_u = if u == A::ZERO { A::ONE } else { cross_entropy / u };
        let u_slope = logit.sigmoid_neg - logit.sigmoid;
        let slope = -x + scaled(self.gamma, per_u * u_slope);
        scaled(modulation, scaled(alpha_slope, cross_entropy) + scaled(alpha, slope))
    }
}

/// The distance of the input from the target.
#[derive(Clone, Copy)]
struct L1;

impl<A: Real> Formula<A> for L1 {
    #[inline(always)]
    fn loss<I: Isa>(self, x: A, t: A, _: A) -> A {
        (x - t).abs()
    }

    /// The sign of the difference; 0 where there is none, NaN where that is NaN.
    #[inline(always)]
    fn grad<I: Isa>(self, x: A, t: A, _: A) -> A {
        let difference = x - t;
        if difference > A::ZERO {
            A::ONE
        } else if difference < A::ZERO {
            -A::ONE
        } else {
            difference
        }
    }

    #[inline(always)]
    fn target_grad<I: Isa>(self, x: A, t: A, p: A) -> A {
        -self.grad::<I>(x, t, p)
    }
}
