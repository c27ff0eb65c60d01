//! Vector mathematics: branch-free elementary functions that LLVM turns into SIMD code, and the run-time dispatch that
//! lets it use the widest vectors the machine has.
//!
//! Everything here is plain scalar code over [`Real`] without branches or calls into libm. [`dispatch`] instantiates a
//! [`Vectorized`] computation once for each instruction set that `pulp` knows (AVX-512, AVX2 with FMA, NEON, baseline)
//! and picks one at run time; because every function is `#[inline(always)]`, the loops of the kernel are vectorised
//! with those features. A closure that the compiler doesn't inline is compiled without them, a fused multiply-add in it
//! being a call into libm: the kernels are written with loops.
//!
//! Why `pulp`: the same loops (the maximum of 32768 `f32` and the sum of their exponentials) take 0.20 ns an element
//! through pulp 0.22, multiversion 0.9 and fearless_simd 1.2, and 0.95 ns without any of them, on one core of an AMD
//! EPYC (family 26, model 2). They differ in what they bring along, and candle's matrix multiplication brings pulp
//! already.

use std::hint::black_box;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// A computation that is compiled once for each instruction set.
pub(crate) trait Vectorized {
    type Output;
    /// `I` is the instruction set: it says whether a fused multiply-add is an instruction or a slow library call.
    fn run<I: Isa>(self) -> Self::Output;
}

/// What a kernel needs to know of the instruction set it is compiled for.
pub(crate) trait Isa: Copy {
    const HAS_FMA: bool;
}

#[derive(Clone, Copy)]
struct Vector;
impl Isa for Vector {
    const HAS_FMA: bool = true;
}

/// Any machine's instructions; also what scalar code outside of [`dispatch`] uses.
#[derive(Clone, Copy)]
pub(crate) struct Baseline;
impl Isa for Baseline {
    const HAS_FMA: bool = false;
}

/// Runs `kernel` with the widest instruction set of this machine.
pub(crate) fn dispatch<K: Vectorized>(kernel: K) -> K::Output {
    struct Adapter<K>(K);
    impl<K: Vectorized> pulp::WithSimd for Adapter<K> {
        type Output = K::Output;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> K::Output {
            if S::IS_SCALAR { self.0.run::<Baseline>() } else { self.0.run::<Vector>() }
        }
    }
    pulp::Arch::new().dispatch(Adapter(kernel))
}

/// The arithmetic type of a loss: `f32` for 16-bit and `f32` inputs, `f64` for `f64`.
pub(crate) trait Real:
    candle_core::WithDType
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    const NAN: Self;

    fn of(v: f64) -> Self;
    fn abs(self) -> Self;
    fn is_finite(self) -> bool;
    fn is_nan(self) -> bool;
    fn fma<I: Isa>(self, a: Self, b: Self) -> Self;

    /// `e^x` for `x <= 88` within 1 ulp where that is a normal number; below these 0, but for the first half of an
    /// octave; NaN for NaN.
    ///
    /// Every exponential of a stable loss is of a number that is not positive. A product that is not a normal number
    /// takes some processors a hundred cycles, and masked logits of -inf would all have one.
    fn vexp<I: Isa>(self) -> Self;
    /// `ln x` within 2 ulp; -inf at 0, NaN below.
    fn vln<I: Isa>(self) -> Self;
    /// `ln(1 + x)` for `x` in `[0, 1]` within 2 ulp, without the rounding of `1 + x` and without a division.
    fn vln_1p_unit<I: Isa>(self) -> Self;

    /// The larger of two, and `self` where `other` is NaN.
    #[inline(always)]
    fn max_or_self(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// `ln(1 + x)` for `x > -1`, with a relative error of a few ulp also next to 0.
    #[inline(always)]
    fn vln_1p<I: Isa>(self) -> Self {
        let w = Self::ONE + self;
        // what the rounding of 1 + x lost, to first order; not at w = 0 or inf, where ln(w) is exact
        let lost = (self - (w - Self::ONE)) / w;
        let lost = if lost.is_finite() { lost } else { Self::ZERO };
        w.vln::<I>() + lost
    }

    /// `tanh x` and `1 - tanh(x)^2`, both with a relative error of a few ulp.
    #[inline(always)]
    fn tanh_and_slope<I: Isa>(self) -> (Self, Self) {
        let magnitude = self.abs();
        let e = (Self::of(-2.0) * magnitude).vexp::<I>();
        let s = Self::ONE + e;
        // below 1/4, 1 - e cancels: the Taylor series of tanh(x)/x in x^2
        let x2 = self * self;
        let mut series = Self::of(TANH_SERIES[0]);
        for &c in &TANH_SERIES[1..] {
            series = series.fma::<I>(x2, Self::of(c));
        }
        let small = magnitude * series;
        let large = (Self::ONE - e) / s;
        let t = if magnitude < Self::of(0.25) { small } else { large };
        let t = if self < Self::ZERO { -t } else { t };
        // NaN has to stay NaN: the comparison above sends it to `large`, which is NaN
        (t, Self::of(4.0) * e / (s * s))
    }
}

