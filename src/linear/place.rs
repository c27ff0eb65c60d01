//! Where the matrices of a product lie.

use candle_core::{Layout, Result, bail};

/// What errors of a product call it.
pub(crate) const NAME: &str = "matrix product";

/// Where a matrix begins, and the strides of its rows and columns.
#[derive(Clone, Copy)]
pub(crate) struct MatrixPlace {
    pub start: usize,
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl MatrixPlace {
    pub fn of(layout: &Layout) -> Result<Self> {
        let ((rows, columns), &[row_stride, column_stride]) = (layout.shape().dims2()?, layout.stride()) else {
            bail!("{NAME}: strides {:?} of shape {:?}", layout.stride(), layout.dims())
        };
        Ok(MatrixPlace { start: layout.start_offset(), rows, columns, row_stride, column_stride })
    }

    /// From the first element to behind the last.
    pub fn range(&self) -> std::ops::Range<usize> {
        if self.rows == 0 || self.columns == 0 {
            return self.start..self.start;
        }
        self.start..self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}
