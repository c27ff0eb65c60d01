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

    /// Whether no two elements share a place.
    pub fn is_distinct(&self) -> bool {
        let mut axes = [(self.rows, self.row_stride), (self.columns, self.column_stride)];
        axes.sort_by_key(|&(_, stride)| stride);
        // from the shortest stride on, each leads out of what lies within it
        let mut within = 0;
        axes.into_iter().filter(|&(size, _)| size > 1).all(|(size, stride)| {
            let leads_out = stride > within;
            within += (size - 1) * stride;
            leads_out
        })
    }

    /// From the first element to behind the last.
    pub fn range(&self) -> std::ops::Range<usize> {
        if self.rows == 0 || self.columns == 0 {
            return self.start..self.start;
        }
        self.start..self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_overlap() {
        let place = |rows, columns, row_stride, column_stride| MatrixPlace {
            start: 7,
            rows,
            columns,
            row_stride,
            column_stride,
        };
        for distinct in [place(3, 4, 4, 1), place(3, 4, 1, 3), place(3, 4, 9, 2), place(1, 4, 0, 1), place(3, 1, 1, 0)]
        {
            assert!(distinct.is_distinct());
        }
        for shared in [place(3, 4, 0, 1), place(3, 4, 3, 1), place(3, 4, 1, 2), place(3, 4, 1, 1), place(1, 4, 1, 0)] {
            assert!(!shared.is_distinct());
        }
    }
}
