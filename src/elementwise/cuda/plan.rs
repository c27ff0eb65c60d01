//! Launch plans of the element-wise family: which variant of a kernel runs, how its operands are walked, and how the
//! elements are cut into spans (`kernels/elementwise/elements.cuh`). Pure functions; `params.rs` passes the results to
//! the kernels.

use crate::cuda::grid::Grid;

/// Threads of a block: `MAX_THREADS` of the kernels.
const THREADS: u64 = 256;
/// Axes of a view after merging: `MAX_AXES` of the kernels.
pub(crate) const MAX_AXES: usize = 8;
/// The operands, in this order: input, target, weight, positive weight, mask. `OPERANDS` of the kernels.
pub(crate) const OPERANDS: usize = 5;
/// Spans of a pass that sums, at most about: enough to fill any device several times over, few enough for one block to
/// add their sums.
const SPANS: u64 = 4096;
/// Up to here each block of a gradient that needs it counts a mask's elements, from the second-level cache: less time
/// than a launch.
const ELEMENTS_COUNTED_BY_EACH_BLOCK: u64 = 1 << 16;
/// Up to this many rounds of a block's loop, one block is faster than many that meet at the end.
const ROUNDS_OF_ONE_BLOCK: u64 = 4;

/// Sizes and strides of an operand, in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OperandView<'a> {
    pub dims: &'a [usize],
    pub strides: &'a [usize],
}

impl OperandView<'_> {
    pub fn contiguous(&self) -> bool {
        let mut expected = 1;
        self.dims.iter().zip(self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }
}

/// How all strided operands of a launch are walked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OperandAxes {
    /// Bit i: operand i is contiguous or absent and has no strides here.
    pub contiguous: i32,
    pub axes: usize,
    pub size: [usize; MAX_AXES],
    pub stride: [[i64; MAX_AXES]; OPERANDS],
}

impl OperandAxes {
    /// The fewest axes that suffice for all operands, which have the same shape; `None` if those are too many.
    pub fn merge(operands: &[Option<OperandView>; OPERANDS]) -> Option<Self> {
        let mut merged = OperandAxes { contiguous: 0, axes: 0, size: Default::default(), stride: Default::default() };
        let mut strided = Vec::new();
        for (i, operand) in operands.iter().enumerate() {
            match operand {
                Some(view) if !view.contiguous() => strided.push((i, view)),
                _ => merged.contiguous |= 1 << i,
            }
        }
        let Some((_, first)) = strided.first() else { return Some(merged) };
        // (size, stride of each strided operand), outermost first
        let mut axes: Vec<(usize, Vec<usize>)> = Vec::new();
        for (axis, &size) in first.dims.iter().enumerate() {
            let strides: Vec<usize> = strided.iter().map(|(_, view)| view.strides[axis]).collect();
            match axes.last_mut() {
                _ if size == 1 => {}
                Some((outer, outer_strides)) if outer_strides.iter().zip(&strides).all(|(o, s)| *o == s * size) => {
                    *outer *= size;
                    *outer_strides = strides;
                }
                _ => axes.push((size, strides)),
            }
        }
        if axes.len() > MAX_AXES {
            return None;
        }
        merged.axes = axes.len();
        for (axis, (size, strides)) in axes.into_iter().enumerate() {
            merged.size[axis] = size;
            for ((operand, _), stride) in strided.iter().zip(strides) {
                merged.stride[*operand][axis] = stride as i64;
            }
        }
        Some(merged)
    }
}

/// The facts that the choice between the variants of a kernel depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alignment {
    /// Whether the term has dense kernels, input and target are contiguous and of the same dtype, and there is no other
    /// operand.
    pub plain: bool,
    pub input_address: u64,
    pub target_address: u64,
    /// Of an upstream gradient that has a value for each element.
    pub upstream_address: Option<u64>,
    pub element_bytes: u64,
    /// Whether something is written for each element: into memory that begins on 16 bytes.
    pub writes: bool,
}

/// A variant of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// 16 bytes at a time from where the input is aligned, `phase` elements before its first one.
    Dense { phase: i32 },
    /// Element by element.
    Any,
}

