//! How the kernels divide an index without dividing.

/// A divisor of indices, and the multiplication that replaces the division: `Divisor` of
/// `kernels/elementwise/elements.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Divisor {
    value: i64,
    wide_magic: u64,
    magic: u32,
    shift: u32,
}

impl Divisor {
    /// `n / value = (mulhi(n, magic) + n) >> shift` in b bits for a dividend n below 2^(b-1), with
    /// `magic = 2^b (2^shift - value) / value + 1` and `2^shift` the power of two from `value` on (Granlund and
    /// Montgomery, 1994). A divisor from 2^31 on is not needed in 32 bits.
    pub fn new(value: usize) -> Self {
        let value = value.max(1) as u64;
        let shift = value.next_power_of_two().trailing_zeros();
        let magic = |bits: u32| (((1u128 << shift) - value as u128) << bits) / value as u128 + 1;
        Divisor { value: value as i64, wide_magic: magic(64) as u64, magic: magic(32) as u32, shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplication_replaces_division() {
        let values = [1, 2, 3, 5, 7, 10, 64, 1000, 32000, 50257, (1 << 30) - 1, 1 << 30, (1 << 31) - 1];
        for value in values {
            let d = Divisor::new(value);
            let near = values.iter().flat_map(|&v| [v - 1, v, v + 1]);
            for n in (0..2000).chain(near).chain((0..1 << 31).step_by(99_991)).filter(|&n| n < 1 << 31) {
                let mulhi = ((n as u64 * d.magic as u64) >> 32) as u32;
                // the kernel's sum is 32-bit
                let quotient = mulhi.checked_add(n as u32).map(|s| s >> d.shift);
                assert_eq!(quotient, Some((n / value) as u32), "{n} / {value}");
            }
            let wide = values.iter().map(|&v| v as u64 * 0x7FFF_FFFF).chain([0, 1, 1 << 40, (1 << 63) - 1]);
            for n in wide
                .flat_map(|v| [v, v / value as u64 * value as u64, (v / value as u64 * value as u64).saturating_sub(1)])
            {
                let mulhi = ((n as u128 * d.wide_magic as u128) >> 64) as u64;
                let quotient = mulhi.checked_add(n).map(|s| s >> d.shift);
                assert_eq!(quotient, Some(n / value as u64), "{n} / {value}");
            }
        }
    }
}
