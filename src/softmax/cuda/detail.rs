//! The choice of a kernel: its module, by how much it has to know of the classes, and its name.
//! `kernels/softmax/entry.cuh` has the same names.

use super::plan::{Form, RowsShape};
use crate::cuda::gpu::Module;
use crate::cuda::kernels;
use crate::rows::layout::Rows;
use crate::softmax::problem::SoftmaxOptions;
use candle_core::{DType, Result, bail};

/// Which of a dtype's kernels: how much they know of the classes beside their logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detail {
    /// Class indices and class weights alone.
    Plain,
    /// Class indices with z-loss, a row transform, a positive scale, a soft cap and, unless there are class weights,
    /// label smoothing.
    Uniform,
    /// All other options, and all of them for `f64`.
    General,
}

/// The largest soft cap of 16-bit logits for the uniform kernels. Their fast tanh has an absolute error, which makes an
/// exponential wrong by a factor of up to `1 + cap * 2^-22`: at this cap 1.5e-5. A larger cap takes the general
/// kernels, whose tanh has a relative error, so that a cap far above the logits changes nothing.
const FAST_SOFTCAP: f64 = 64.0;

impl Detail {
    /// The least that serves the options.
    pub fn of(options: &SoftmaxOptions, dtype: DType, class_indices: bool) -> Self {
        let too_large = |cap: f64| cap > FAST_SOFTCAP && dtype != DType::F32;
        if !class_indices || dtype == DType::F64 || options.softcap.is_some_and(too_large) {
            return Detail::General;
        }
        let scaled = options.logit_scale != 1.0 || options.softcap.is_some();
        if options.label_smoothing == 0.0 && options.z_loss == 0.0 && !scaled && options.row_transform.is_none() {
            return Detail::Plain;
        }
        // class weights give each smoothed class its own q, and a scale below 0 makes the lowest logit the largest
        let uniform = (options.label_smoothing == 0.0 || options.rows.weight.is_none()) && options.logit_scale > 0.0;
        if uniform { Detail::Uniform } else { Detail::General }
    }

    /// The module of the kernels and, for `Plain`, of log-softmax.
    pub fn module(self, dtype: DType) -> Result<&'static Module> {
        Ok(match (self, dtype) {
            (Detail::Plain, DType::F16) => &kernels::SOFTMAX_PLAIN_F16,
            (Detail::Plain, DType::BF16) => &kernels::SOFTMAX_PLAIN_BF16,
            (Detail::Plain, DType::F32) => &kernels::SOFTMAX_PLAIN_F32,
            (Detail::Plain, DType::F64) => &kernels::SOFTMAX_PLAIN_F64,
            (Detail::Uniform, DType::F16) => &kernels::SOFTMAX_UNIFORM_F16,
            (Detail::Uniform, DType::BF16) => &kernels::SOFTMAX_UNIFORM_BF16,
            (Detail::Uniform, DType::F32) => &kernels::SOFTMAX_UNIFORM_F32,
            (Detail::General, DType::F16) => &kernels::SOFTMAX_GENERAL_F16,
            (Detail::General, DType::BF16) => &kernels::SOFTMAX_GENERAL_BF16,
            (Detail::General, DType::F32) => &kernels::SOFTMAX_GENERAL_F32,
            (Detail::General, DType::F64) => &kernels::SOFTMAX_GENERAL_F64,
            (detail, other) => bail!("there are no {detail:?} softmax kernels for dtype {other:?}"),
        })
    }

    /// The uniform kernels serve plain class indices too: there are plain ones only for passes that these would slow
    /// down.
    pub fn unless_served(self, by_uniform: bool) -> Self {
        if self == Detail::Plain && by_uniform { Detail::Uniform } else { self }
    }

    /// The kernel of a pass.
    pub fn kernel(self, dtype: DType, pass: SoftmaxPass, form: Form) -> Result<KernelRef> {
        let found = KERNELS.iter().find(|kernel| (kernel.0, kernel.1, kernel.2) == (pass, self, form));
        let Some(&(.., name)) = found else { bail!("there is no softmax kernel for {pass:?}, {self:?}, {form:?}") };
        Ok(KernelRef { module: self.module(dtype)?, name })
    }

    pub fn shape(self, rows: &Rows, dtype: DType) -> RowsShape {
        let per_word = 16 / dtype.size_in_bytes();
        // how much farther apart two rows are read than written
        let beyond = |stride: usize, written: usize| stride.abs_diff(written) % per_word;
        let alike = rows.offset.is_multiple_of(per_word)
            && (rows.inner == 1 || beyond(rows.inner_stride, rows.classes) == 0)
            && (rows.outer == 1 || beyond(rows.outer_stride, rows.inner * rows.classes) == 0);
        let even = rows.inner == 1 || rows.outer == 1 || rows.outer_stride == rows.inner * rows.inner_stride;
        RowsShape {
            even,
            alike,
            light: self != Detail::General && dtype != DType::F64,
            rows: rows.count() as u64,
            classes: rows.classes as u64,
            element: dtype.size_in_bytes() as u64,
            adjacent: rows.class_stride == 1,
            packed: rows.class_stride == 1
                && (rows.inner == 1
                    || (rows.inner_stride == rows.classes && rows.outer_stride == rows.inner * rows.classes))
                && (rows.inner > 1 || rows.outer_stride == rows.classes || rows.outer == 1),
        }
    }
}

