//! The softmax family on the CPU.
//!
//! A pass over the logits either *reduces* each row to a few numbers or *emits* a value for each logit from them (the
//! gradient, the log-probabilities). Both come in two shapes, chosen by [`Division`](crate::rows::cpu::Division): rows
//! of many adjacent classes are worked through in blocks along the classes, several short rows at a time, everything
//! else (few classes, a class axis that is not innermost, strides) in tiles of a few rows, one row in each SIMD lane,
//! several tiles side by side where the next class of a row is in another page. A block and a tile are the same piece
//! of scratch memory, small enough for the first-level cache, and both merge their results into the rows' states by
//! [`States::absorb`](kernels::States).
//!
//! The sum of a row is kept without the term of its maximum, which is exp(0) = 1: `rest = sum exp(x - m) - 1`. Then
//! `log sum exp(x - m) = log1p(rest)` and `1 - p = rest / (1 + rest)` for the most probable class keep their relative
//! accuracy however small they are.

mod call;
mod engine;
mod kernels;
mod logits;
mod targets;
#[cfg(test)]
mod tests;
