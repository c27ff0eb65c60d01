//! Rows of classes in tensors of any layout.

#[cfg(feature = "cuda")]
use crate::cast::indices_as_i64;
use candle_core::{Error, Layout, Result, Shape, Tensor};
use std::ops::Range;

/// Where the logits of each row lie: `outer x inner` rows of `classes` logits.
///
/// Row `r` is position `(r / inner, r % inner)`, the order of a contiguous target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub outer: usize,
    pub inner: usize,
    pub classes: usize,
    pub offset: usize,
    pub outer_stride: usize,
    pub inner_stride: usize,
    pub class_stride: usize,
    /// How many of the axes other than the class axis make up `outer`.
    pub split: usize,
}

/// Some adjacent rows, counted from the first one asked for, that lie at a constant distance; where the first of them
/// is read and written.
pub(crate) struct Run {
    pub rows: Range<usize>,
    pub read: usize,
    pub written: usize,
}

impl Rows {
    /// The rows along `axis`, or `None` where the other axes don't merge into two strides.
    pub fn of(layout: &Layout, axis: usize) -> Option<Self> {
        let natural = Self::with_split(layout, axis, axis);
        if natural.is_some() || layout.stride()[axis] != 1 {
            return natural;
        }
        // rows of adjacent classes may be grouped anywhere
        (0..layout.dims().len()).find_map(|split| Self::with_split(layout, axis, split))
    }

    /// The rows along `axis` with the first `split` of the other axes merged into `outer` and the rest into `inner`.
    pub fn with_split(layout: &Layout, axis: usize, split: usize) -> Option<Self> {
        let mut axes: Vec<_> = layout.dims().iter().copied().zip(layout.stride().iter().copied()).collect();
        let (classes, class_stride) = axes.remove(axis);
        let (outer, outer_stride) = merge(&axes[..split])?;
        let (inner, inner_stride) = merge(&axes[split..])?;
        // the stride of an axis with one position means nothing
        let class_stride = if classes == 1 { 1 } else { class_stride };
        Some(Rows {
            outer,
            inner,
            classes,
            offset: layout.start_offset(),
            outer_stride,
            inner_stride,
            class_stride,
            split,
        })
    }

    pub fn count(&self) -> usize {
        self.outer * self.inner
    }

    /// Whether a row's classes are next to each other. The gradient is then written in the order (outer, inner, class),
    /// otherwise in the order (outer, class, inner).
    pub fn class_last(&self) -> bool {
        self.inner == 1 || self.class_stride == 1
    }

    /// The storage index of a row's class 0.
    pub fn start(&self, row: usize) -> usize {
        match self.inner {
            // the usual case, without a division
            1 => self.offset + row * self.outer_stride,
            inner => self.offset + row / inner * self.outer_stride + row % inner * self.inner_stride,
        }
    }

    /// Where a row's class 0 is written, and how far apart its classes are.
    pub fn written_start(&self, row: usize) -> usize {
        match self.class_last() {
            true => row * self.classes,
            false => row / self.inner * self.classes * self.inner + row % self.inner,
        }
    }

    pub fn written_stride(&self) -> usize {
        if self.class_last() { 1 } else { self.inner }
    }

    /// How far apart the rows of a [`Run`] are read, and how far apart they are written.
    pub fn steps(&self) -> (usize, usize) {
        let read = if self.inner == 1 { self.outer_stride } else { self.inner_stride };
        (read, if self.class_last() { self.classes } else { 1 })
    }

    /// Adjacent rows in as few runs as possible: a division for each run, instead of for each row.
    pub fn runs(&self, rows: Range<usize>) -> impl Iterator<Item = Run> + use<> {
        let of = *self;
        let length = if of.inner == 1 { of.outer } else { of.inner };
        let mut row = rows.start;
        std::iter::from_fn(move || {
            let start = row;
            if start >= rows.end {
                return None;
            }
            row = rows.end.min(start + length - start % length);
            let lanes = start - rows.start..row - rows.start;
            Some(Run { rows: lanes, read: of.start(start), written: of.written_start(start) })
        })
    }

    /// Sizes and strides in the order (outer, inner, class) or (outer, class, inner).
    pub fn axes(&self, class_last: bool) -> [(usize, usize); 3] {
        let outer = (self.outer, self.outer_stride);
        let inner = (self.inner, self.inner_stride);
        let class = (self.classes, self.class_stride);
        if class_last { [outer, inner, class] } else { [outer, class, inner] }
    }
}