impl Variant {
    /// Doubles are taken one by one: their arithmetic takes longer than any way of loading them, and its code is long.
    pub fn choose(at: &Alignment) -> Self {
        let phase = at.input_address % 16 / at.element_bytes;
        let aligned_alike = at.input_address % 16 == at.target_address % 16;
        let outputs = !at.writes || phase == 0;
        let upstream = at.upstream_address.is_none_or(|address| address % 16 == 0 && phase == 0);
        if at.plain && at.element_bytes < 8 && aligned_alike && outputs && upstream {
            Variant::Dense { phase: phase as i32 }
        } else {
            Variant::Any
        }
    }

    /// Elements that a thread takes in a round of its loop.
    fn elements_per_round(self, element_bytes: u64) -> u64 {
        match self {
            Variant::Dense { .. } => 2 * 16 / element_bytes,
            Variant::Any => 4,
        }
    }
}

/// How the elements are cut, and the launch that takes the pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spans {
    pub span: u64,
    pub count: u64,
    pub grid: Grid,
}

impl Spans {
    fn blocks_of(span: u64, elements: u64) -> Self {
        let count = elements.div_ceil(span);
        Spans { span, count, grid: Grid::flat(count as u32, THREADS as u32) }
    }

    /// For a pass that writes something for each element and sums nothing: one round for each thread.
    pub fn each(elements: u64, variant: Variant, element_bytes: u64) -> Self {
        Self::blocks_of(THREADS * variant.elements_per_round(element_bytes), elements)
    }

    /// For a pass that sums: only the size and the variant decide, so that a sum has the same order on every device.
    pub fn sum(elements: u64, variant: Variant, element_bytes: u64) -> Self {
        let round = THREADS * variant.elements_per_round(element_bytes);
        if elements <= ROUNDS_OF_ONE_BLOCK * round {
            return Self::blocks_of(elements.max(1), elements);
        }
        let rounds = elements.div_ceil(round).div_ceil(SPANS);
        Self::blocks_of(rounds * round, elements)
    }

    /// For a pass that averages rows of `row` elements: short rows share a block, teams being warps or parts of one.
    pub fn rows(elements: u64, row: u64, variant: Variant, element_bytes: u64) -> Self {
        let rounds = row.div_ceil(variant.elements_per_round(element_bytes));
        let team = rounds.next_power_of_two().min(THREADS);
        let teams = THREADS / team;
        let count = elements / row;
        let grid = Grid {
            blocks: [count.div_ceil(teams) as u32, 1, 1],
            threads: [team as u32, teams as u32, 1],
            shared_bytes: 0,
            cluster: 1,
            overlaps: false,
        };
        Spans { span: row, count, grid }
    }

    /// Whether each block counts the elements that a mask leaves by itself, instead of a launch ahead of them.
    pub fn count_themselves(&self, elements: u64) -> bool {
        self.count == 1 || elements <= ELEMENTS_COUNTED_BY_EACH_BLOCK
    }