/// Memory that a loop over something else asks for in advance: a pass that first looks for a maximum and then computes
/// would otherwise wait for the memory first and leave it idle then.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<T>(pub(crate) *const T);

impl<T> Ahead<T> {
    /// Asks for [`LANES`] elements from the `i`-th on; there may be none at that address.
    #[inline(always)]
    pub(crate) fn fetch(&self, i: usize) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for line in (0..LANES * size_of::<T>()).step_by(64) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = self.0.wrapping_add(i).cast::<i8>().wrapping_add(line);
            // SAFETY: a prefetch is a hint that accesses nothing a program can see, whatever the address; SSE is part
            // of x86_64
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = i;
    }
}

/// Accumulators of a vectorised reduction: two AVX-512 vectors of f32.
pub(crate) const LANES: usize = 32;

/// The sum of a slice whose length is a multiple of [`LANES`], in a fixed order.
#[inline(always)]
pub(crate) fn sum_of<A: Real>(xs: &[A]) -> A {
    let mut lanes = [A::ZERO; LANES];
    for chunk in xs.chunks_exact(LANES) {
        for (sum, &x) in lanes.iter_mut().zip(chunk) {
            *sum += x;
        }
    }
    sum_lanes(lanes)
}

/// A number for each lane, or one for all of them.
pub(crate) trait PerLane<A>: Copy {
    fn at(&self, lane: usize) -> A;
}

impl<A: Real> PerLane<A> for A {
    #[inline(always)]
    fn at(&self, _: usize) -> A {
        *self
    }
}

impl<A: Real> PerLane<A> for [A; LANES] {
    #[inline(always)]
    fn at(&self, lane: usize) -> A {
        self[lane]
    }
}

/// Raises each lane to the larger of two numbers.
#[inline(always)]
pub(crate) fn raise<A: Real>(lanes: &mut [A; LANES], xs: &[A; LANES]) {
    for (max, &x) in lanes.iter_mut().zip(xs) {
        *max = max.max_or_self(x);
    }
}

/// The largest of all lanes, NaN left out.
#[inline(always)]
pub(crate) fn max_lanes<A: Real>(lanes: [A; LANES]) -> A {
    fold_lanes(lanes, A::max_or_self)
}

/// The sum of all lanes.
#[inline(always)]
pub(crate) fn sum_lanes<A: Real>(lanes: [A; LANES]) -> A {
    fold_lanes(lanes, |a, b| a + b)
}

