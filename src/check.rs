//! Checks of shapes, dtypes and devices, and the error messages that several places have in common.
//!
//! What passes the families' checks becomes a problem that their ops take; nothing further down fails for a reason that
//! could have been seen there. Only the values of targets and probabilities are checked later, by the kernels that read
//! them anyway.

use candle_core::{DType, Error, Layout, Result, Tensor, bail};

/// The dtype of the arithmetic, the sums and the returned loss for an input of `dtype`, which the kernels take.
pub(crate) fn arithmetic(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// As [`arithmetic`], of an input that has to be one of the kernels' dtypes.
pub(crate) fn arithmetic_dtype(name: &str, what: &str, tensor: &Tensor) -> Result<DType> {
    match tensor.dtype() {
        dtype if is_float(dtype) => Ok(arithmetic(dtype)),
        other => Err(not_float(name, what, other)),
    }
}

pub(crate) fn not_float(name: &str, what: &str, dtype: DType) -> Error {
    Error::Msg(format!("{name}: {what} of dtype {dtype:?}, expected f16, bf16, f32 or f64")).bt()
}

/// Of logits that a gradient is to replace.
pub(crate) fn not_contiguous(name: &str, layout: &Layout) -> Error {
    let (dims, strides) = (layout.dims(), layout.stride());
    Error::Msg(format!(
        "{name}: logits of shape {dims:?} with strides {strides:?}, expected contiguous ones to replace in place"
    ))
    .bt()
}

/// The dtypes of [`is_index`] in words.
const INDEX_DTYPES: &str = "u8, u32, i16, i32 or i64";

pub(crate) fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::U32 | DType::I16 | DType::I32 | DType::I64)
}

pub(crate) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

pub(crate) fn is_number(dtype: DType) -> bool {
    is_float(dtype) || is_index(dtype)
}

/// An operand that may be of any dtype that the kernels read.
pub(crate) fn number(name: &str, what: &str, dtype: DType) -> Result<()> {
    if is_number(dtype) {
        return Ok(());
    }
    bail!("{name}: {what} of dtype {dtype:?}, expected f16, bf16, f32, f64, {INDEX_DTYPES}")
}

pub(crate) fn same_device(name: &str, what: &str, tensor: &Tensor, input: &Tensor) -> Result<()> {
    if tensor.device().same_device(input.device()) {
        return Ok(());
    }
    bail!(
        "{name}: {what} on {:?}, expected it on the input's device {:?}",
        tensor.device().location(),
        input.device().location()
    )
}

/// The class axis: what was asked for, negative from the end; or 1, or 0 where there is no batch.
pub(crate) fn class_axis(name: &str, input: &Tensor, asked: Option<isize>) -> Result<usize> {
    let (dims, rank) = (input.dims(), input.rank());
    let axis = match asked {
        _ if rank == 0 => bail!("{name}: a scalar input, expected shape (C), (N, C) or (N, C, d1, …, dk)"),
        None => 1.min(rank - 1),
        Some(asked) => {
            let from_front = if asked < 0 { asked.checked_add_unsigned(rank) } else { Some(asked) };
            match from_front.and_then(|axis| usize::try_from(axis).ok()) {
                Some(axis) if axis < rank => axis,
                _ => bail!("{name}: class axis {asked} of an input of shape {dims:?}, expected one in -{rank}..{rank}"),
            }
        }
    };
    match dims[axis] {
        0 => bail!("{name}: no classes in an input of shape {dims:?}, expected at least one"),
        _ => Ok(axis),
    }
}

/// Of a target whose shape is neither the rows' nor, where that is `expected` too, the logits'.
pub(crate) fn not_of_rows(name: &str, target: &Tensor, logits: &Tensor, axis: usize, expected: &str) -> Error {
    let (dims, of) = (target.dims(), logits.dims());
    let without = |axis: usize| [&of[..axis], &of[axis + 1..]].concat();
    let other = (0..of.len()).find(|&other| other != axis && dims == without(other));
    let remedy = match other {
        Some(other) => format!("; if axis {other} of the logits has the classes, say with_class_axis({other})"),
        None => String::new(),
    };
    let rows = without(axis);
    Error::Msg(format!(
        "{name}: target of shape {dims:?} for logits of shape {of:?}, expected class indices of shape \
         {rows:?}{expected}{remedy}"
    ))
    .bt()
}

pub(crate) fn finite(name: &str, option: &str, value: f64) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    bail!("{name}: {option} {value}, expected a finite number")
}