/// Where the numbers of rows lie that have one each: that of row `r` at `(r / inner, r % inner)`, where `inner` fits
/// into 32 bits, as does r unless `inner` is 1. `RowPlaces` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RowPlaces {
    outer_stride: i64,
    inner_stride: i64,
    inner: u32,
}

impl RowPlaces {
    /// Of a tensor of the rows' shape, or `None` where its axes don't merge into two.
    pub fn of(layout: &Layout) -> Option<Self> {
        let axes: Vec<_> = layout.dims().iter().copied().zip(layout.stride().iter().copied()).collect();
        let few = layout.shape().elem_count() <= u32::MAX as usize;
        // as much outside as possible: of a contiguous tensor everything
        (0..=axes.len()).rev().find_map(|split| {
            let (_, outer_stride) = merge(&axes[..split])?;
            let (inner, inner_stride) = merge(&axes[split..])?;
            let inner = u32::try_from(inner).ok().filter(|&inner| inner == 1 || few)?;
            Some(RowPlaces { outer_stride: outer_stride as i64, inner_stride: inner_stride as i64, inner })
        })
    }
}

/// The shape of the rows along `axis`: the tensor's without it.
pub(crate) fn row_shape(layout: &Layout, axis: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    dims.remove(axis);
    Shape::from(dims)
}

/// One size and stride for several axes, if they have one.
fn merge(axes: &[(usize, usize)]) -> Option<(usize, usize)> {
    let mut merged = (1, 0);
    for &(size, stride) in axes.iter().filter(|(size, _)| *size != 1) {
        merged = match merged {
            (1, _) => (size, stride),
            (n, outer) if outer == size * stride => (n * size, stride),
            _ => return None,
        };
    }
    Some(merged)
}

/// The tensor itself where [`Rows::of`] describes it, else a contiguous copy.
pub(crate) fn as_rows(tensor: &Tensor, axis: usize) -> Result<Tensor> {
    // one logit broadcast to all classes is not worth a way of its own in a kernel
    let broadcast = tensor.stride()[axis] == 0 && tensor.dims()[axis] > 1;
    match Rows::of(tensor.layout(), axis) {
        Some(_) if !broadcast => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    }
}

/// A second tensor of the logits' shape, grouped into rows as they are; a contiguous copy where its strides don't
/// merge.
pub(crate) fn as_rows_like(tensor: &Tensor, axis: usize, split: usize) -> Result<Tensor> {
    match Rows::with_split(tensor.layout(), axis, split) {
        Some(_) => Ok(tensor.clone()),
        None => tensor.contiguous(),
    }
}

/// Class indices one after the other.
pub(crate) fn contiguous_indices(target: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if target.device().is_cuda() && !target.is_contiguous() {
        return indices_as_i64(target);
    }
    target.contiguous()
}

/// The rows of a tensor that went through [`as_rows`].
pub(crate) fn rows_of(name: &str, layout: &Layout, axis: usize) -> Result<Rows> {
    let rows = Rows::of(layout, axis);
    rows.ok_or_else(|| {
        Error::msg(format!(
            "{name}: strides {:?} of shape {:?} do not merge around axis {axis}",
            layout.stride(),
            layout.dims()
        ))
    })
}

/// The rows of a tensor that went through [`as_rows_like`].
pub(crate) fn rows_like(name: &str, layout: &Layout, axis: usize, like: &Rows) -> Result<Rows> {
    let rows = Rows::with_split(layout, axis, like.split);
    rows.ok_or_else(|| {
        Error::msg(format!(
            "{name}: strides {:?} of shape {:?} do not merge as the logits' do",
            layout.stride(),
            layout.dims()
        ))
    })
}

/// The shape in which a kernel writes a gradient of `shape`: with the class axis last if the rows are `class_last`.
pub(crate) fn written_shape(shape: &Shape, axis: usize, rows: &Rows) -> Shape {
    let mut dims = shape.dims().to_vec();
    if rows.class_last() {
        let classes = dims.remove(axis);
        dims.push(classes);
    }
    Shape::from(dims)
}

/// The inverse of [`written_shape`]: a view with the logits' shape.
pub(crate) fn view_as_logits(written: Tensor, axis: usize, class_last: bool) -> Result<Tensor> {
    let last = written.rank() - 1;
    if !class_last || axis == last {
        return Ok(written);
    }
    let mut order: Vec<usize> = (0..last).collect();
    order.insert(axis, last);
    written.permute(order)
}