/// All lanes in a fixed order.
///
/// The steps in between are kept in memory: LLVM makes vectors of a step that ends in stores, but takes one that ends
/// in a single number apart into scalars, some hundred instructions of them.
#[inline(always)]
fn fold_lanes<A: Real>(lanes: [A; LANES], f: impl Fn(A, A) -> A) -> A {
    const HALF: usize = LANES / 2;
    const STEP: usize = HALF / 4;
    let half: [A; HALF] = black_box(std::array::from_fn(|i| f(lanes[i], lanes[i + HALF])));
    let four: [A; STEP] =
        black_box(std::array::from_fn(|i| f(f(half[i], half[i + STEP]), f(half[i + 2 * STEP], half[i + 3 * STEP]))));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

/// The last [`LANES`] elements of a slice, with `fill` for those that are in its whole [`LANES`] already or don't
/// exist.
#[inline(always)]
pub(crate) fn end_of<A: Copy>(xs: &[A], fill: A) -> [A; LANES] {
    let end = xs.len() % LANES;
    let Some(last) = xs.last_chunk::<LANES>() else {
        let mut padded = [fill; LANES];
        padded[LANES - end..].copy_from_slice(xs);
        return padded;
    };
    // a load and a mask that is one too: a comparison of each lane's number would become 32 branches
    static NEW: [u32; 2 * LANES] = {
        let mut new = [0; 2 * LANES];
        let mut i = LANES;
        while i < 2 * LANES {
            new[i] = 1;
            i += 1;
        }
        new
    };
    let (mut padded, new) = (*last, &NEW[end..end + LANES]);
    for (v, new) in padded.iter_mut().zip(new) {
        *v = if *new == 0 { fill } else { *v };
    }
    padded
}

/// All elements of a slice in vectors of [`LANES`]: the whole ones, then [`end_of`] if there are more.
#[inline(always)]
pub(crate) fn vectors<'x, A>(xs: &'x [A], end: &'x [A; LANES]) -> impl Iterator<Item = &'x [A; LANES]> {
    let count = xs.len() / LANES;
    (0..xs.len().div_ceil(LANES)).map(
        move |i| {
            if i < count { xs[i * LANES..].first_chunk().unwrap_or(end) } else { end }
        },
    )
}

/// `x <- cap tanh(scale x / cap)`, or `scale x` without a cap; `slope` gets the cap's derivative.
pub(crate) struct ScaleAndCap<'k, A> {
    pub scale: A,
    pub cap: Option<A>,
    pub xs: &'k mut [A],
    pub slope: Option<&'k mut [A]>,
}

impl<A: Real> Vectorized for ScaleAndCap<'_, A> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let ScaleAndCap { scale, cap, xs, slope } = self;
        if scale != A::ONE {
            for x in &mut *xs {
                *x *= scale;
            }
        }
        let Some(cap) = cap else { return };
        let inverse = A::ONE / cap;
        match slope {
            Some(slope) => {
                for (x, s) in xs.iter_mut().zip(slope) {
                    let (t, d) = (*x * inverse).tanh_and_slope::<I>();
                    (*x, *s) = (cap * t, d);
                }
            }
            None => {
                for x in xs {
                    *x = cap * (*x * inverse).tanh_and_slope::<I>().0;
                }
            }
        }
    }
}

/// Coefficients of tanh(x)/x in powers of x^2, the highest first: 2^(2n) (2^(2n) - 1) B_2n / (2n)!, enough for f64 at
/// 1/4.
const TANH_SERIES: [f64; 11] = [
    18_888_466_084.0 / 194_896_477_400_625.0,
    -443_861_162.0 / 1_856_156_927_625.0,
    6_404_582.0 / 10_854_718_875.0,
    -929_569.0 / 638_512_875.0,
    21_844.0 / 6_081_075.0,
    -1_382.0 / 155_925.0,
    62.0 / 2_835.0,
    -17.0 / 315.0,
    2.0 / 15.0,
    -1.0 / 3.0,
    1.0,
];

macro_rules! real_consts {
    ($t:ty) => {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
        const NAN: Self = <$t>::NAN;

        #[inline(always)]
        fn of(v: f64) -> Self {
            v as $t
        }
        #[inline(always)]
        fn abs(self) -> Self {
            <$t>::abs(self)
        }
        #[inline(always)]
        fn is_finite(self) -> bool {
            <$t>::is_finite(self)
        }
        #[inline(always)]
        fn is_nan(self) -> bool {
            <$t>::is_nan(self)
        }
        #[inline(always)]
        fn fma<I: Isa>(self, a: Self, b: Self) -> Self {
            if I::HAS_FMA { self.mul_add(a, b) } else { self * a + b }
        }
    };
}

impl Real for f32 {
    real_consts!(f32);