/// A kernel by its module and its name.
#[derive(Clone, Copy)]
pub(super) struct KernelRef {
    pub module: &'static Module,
    pub name: &'static str,
}

/// The passes that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SoftmaxPass {
    Reduce,
    Merge,
    Emit,
    Fused,
    TargetGradient,
    Statistics,
    LogSoftmax,
    LogSoftmaxBackward,
}

/// All kernels. Passes with one kernel for all forms have the form of its loop.
pub(super) const KERNELS: [(SoftmaxPass, Detail, Form, &str); 44] = {
    use Detail::{General, Plain, Uniform};
    use Form::{Registers, Rows, Strided, Tile};
    use SoftmaxPass::{Emit, Fused, LogSoftmax, LogSoftmaxBackward, Merge, Reduce, Statistics, TargetGradient};
    [
        (Reduce, Plain, Rows, "softmax_reduce_plain_rows"),
        (Reduce, Plain, Tile, "softmax_reduce_plain_tile"),
        (Reduce, Plain, Registers(4), "softmax_reduce_plain_registers_4"),
        (Reduce, Plain, Registers(8), "softmax_reduce_plain_registers_8"),
        (Reduce, Plain, Registers(16), "softmax_reduce_plain_registers_16"),
        (Reduce, Uniform, Rows, "softmax_reduce_uniform_rows"),
        (Reduce, Uniform, Strided, "softmax_reduce_uniform_strided"),
        (Reduce, Uniform, Tile, "softmax_reduce_uniform_tile"),
        (Reduce, Uniform, Registers(4), "softmax_reduce_uniform_registers_4"),
        (Reduce, Uniform, Registers(8), "softmax_reduce_uniform_registers_8"),
        (Reduce, Uniform, Registers(16), "softmax_reduce_uniform_registers_16"),
        (Reduce, General, Rows, "softmax_reduce_general_rows"),
        (Reduce, General, Strided, "softmax_reduce_general_strided"),
        (Merge, Uniform, Rows, "softmax_merge_uniform"),
        (Merge, General, Rows, "softmax_merge_general"),
        (Emit, Uniform, Rows, "softmax_emit_uniform_rows"),
        (Emit, Uniform, Strided, "softmax_emit_uniform_strided"),
        (Emit, Uniform, Tile, "softmax_emit_uniform_tile"),
        (Emit, General, Rows, "softmax_emit_general_rows"),
        (Emit, General, Strided, "softmax_emit_general_strided"),
        (Fused, Plain, Rows, "softmax_fused_plain_rows"),
        (Fused, Plain, Tile, "softmax_fused_plain_tile"),
        (Fused, Plain, Registers(4), "softmax_fused_plain_registers_4"),
        (Fused, Plain, Registers(8), "softmax_fused_plain_registers_8"),
        (Fused, Plain, Registers(16), "softmax_fused_plain_registers_16"),
        (Fused, Uniform, Rows, "softmax_fused_uniform_rows"),
        (Fused, Uniform, Strided, "softmax_fused_uniform_strided"),
        (Fused, Uniform, Tile, "softmax_fused_uniform_tile"),
        (Fused, Uniform, Registers(4), "softmax_fused_uniform_registers_4"),
        (Fused, Uniform, Registers(8), "softmax_fused_uniform_registers_8"),
        (Fused, Uniform, Registers(16), "softmax_fused_uniform_registers_16"),
        (Fused, General, Rows, "softmax_fused_general_rows"),
        (Fused, General, Strided, "softmax_fused_general_strided"),
        (TargetGradient, General, Strided, "softmax_target_gradient"),
        (Statistics, General, Rows, "softmax_statistics_rows"),
        (Statistics, General, Strided, "softmax_statistics_strided"),
        (LogSoftmax, Plain, Rows, "softmax_log_softmax_rows"),
        (LogSoftmax, Plain, Tile, "softmax_log_softmax_tile"),
        (LogSoftmax, Plain, Strided, "softmax_log_softmax_strided"),
        (LogSoftmax, Plain, Registers(4), "softmax_log_softmax_registers_4"),
        (LogSoftmax, Plain, Registers(8), "softmax_log_softmax_registers_8"),
        (LogSoftmax, Plain, Registers(16), "softmax_log_softmax_registers_16"),
        (LogSoftmaxBackward, Plain, Rows, "softmax_log_softmax_backward_rows"),
        (LogSoftmaxBackward, Plain, Strided, "softmax_log_softmax_backward_any"),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    /// A soft cap goes to the uniform kernels unless it is too large for the fast tanh of 16-bit logits.
    #[test]
    fn soft_caps_are_uniform_where_that_is_accurate() {
        let detail = |softcap, dtype, logit_scale, class_indices| {
            let options = SoftmaxOptions { softcap: Some(softcap), logit_scale, ..SoftmaxOptions::default() };
            Detail::of(&options, dtype, class_indices)
        };
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            for softcap in [0.5, 30.0, FAST_SOFTCAP] {
                assert_eq!(detail(softcap, dtype, 0.5, true), Detail::Uniform);
            }
            let large = if dtype == DType::F32 { Detail::Uniform } else { Detail::General };
            assert_eq!(detail(1e4, dtype, 1.0, true), large);
            for (scale, class_indices) in [(-1.0, true), (0.0, true), (1.0, false)] {
                assert_eq!(detail(30.0, dtype, scale, class_indices), Detail::General);
            }
        }
        assert_eq!(detail(30.0, DType::F64, 1.0, true), Detail::General);
    }
}