    /// For counting a mask's elements before a pass that needs the number: every block of that pass adds all counts
    /// again.
    pub fn count(elements: u64) -> Self {
        let round = THREADS * 4;
        let rounds = elements.div_ceil(round).div_ceil(THREADS).max(1);
        Self::blocks_of(rounds * round, elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view<'a>(dims: &'a [usize], strides: &'a [usize]) -> Option<OperandView<'a>> {
        Some(OperandView { dims, strides })
    }

    #[test]
    fn contiguous_operands_need_no_axes() {
        let all = view(&[2, 3, 1, 4], &[12, 4, 77, 1]);
        let axes = OperandAxes::merge(&[all, all, None, None, all]).unwrap();
        assert_eq!((axes.axes, axes.contiguous), (0, 0b11111));
    }

    #[test]
    fn axes_merge_where_all_strided_operands_allow() {
        // class weights against a contiguous input: the leading axes are one
        let dims = [2, 3, 4];
        let axes = OperandAxes::merge(&[
            view(&dims, &[12, 4, 1]),
            view(&dims, &[12, 4, 1]),
            view(&dims, &[0, 0, 1]),
            None,
            None,
        ])
        .unwrap();
        assert_eq!((axes.axes, axes.contiguous), (2, 0b11011));
        assert_eq!(axes.size[..2], [6, 4]);
        assert_eq!(axes.stride[2][..2], [0, 1]);
        // a transposed input keeps them apart
        let axes = OperandAxes::merge(&[view(&dims, &[12, 1, 3]), None, view(&dims, &[0, 0, 1]), None, None]).unwrap();
        assert_eq!((axes.axes, axes.contiguous), (3, 0b11010));
        assert_eq!(axes.stride[0][..3], [12, 1, 3]);
        // one broadcast scalar is one axis
        let axes = OperandAxes::merge(&[None, None, view(&dims, &[0, 0, 0]), None, None]).unwrap();
        assert_eq!((axes.axes, axes.size[0]), (1, 24));
    }

    #[test]
    fn too_many_axes_are_refused() {
        let dims = [2; 9];
        let strides: [usize; 9] = std::array::from_fn(|i| 1 << i);
        assert!(OperandAxes::merge(&[view(&dims, &strides), None, None, None, None]).is_none());
        assert!(OperandAxes::merge(&[view(&dims[..8], &strides[..8]), None, None, None, None]).is_some());
    }

    #[test]
    fn vectors_need_operands_aligned_alike() {
        let at = Alignment {
            plain: true,
            input_address: 512,
            target_address: 1024,
            upstream_address: None,
            element_bytes: 2,
            writes: true,
        };
        assert_eq!(Variant::choose(&at), Variant::Dense { phase: 0 });
        assert_eq!(Variant::choose(&Alignment { plain: false, ..at }), Variant::Any);
        assert_eq!(Variant::choose(&Alignment { target_address: 1026, ..at }), Variant::Any);
        let shifted = Alignment { input_address: 518, target_address: 1030, ..at };
        assert_eq!(Variant::choose(&shifted), Variant::Any, "the output is aligned elsewhere");
        assert_eq!(Variant::choose(&Alignment { writes: false, ..shifted }), Variant::Dense { phase: 3 });
        assert_eq!(Variant::choose(&Alignment { upstream_address: Some(4), ..at }), Variant::Any);
        assert_eq!(Variant::choose(&Alignment { element_bytes: 4, ..at }), Variant::Dense { phase: 0 });
        assert_eq!(Variant::choose(&Alignment { element_bytes: 8, ..at }), Variant::Any, "f64 has no other kernels");
    }

    #[test]
    fn spans_cover_the_elements_once() {
        for variant in [Variant::Dense { phase: 0 }, Variant::Any] {
            for bytes in [2, 4, 8] {
                for elements in [1, 31, 1023, 1 << 14, (1 << 14) + 1, 1_000_003, 1 << 26, (1 << 32) + 5] {
                    for spans in [
                        Spans::each(elements, variant, bytes),
                        Spans::sum(elements, variant, bytes),
                        Spans::count(elements),
                    ] {
                        assert_eq!(spans.count, elements.div_ceil(spans.span), "{elements} {spans:?}");
                        assert_eq!(spans.count, spans.grid.blocks[0] as u64);
                    }
                    assert!(Spans::sum(elements, variant, bytes).count <= SPANS);
                    assert!(Spans::count(elements).count <= THREADS);
                }
            }
        }
        assert_eq!(Spans::sum(1 << 13, Variant::Dense { phase: 0 }, 4).count, 1, "small problems take one launch");
    }

    #[test]
    fn short_rows_share_a_block() {
        let dense = Variant::Dense { phase: 0 };
        assert_eq!(Spans::rows(20 * 1000, 20, dense, 2).grid.threads, [2, 128, 1]);
        assert_eq!(Spans::rows(20 * 1000, 20, Variant::Any, 2).grid.threads, [8, 32, 1]);
        assert_eq!(
            Spans::rows(7, 1, Variant::Any, 4).grid,
            Grid { blocks: [1, 1, 1], threads: [1, 256, 1], shared_bytes: 0, cluster: 1, overlaps: false }
        );
        assert_eq!(Spans::rows(1 << 20, 1 << 16, dense, 4).grid.threads, [256, 1, 1]);
    }
}