    #[inline(always)]
    fn vexp<I: Isa>(self) -> f32 {
        // there n is -127, for which the power of 2 below is 0; a comparison that keeps a NaN
        let x = if self < -88.0 { -88.0 } else { self };
        // x = n ln 2 + r, |r| <= ln(2)/2
        // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: n and the bias of its exponent
        const ROUND: f32 = 12_582_912.0 + 127.0;
        let t = x.fma::<I>(std::f32::consts::LOG2_E, ROUND);
        let n = t - ROUND;
        let r = n.fma::<I>(-0.693_359_4, x);
        let r = n.fma::<I>(2.121_944_4e-4, r);
        // the minimax polynomial of (e^r - 1 - r) / r^2 for the relative error of e^r, which is 3e-9
        let p = 1.381_461_3e-3_f32
            .fma::<I>(r, 8.368_71e-3)
            .fma::<I>(r, 4.166_839e-2)
            .fma::<I>(r, 1.666_652_1e-1)
            .fma::<I>(r, 0.499_999_94)
            .fma::<I>(r, 1.0)
            .fma::<I>(r, 1.0);
        p * f32::from_bits(t.to_bits() << 23)
    }

    #[inline(always)]
    fn vln<I: Isa>(self) -> f32 {
        let subnormal = self < f32::MIN_POSITIVE;
        let x = if subnormal { self * 33_554_432.0 } else { self }; // 2^25
        // x = 2^k m with m in [sqrt(1/2), sqrt(2))
        let bits = x.to_bits().wrapping_sub(0x3F35_04F3);
        let k = (bits as i32) >> 23;
        let m = f32::from_bits((bits & 0x007F_FFFF).wrapping_add(0x3F35_04F3));
        let k = k as f32 - if subnormal { 25.0 } else { 0.0 };
        let y = ln_mantissa_f32::<I>(m - 1.0, k);
        let y = if self > 0.0 { y } else { f32::NAN };
        let y = if self == 0.0 { f32::NEG_INFINITY } else { y };
        if self == f32::INFINITY { self } else { y }
    }

    #[inline(always)]
    fn vln_1p_unit<I: Isa>(self) -> f32 {
        let upper = self > std::f32::consts::SQRT_2 - 1.0;
        // 1 + x = 2 (1 + (x - 1) / 2) in the upper part: both forms of f are exact
        let f = if upper { (self - 1.0) * 0.5 } else { self };
        ln_mantissa_f32::<I>(f, if upper { 1.0 } else { 0.0 })
    }
}

/// `k ln 2 + ln(1 + f)` for `1 + f` in `[sqrt(1/2), sqrt(2)]`: Cephes' logf.
#[inline(always)]
fn ln_mantissa_f32<I: Isa>(f: f32, k: f32) -> f32 {
    let z = f * f;
    let p = 7.037_683_6e-2_f32
        .fma::<I>(f, -1.151_461e-1)
        .fma::<I>(f, 1.167_699_9e-1)
        .fma::<I>(f, -1.242_014_1e-1)
        .fma::<I>(f, 1.424_932_3e-1)
        .fma::<I>(f, -1.666_805_8e-1)
        .fma::<I>(f, 2.000_071_5e-1)
        .fma::<I>(f, -2.499_999_4e-1)
        .fma::<I>(f, 3.333_333e-1);
    let y = p * f * z;
    let y = k.fma::<I>(-2.121_944_4e-4, y);
    let y = z.fma::<I>(-0.5, y);
    k.fma::<I>(0.693_359_4, f + y)
}

impl Real for f64 {
    real_consts!(f64);

    #[inline(always)]
    fn vexp<I: Isa>(self) -> f64 {
        // as for f32
        let x = if self < -709.0 { -709.0 } else { self };
        const ROUND: f64 = 6_755_399_441_055_744.0 + 1023.0;
        let t = x.fma::<I>(std::f64::consts::LOG2_E, ROUND);
        let n = t - ROUND;
        let r = n.fma::<I>(-LN2_HI, x);
        let r = n.fma::<I>(-LN2_LO, r);
        // Taylor to r^13: the remainder at ln(2)/2 is 4e-18
        let mut p = 1.0 / 6_227_020_800.0;
        let mut inverse_factorial = [0.0; 11];
        let mut factorial = 2.0;
        let mut i = 0;
        while i < 11 {
            inverse_factorial[i] = 1.0 / factorial;
            factorial *= (i + 3) as f64;
            i += 1;
        }
        for c in inverse_factorial.into_iter().rev() {
            p = p.fma::<I>(r, c);
        }
        p.fma::<I>(r, 1.0).fma::<I>(r, 1.0) * f64::from_bits(t.to_bits() << 52)
    }