pub(crate) fn in_unit_interval(name: &str, option: &str, value: f64) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    bail!("{name}: {option} {value}, expected a number in [0, 1]")
}

/// A tensor of weights as the kernels read it: detached, in the arithmetic dtype.
pub(crate) fn weights(name: &str, what: &str, weight: &Tensor, input: &Tensor, arithmetic: DType) -> Result<Tensor> {
    if !is_float(weight.dtype()) {
        bail!("{name}: {what} of dtype {:?}, expected f16, bf16, f32 or f64", weight.dtype());
    }
    same_device(name, what, weight, input)?;
    weight.detach().to_dtype(arithmetic)
}

pub(crate) fn class_weights(
    name: &str,
    weight: &Option<Tensor>,
    classes: usize,
    input: &Tensor,
    arithmetic: DType,
) -> Result<Option<Tensor>> {
    let Some(weight) = weight else { return Ok(None) };
    if weight.dims() != [classes] {
        bail!("{name}: class weights of shape {:?}, expected ({classes}), one for each class", weight.dims());
    }
    weights(name, "class weights", weight, input, arithmetic)?.contiguous().map(Some)
}

/// A view of an operand with the input's shape.
pub(crate) fn broadcast(name: &str, what: &str, tensor: Tensor, input: &Tensor) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    match tensor.broadcast_as(input.shape()) {
        Ok(view) => Ok(view),
        Err(_) => bail!(
            "{name}: {what} of shape {dims:?}, expected a shape that broadcasts to the input's {:?}",
            input.dims()
        ),
    }
}

pub(crate) fn broadcast_weights(
    name: &str,
    what: &str,
    weight: &Option<Tensor>,
    input: &Tensor,
    arithmetic: DType,
) -> Result<Option<Tensor>> {
    let Some(weight) = weight else { return Ok(None) };
    broadcast(name, what, weights(name, what, weight, input, arithmetic)?, input).map(Some)
}

/// Class indices have to be of one of the index dtypes.
pub(crate) fn class_indices(name: &str, target: &Tensor) -> Result<()> {
    if is_index(target.dtype()) { Ok(()) } else { Err(not_class_indices(name, target.dtype())) }
}

pub(crate) fn not_class_indices(name: &str, dtype: DType) -> Error {
    Error::Msg(format!("{name}: class indices of dtype {dtype:?}, expected {INDEX_DTYPES}")).bt()
}

/// Of class indices that a problem was not checked with.
pub(crate) fn wrong_count(name: &str, indices: usize, rows: usize) -> Error {
    Error::Msg(format!("{name}: {indices} class indices, expected one for each of {rows} rows")).bt()
}

/// An `Err` for the first class that is neither in its range nor the ignore index; `dtype` is that of the target.
pub(crate) fn class_range(
    name: &str,
    indices: impl IntoIterator<Item = i64>,
    dtype: DType,
    classes: usize,
    ignore_index: i64,
) -> Result<()> {
    let bad = |class: i64| class != ignore_index && !(0..classes as i64).contains(&class);
    let Some((row, class)) = indices.into_iter().enumerate().find(|&(_, class)| bad(class)) else { return Ok(()) };
    // a negative number that lost its sign
    let signed = match dtype {
        DType::U8 => class as u8 as i8 as i64,
        DType::U32 => class as u32 as i32 as i64,
        _ => class,
    };
    let remedy = match signed != class {
        true => format!("; if it was {signed} ahead of a cast to {dtype:?}, keep the indices signed"),
        false => String::new(),
    };
    bail!(
        "{name}: target {class} at row {row} is out of range, expected a class in 0..{classes} or the \
         ignore_index {ignore_index}{remedy}"
    )
}

/// Of an operand whose values are in [0, 1]. `what` is "target" or "probability"; the value is exactly what a tensor of
/// `dtype` holds.
pub(crate) fn not_in_unit_interval(name: &str, what: &str, value: f64, dtype: DType, element: usize) -> Error {
    let (value, expected) = match dtype {
        DType::F64 => (value.to_string(), "a number in [0, 1]"),
        // in the digits of its own dtype
        dtype if is_float(dtype) => ((value as f32).to_string(), "a number in [0, 1]"),
        _ => (
            value.to_string(),
            "0 or 1: `target.ne(0)?` of an image mask of 0 and 255, `target.gt(0)?` of labels -1 and 1",
        ),
    };
    Error::Msg(format!("{name}: {what} {value} at element {element}, expected {expected}")).bt()
}