    #[inline(always)]
    fn vln<I: Isa>(self) -> f64 {
        let subnormal = self < f64::MIN_POSITIVE;
        let x = if subnormal { self * 18_014_398_509_481_984.0 } else { self }; // 2^54
        const SQRT_HALF: u64 = 0x3FE6_A09E_667F_3BCD;
        let bits = x.to_bits().wrapping_sub(SQRT_HALF);
        let k = (bits as i64) >> 52;
        let m = f64::from_bits((bits & 0x000F_FFFF_FFFF_FFFF).wrapping_add(SQRT_HALF));
        let k = k as f64 - if subnormal { 54.0 } else { 0.0 };
        let y = ln_mantissa_f64::<I>(m - 1.0, k);
        let y = if self > 0.0 { y } else { f64::NAN };
        let y = if self == 0.0 { f64::NEG_INFINITY } else { y };
        if self == f64::INFINITY { self } else { y }
    }

    #[inline(always)]
    fn vln_1p_unit<I: Isa>(self) -> f64 {
        let upper = self > std::f64::consts::SQRT_2 - 1.0;
        let f = if upper { (self - 1.0) * 0.5 } else { self };
        ln_mantissa_f64::<I>(f, if upper { 1.0 } else { 0.0 })
    }
}

const LN2_HI: f64 = 6.931_471_803_691_238e-1;
const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// `k ln 2 + ln(1 + f)` for `1 + f` in `[sqrt(1/2), sqrt(2)]`: FreeBSD's e_log.c.
#[inline(always)]
fn ln_mantissa_f64<I: Isa>(f: f64, k: f64) -> f64 {
    let s = f / (2.0 + f);
    let z = s * s;
    let r = 1.479_819_860_511_658_6e-1_f64
        .fma::<I>(z, 1.531_383_769_920_937_3e-1)
        .fma::<I>(z, 1.818_357_216_161_805e-1)
        .fma::<I>(z, 2.222_219_843_214_978_4e-1)
        .fma::<I>(z, 2.857_142_874_366_239e-1)
        .fma::<I>(z, 3.999_999_999_940_942e-1)
        .fma::<I>(z, 6.666_666_666_666_735e-1)
        * z;
    let half_square = 0.5 * f * f;
    k * LN2_HI - ((half_square - (s * (half_square + r) + k * LN2_LO)) - f)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Map<'a, F>(&'a [f32], F);
    trait Elementary {
        fn at<I: Isa>(&self, x: f32) -> f32;
    }
    impl<F: Elementary> Vectorized for Map<'_, F> {
        type Output = Vec<f32>;
        #[inline(always)]
        fn run<I: Isa>(self) -> Vec<f32> {
            self.0.iter().map(|&x| self.1.at::<I>(x)).collect()
        }
    }

    struct Exp;
    impl Elementary for Exp {
        #[inline(always)]
        fn at<I: Isa>(&self, x: f32) -> f32 {
            x.vexp::<I>()
        }
    }
    struct Ln;
    impl Elementary for Ln {
        #[inline(always)]
        fn at<I: Isa>(&self, x: f32) -> f32 {
            x.vln::<I>()
        }
    }
    struct Ln1pUnit;
    impl Elementary for Ln1pUnit {
        #[inline(always)]
        fn at<I: Isa>(&self, x: f32) -> f32 {
            x.vln_1p_unit::<I>()
        }
    }
    struct Ln1p;
    impl Elementary for Ln1p {
        #[inline(always)]
        fn at<I: Isa>(&self, x: f32) -> f32 {
            x.vln_1p::<I>()
        }
    }
    struct Tanh;
    impl Elementary for Tanh {
        #[inline(always)]
        fn at<I: Isa>(&self, x: f32) -> f32 {
            x.tanh_and_slope::<I>().0
        }
    }

    fn worst_ulp<F: Elementary>(inputs: &[f32], f: F, exact: impl Fn(f64) -> f64) -> f64 {
        let got = dispatch(Map(inputs, f));
        let mut worst = 0f64;
        for (&x, &y) in inputs.iter().zip(&got) {
            let want = exact(x as f64);
            if want.is_nan() || want.is_infinite() || (want as f32).is_infinite() {
                let same = (y as f64 == want) || (want.is_nan() && y.is_nan()) || (y == want as f32);
                assert!(same, "at {x}: got {y}, expected {want}");
                continue;
            }
            let near = (want as f32).abs();
            let ulp = (f32::from_bits(near.to_bits() + 1) - near) as f64;
            worst = worst.max((y as f64 - want).abs() / ulp);
        }
        worst
    }

    /// Every 997th float of a range of bit patterns.
    fn floats(from: f32, to: f32) -> Vec<f32> {
        let (a, b) = (from.to_bits(), to.to_bits());
        let (a, b) = (a.min(b), a.max(b));
        (a..=b).step_by(997).map(f32::from_bits).collect()
    }

    #[test]
    fn exp_is_within_one_ulp() {
        let mut inputs = floats(-0.0, -120.0);
        inputs.extend(floats(0.0, 88.0));
        inputs.extend([f32::NEG_INFINITY, f32::NAN, f32::from_bits(0xFFC0_1234)]);
        let (normal, tiny): (Vec<f32>, Vec<f32>) =
            inputs.into_iter().partition(|&x| (x as f64).exp() >= f32::MIN_POSITIVE as f64 || x.is_nan());
        let worst = worst_ulp(&normal, Exp, f64::exp);
        assert!(worst < 1.0, "{worst}");
        // not a normal number: that, or 0
        for (x, y) in tiny.iter().zip(dispatch(Map(&tiny, Exp))) {
            assert!((0.0..=f32::MIN_POSITIVE).contains(&y) && (y == 0.0 || *x > -87.7), "at {x}: {y}");
        }
    }

    #[test]
    fn ln_is_within_two_ulp() {
        let mut inputs = floats(0.0, f32::MAX);
        inputs.extend([f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -1.0, -0.0]);
        let worst = worst_ulp(&inputs, Ln, f64::ln);
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn ln_1p_is_within_three_ulp() {
        let worst = worst_ulp(&floats(0.0, 1.0), Ln1pUnit, f64::ln_1p);
        assert!(worst < 2.0, "{worst}");
        let mut inputs = floats(-0.0, -1.0);
        inputs.extend(floats(0.0, 1e6));
        let worst = worst_ulp(&inputs, Ln1p, f64::ln_1p);
        assert!(worst < 3.0, "{worst}");
    }

    #[test]
    fn tanh_is_within_three_ulp() {
        let mut inputs = floats(-0.0, -30.0);
        inputs.extend(floats(0.0, 30.0));
        let worst = worst_ulp(&inputs, Tanh, f64::tanh);
        assert!(worst < 3.0, "{worst}");
    }

    #[test]
    fn f64_functions_agree_with_libm() {
        struct All(Vec<f64>);
        impl Vectorized for All {
            type Output = Vec<[f64; 5]>;
            #[inline(always)]
            fn run<I: Isa>(self) -> Vec<[f64; 5]> {
                let at = |&x: &f64| {
                    let (t, slope) = x.tanh_and_slope::<I>();
                    [x.min(700.0).vexp::<I>(), x.abs().vln::<I>(), x.abs().vln_1p::<I>(), t, slope]
                };
                self.0.iter().map(at).collect()
            }
        }
        let inputs: Vec<f64> = (-4000..4000).map(|i| (i as f64) * (i as f64).abs() * 4.3e-5 + 1e-3).collect();
        for (x, got) in inputs.iter().zip(dispatch(All(inputs.clone()))) {
            let t = x.tanh();
            let want = [x.min(700.0).exp(), x.abs().ln(), x.abs().ln_1p(), t, (1.0 / x.cosh()).powi(2)];
            for (i, (g, w)) in got.into_iter().zip(want).enumerate() {
                // an exponential that is not a normal number is 0, and the slope of tanh has four times it
                let same = g == w || (g - w).abs() <= 2e-15 * w.abs() + 4.0 * f64::MIN_POSITIVE;
                assert!(same, "function {i} at {x}: got {g}, expected {w}");
            }
        }
    }
}
