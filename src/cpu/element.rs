//! Storage types and how the kernels read and write them: in blocks of the arithmetic type, through any strides.

use super::math::{Ahead, Isa, LANES, Real, Vectorized, dispatch};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::any::TypeId;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A floating-point storage type and the type its arithmetic is done in.
pub(crate) trait Element: WithDType {
    type Acc: Real + Element<Acc = Self::Acc>;
    /// Whether `to_acc` and `from_acc` are arithmetic that vector loops can do on the way.
    const INLINE: bool;

    fn to_acc(self) -> Self::Acc;
    fn from_acc(v: Self::Acc) -> Self;
    /// The elements in the order that takes the fewest instructions, for what doesn't depend on it.
    #[inline(always)]
    fn unordered(xs: &[Self; LANES]) -> [Self::Acc; LANES] {
        Self::ordered(xs)
    }
    #[inline(always)]
    fn ordered(xs: &[Self; LANES]) -> [Self::Acc; LANES] {
        let mut lanes = [Self::Acc::ZERO; LANES];
        for (lane, x) in lanes.iter_mut().zip(xs) {
            *lane = x.to_acc();
        }
        lanes
    }
    /// Rows as columns.
    #[inline(always)]
    fn transpose(rows: [&[Self; SQUARE]; SQUARE]) -> [[Self::Acc; SQUARE]; SQUARE] {
        let mut columns = [[Self::Acc::ZERO; SQUARE]; SQUARE];
        for (i, column) in columns.iter_mut().enumerate() {
            for (to, row) in column.iter_mut().zip(rows) {
                *to = row[i].to_acc();
            }
        }
        columns
    }
    fn widen(src: &[Self], dst: &mut [Self::Acc]);
    fn narrow(src: &[Self::Acc], dst: &mut [MaybeUninit<Self>]);
}

/// The side of a square that [`Element::transpose`] takes.
pub(crate) const SQUARE: usize = 4;

/// [`Element::transpose`] by the instructions for it, of which LLVM makes none by itself: `load` makes four `f32` of a
/// row.
#[cfg(target_arch = "x86_64")]
macro_rules! transpose_by_sse {
    ($row:ident => $load:expr) => {
        #[inline(always)]
        fn transpose(rows: [&[Self; SQUARE]; SQUARE]) -> [[f32; SQUARE]; SQUARE] {
            use std::arch::x86_64::*;
            let mut columns = [[0.0; SQUARE]; SQUARE];
            // SAFETY: SSE2 is part of x86_64, and each load and store is of a row or column of four numbers
            unsafe {
                let [mut a, mut b, mut c, mut d] = {
                    let load = |$row: &[Self; SQUARE]| $load;
                    [load(rows[0]), load(rows[1]), load(rows[2]), load(rows[3])]
                };
                _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
                _mm_storeu_ps(columns[0].as_mut_ptr(), a);
                _mm_storeu_ps(columns[1].as_mut_ptr(), b);
                _mm_storeu_ps(columns[2].as_mut_ptr(), c);
                _mm_storeu_ps(columns[3].as_mut_ptr(), d);
            }
            columns
        }
    };
}

macro_rules! own_arithmetic {
    ($t:ty $(, $transpose:item)?) => {
        impl Element for $t {
            $($transpose)?
            type Acc = $t;
            const INLINE: bool = true;
            #[inline(always)]
            fn to_acc(self) -> $t {
                self
            }
            #[inline(always)]
            fn from_acc(v: $t) -> $t {
                v
            }
            #[inline(always)]
            fn widen(src: &[$t], dst: &mut [$t]) {
                dst.copy_from_slice(src)
            }
            #[inline(always)]
            fn narrow(src: &[$t], dst: &mut [MaybeUninit<$t>]) {
                for (d, &s) in dst.iter_mut().zip(src) {
                    d.write(s);
                }
            }
        }
    };
}
own_arithmetic!(
    f32,
    #[cfg(target_arch = "x86_64")]
    transpose_by_sse! { row => _mm_loadu_ps(row.as_ptr()) }
);
own_arithmetic!(f64);

impl Element for bf16 {
    type Acc = f32;
    const INLINE: bool = true;
    #[inline(always)]
    fn to_acc(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    /// Round to nearest even, as `bf16::from_f32`, without its branch.
    #[inline(always)]
    fn from_acc(v: f32) -> bf16 {
        let bits = v.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x0040;
        let is_nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
        bf16::from_bits(if is_nan { quiet_nan } else { rounded } as u16)
    }
    #[cfg(target_arch = "x86_64")]
    transpose_by_sse!(row => {
        // the upper half of an f32
        let row = _mm_loadl_epi64(row.as_ptr().cast());
        _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), row))
    });
    /// The even elements, then the odd ones: two operations on 32 bits that hold two elements.
    #[inline(always)]
    fn unordered(xs: &[bf16; LANES]) -> [f32; LANES] {
        // SAFETY: both are 64 bytes of which every bit pattern is valid
        let pairs = unsafe { std::mem::transmute::<[bf16; LANES], [u32; LANES / 2]>(*xs) };
        let mut lanes = [0f32; LANES];
        for (i, pair) in pairs.iter().enumerate() {
            lanes[i] = f32::from_bits(pair << 16);
            lanes[LANES / 2 + i] = f32::from_bits(pair & 0xFFFF_0000);
        }
        lanes
    }
    fn widen(src: &[bf16], dst: &mut [f32]) {
        struct Widen<'a>(&'a [bf16], &'a mut [f32]);
        impl Vectorized for Widen<'_> {
            type Output = ();
            #[inline(always)]
            fn run<I: Isa>(self) {
                for (d, &s) in self.1.iter_mut().zip(self.0) {
                    *d = s.to_acc();
                }
            }
        }
        dispatch(Widen(src, dst))
    }
    fn narrow(src: &[f32], dst: &mut [MaybeUninit<bf16>]) {
        struct Narrow<'a>(&'a [f32], &'a mut [MaybeUninit<bf16>]);
        impl Vectorized for Narrow<'_> {
            type Output = ();
            #[inline(always)]
            fn run<I: Isa>(self) {
                for (d, &s) in self.1.iter_mut().zip(self.0) {
                    d.write(bf16::from_acc(s));
                }
            }
        }
        dispatch(Narrow(src, dst))
    }
}

impl Element for f16 {
    type Acc = f32;
    // there is an instruction, but `half` asks each time whether this machine has it
    const INLINE: bool = false;
    #[inline(always)]
    fn to_acc(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn from_acc(v: f32) -> f16 {
        f16::from_f32(v)
    }
    // `half` converts slices with the machine's instruction for it
    #[inline(always)]
    fn widen(src: &[f16], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst)
    }
    #[inline(always)]
    fn narrow(src: &[f32], dst: &mut [MaybeUninit<f16>]) {
        let len = dst.len();
        // `half` takes an initialised destination; f16 has no drop and any bit pattern is valid
        dst.fill(MaybeUninit::new(f16::ZERO));
        // SAFETY: every element was initialised on the line above, and MaybeUninit<f16> has f16's layout
        let dst = unsafe { std::slice::from_raw_parts_mut(dst.as_mut_ptr().cast::<f16>(), len) };
        dst.convert_from_f32_slice(&src[..len])
    }
}

/// Read access to a buffer. The gradient may replace the logits in place: then other tasks write other parts of the
/// buffer, and this task writes what it has read.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a, T> {
    Shared(&'a [T]),
    /// The buffer of an [`Output`] too.
    Replaced(&'a [Cell<T>]),
}

// SAFETY: the cells are only read by the functions below, whose contracts exclude that they are written at the same
// time
unsafe impl<T: Sync> Sync for Input<'_, T> {}
// SAFETY: sending it lends the elements to another thread, which `T: Sync` allows for slices and the contracts of the
// functions below for cells
unsafe impl<T: Sync> Send for Input<'_, T> {}

impl<T: Copy> Input<'_, T> {
    pub fn is_replaced(&self) -> bool {
        matches!(self, Input::Replaced(_))
    }

    /// The elements `start .. start + len`, which must exist.
    #[inline(always)]
    fn pointer(&self, start: usize, len: usize) -> *const T {
        let (data, all) = match self {
            Input::Shared(data) => (data.as_ptr(), data.len()),
            Input::Replaced(cells) => (cells.as_ptr().cast(), cells.len()),
        };
        assert!(start <= all && len <= all - start, "read past the end of the storage");
        data.wrapping_add(start)
    }

    /// The memory from an element on, which need not exist.
    #[inline(always)]
    pub fn ahead(&self, start: usize) -> Ahead<T> {
        Ahead(self.pointer(0, 0).wrapping_add(start))
    }

    /// # Safety
    /// While the slice is alive, nobody writes any of its elements through an [`Output`] of the same buffer.
    #[inline(always)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &[T] {
        // SAFETY: `pointer` checks the bounds, the buffer is borrowed for as long as `self`, and by this function's
        // contract nobody writes to the elements
        unsafe { std::slice::from_raw_parts(self.pointer(start, len), len) }
    }

    /// `len` elements that are `stride` apart. They are not taken from a slice: the elements between them may be
    /// written by other tasks.
    ///
    /// # Safety
    /// While the iterator is alive, nobody writes any of its elements through an [`Output`] of the same buffer.
    #[inline(always)]
    pub unsafe fn strided(&self, start: usize, stride: usize, len: usize) -> impl Iterator<Item = T> {
        let first = self.pointer(start, if len == 0 { 0 } else { (len - 1) * stride + 1 });
        // SAFETY: `pointer` checks the last element's position, and by this function's contract nobody writes to the
        // elements
        (0..len).map(move |i| unsafe { *first.add(i * stride) })
    }
}

/// Write access to a buffer whose parts are written by several tasks.
pub(crate) struct Output<'a, T>(&'a [Cell<MaybeUninit<T>>]);

// SAFETY: the cells are only written through `slice`, whose contract makes the parts that several threads write
// disjoint
unsafe impl<T: Send> Sync for Output<'_, T> {}
// SAFETY: sending it lends the cells to another thread, where `slice` has the same contract
unsafe impl<T: Send> Send for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    /// The first `len` elements of a vector's capacity.
    pub fn new(vec: &'a mut Vec<T>, len: usize) -> Self {
        Output(Cell::from_mut(&mut vec.spare_capacity_mut()[..len]).as_slice_of_cells())
    }

    /// Reads and writes of one buffer.
    pub fn in_place(data: &'a mut [T]) -> (Input<'a, T>, Self) {
        let cells = Cell::from_mut(data).as_slice_of_cells();
        // SAFETY: `Cell<MaybeUninit<T>>` has the layout of `Cell<T>`; `slice` leaves no element uninitialised by its
        // contract
        let uninit = unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), cells.len()) };
        (Input::Replaced(cells), Output(uninit))
    }

    /// The memory from an element on, which need not exist.
    #[inline(always)]
    pub fn ahead(&self, start: usize) -> Ahead<T> {
        Ahead(self.0.as_ptr().cast::<T>().wrapping_add(start))
    }

    /// # Safety
    /// While the slice is alive, no other slice of this buffer that overlaps it is, here or from an [`Input`]. Only
    /// initialised values are written.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [MaybeUninit<T>] {
        let all = self.0.len();
        assert!(start <= all && len <= all - start, "write past the end of the output");
        let data = self.0.as_ptr().cast::<MaybeUninit<T>>().cast_mut();
        // SAFETY: in bounds by the assertion, exclusive by this function's contract, and cells may be written through a
        // shared reference
        unsafe { std::slice::from_raw_parts_mut(data.add(start), len) }
    }
}

/// One value for each row, written by the tasks that own the rows.
pub(crate) struct PerRow<'a, A>(Output<'a, A>);

impl<'a, A: Copy> PerRow<'a, A> {
    pub fn new(values: &'a mut [A]) -> Self {
        PerRow(Output::in_place(values).1)
    }

    /// Sets the values of some rows to the first of `values`.
    ///
    /// # Safety
    /// No other thread sets values of the same rows at the same time.
    pub unsafe fn set(&self, rows: Range<usize>, values: &[A]) {
        // SAFETY: the slice ends with this function, during which nobody else has one of these rows by its contract
        let to = unsafe { self.0.slice(rows.start, rows.len()) };
        for (to, &value) in to.iter_mut().zip(values) {
            to.write(value);
        }
    }
}

/// Initialised memory as a destination that is only written.
///
/// # Safety
/// Only initialised values are written.
#[inline(always)]
pub(crate) unsafe fn as_uninit<T: Copy>(slice: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and by this function's contract the elements stay initialised
    unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), slice.len()) }
}

/// An empty vector with room for `len` elements that will all be written.
///
/// Unless the allocator keeps its memory, a large one is a fresh mapping, and the page faults of writing 4 KB at a time
/// would cost more than computing what is written: ask for large pages.
pub(crate) fn with_room<T>(len: usize) -> Vec<T> {
    let vec = Vec::with_capacity(len);
    #[cfg(all(target_os = "linux", not(miri)))]
    if len * size_of::<T>() >= LARGE {
        const PAGE: usize = 4096;
        let start = (vec.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (vec.as_ptr() as usize + len * size_of::<T>()) / PAGE * PAGE;
        // SAFETY: the whole pages inside of the vector's allocation; the advice changes nothing that a program can see,
        // and its failure means nothing
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
    vec
}

/// Bytes from which on large pages are worth asking for: two of them.
#[cfg(all(target_os = "linux", not(miri)))]
const LARGE: usize = 4 << 20;

/// Builds a vector of `len` elements that `fill` writes through an [`Output`].
///
/// # Safety
/// `fill` initialises every element.
pub(crate) unsafe fn build<T>(len: usize, fill: impl FnOnce(&Output<T>)) -> Vec<T> {
    let mut vec = with_room(len);
    fill(&Output::new(&mut vec, len));
    // SAFETY: the capacity is at least `len`, and `fill` initialised the elements
    unsafe { vec.set_len(len) };
    vec
}

/// The elements of a layout in an order of its axes, as few runs of constant stride as possible.
#[derive(Clone, Debug)]
pub(crate) struct Strided {
    offset: usize,
    /// (size, stride), outermost first; sizes above 1 except where there is only one element
    axes: Vec<(usize, usize)>,
}

impl Strided {
    /// The elements of `layout` in row-major order.
    pub fn of(layout: &Layout) -> Self {
        let axes = layout.dims().iter().copied().zip(layout.stride().iter().copied());
        Self::new(layout.start_offset(), axes)
    }

    pub fn new(offset: usize, axes: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut merged: Vec<(usize, usize)> = Vec::new();
        for (size, stride) in axes {
            match merged.last_mut() {
                _ if size == 1 => {}
                Some(last) if last.1 == size * stride => *last = (last.0 * size, stride),
                _ => merged.push((size, stride)),
            }
        }
        if merged.is_empty() {
            merged.push((1, 1));
        }
        Strided { offset, axes: merged }
    }

    /// Where the elements lie if they are one after the other.
    #[inline(always)]
    pub fn contiguous_start(&self) -> Option<usize> {
        match self.axes[..] {
            [(_, 1)] => Some(self.offset),
            _ => None,
        }
    }

    /// Calls `run(position in the block, storage index, stride, length)` for each run of the elements
    /// `start .. start + len`.
    #[inline(always)]
    fn runs(&self, start: usize, len: usize, mut run: impl FnMut(usize, usize, usize, usize)) {
        let (inner, stride) = self.axes[self.axes.len() - 1];
        let mut done = 0;
        while done < len {
            let linear = start + done;
            let mut rest = linear / inner;
            let mut index = self.offset + (linear % inner) * stride;
            for &(size, stride) in self.axes[..self.axes.len() - 1].iter().rev() {
                index += (rest % size) * stride;
                rest /= size;
            }
            let n = (inner - linear % inner).min(len - done);
            run(done, index, stride, n);
            done += n;
        }
    }

    /// Reads `dst.len()` elements from the `start`-th on, converted to the arithmetic type.
    #[inline(always)]
    pub fn load<T: Element>(&self, data: &[T], start: usize, dst: &mut [T::Acc]) {
        if let Some(first) = self.contiguous_start() {
            return T::widen(&data[first + start..][..dst.len()], dst);
        }
        self.runs(start, dst.len(), |at, index, stride, n| {
            let dst = &mut dst[at..at + n];
            match stride {
                1 => T::widen(&data[index..][..n], dst),
                0 => dst.fill(data[index].to_acc()),
                _ => {
                    let src = &data[index..][..(n - 1) * stride + 1];
                    for (d, s) in dst.iter_mut().zip(src.iter().step_by(stride)) {
                        *d = s.to_acc();
                    }
                }
            }
        })
    }

    /// Asks for elements from the `start`-th on in advance where they lie one after the other.
    fn fetch<T>(&self, data: &[T], start: usize) {
        if let Some(first) = self.contiguous_start() {
            Ahead(data.as_ptr().wrapping_add(first + start)).fetch(0);
        }
    }
}

/// An operand of any dtype that is read in blocks of the arithmetic type.
pub(crate) trait Source<A>: Sync {
    fn load(&self, start: usize, dst: &mut [A]);

    /// Asks for elements from the `start`-th on in advance, which need not exist, where it is plain where they lie.
    fn fetch(&self, _start: usize) {}

    /// The elements themselves where they lie one after the other as they are.
    fn borrow(&self, _start: usize, _len: usize) -> Option<&[A]> {
        None
    }

    /// The next `dst.len()` elements from the `start`-th on, in `dst` unless they can be read where they are.
    fn read<'s>(&'s self, start: usize, dst: &'s mut [A]) -> &'s [A] {
        if let Some(elements) = self.borrow(start, dst.len()) {
            return elements;
        }
        self.load(start, dst);
        dst
    }
}

/// An operand of the arithmetic type.
struct OwnSource<'a, A> {
    data: &'a [A],
    order: Strided,
}

impl<A: Real + Element<Acc = A>> Source<A> for OwnSource<'_, A> {
    fn load(&self, start: usize, dst: &mut [A]) {
        self.order.load(self.data, start, dst)
    }

    fn fetch(&self, start: usize) {
        self.order.fetch(self.data, start);
    }

    fn borrow(&self, start: usize, len: usize) -> Option<&[A]> {
        self.order.contiguous_start().map(|first| &self.data[first + start..][..len])
    }
}

/// The same slice where both types are one.
fn as_own<A: 'static, B: 'static>(dst: &mut [A]) -> Option<&mut [B]> {
    // SAFETY: a slice of the same type, borrowed as the one it is made of
    (TypeId::of::<A>() == TypeId::of::<B>()).then(|| unsafe { &mut *(dst as *mut [A] as *mut [B]) })
}

struct FloatSource<'a, T> {
    data: &'a [T],
    order: Strided,
}

impl<T: Element, A: Real> Source<A> for FloatSource<'_, T> {
    fn load(&self, start: usize, dst: &mut [A]) {
        if let Some(dst) = as_own(dst) {
            return self.order.load(self.data, start, dst);
        }
        // through the storage type's own arithmetic type
        let mut piece = [T::Acc::ZERO; 64];
        for (i, dst) in dst.chunks_mut(64).enumerate() {
            let piece = &mut piece[..dst.len()];
            self.order.load(self.data, start + i * 64, piece);
            for (d, s) in dst.iter_mut().zip(piece) {
                *d = A::of(s.to_f64());
            }
        }
    }

    fn fetch(&self, start: usize) {
        self.order.fetch(self.data, start);
    }
}

struct IntSource<'a, T> {
    data: &'a [T],
    order: Strided,
}

/// Integers that lie one after the other, as numbers of the arithmetic type.
struct WidenInts<'k, T, A> {
    src: &'k [T],
    dst: &'k mut [A],
}

impl<T: WithDType, A: Real> Vectorized for WidenInts<'_, T, A> {
    type Output = ();
    #[inline(always)]
    fn run<I: Isa>(self) {
        for (d, s) in self.dst.iter_mut().zip(self.src) {
            *d = A::of(s.to_f64());
        }
    }
}

impl<T: WithDType, A: Real> Source<A> for IntSource<'_, T> {
    fn load(&self, start: usize, dst: &mut [A]) {
        self.order.runs(start, dst.len(), |at, index, stride, n| {
            let dst = &mut dst[at..at + n];
            if stride == 1 {
                return dispatch(WidenInts { src: &self.data[index..index + n], dst });
            }
            for (i, d) in dst.iter_mut().enumerate() {
                *d = A::of(self.data[index + i * stride].to_f64());
            }
        })
    }
}

/// The elements of an operand in the given order, whatever its dtype.
pub(crate) fn source<'a, A: Real + Element<Acc = A>>(
    storage: &'a CpuStorage,
    order: Strided,
) -> Result<Box<dyn Source<A> + 'a>> {
    if let Ok(data) = A::cpu_storage_as_slice(storage) {
        return Ok(Box::new(OwnSource { data, order }));
    }
    fn float<'a, T: Element, A: Real>(data: &'a [T], order: Strided) -> Box<dyn Source<A> + 'a> {
        Box::new(FloatSource { data, order })
    }
    Ok(match storage {
        CpuStorage::F16(data) => float(data, order),
        CpuStorage::BF16(data) => float(data, order),
        CpuStorage::F32(data) => float(data, order),
        CpuStorage::F64(data) => float(data, order),
        CpuStorage::U8(data) => Box::new(IntSource { data, order }),
        CpuStorage::U32(data) => Box::new(IntSource { data, order }),
        CpuStorage::I16(data) => Box::new(IntSource { data, order }),
        CpuStorage::I32(data) => Box::new(IntSource { data, order }),
        CpuStorage::I64(data) => Box::new(IntSource { data, order }),
        other => bail!("no loss kernel reads an operand of dtype {:?}", other.dtype()),
    })
}

#[cfg(test)]
mod miri_tests {
    use super::*;

    #[test]
    fn an_output_replaces_its_input() {
        let mut data = [1f32, 2., 3., 4., 5., 6.];
        {
            let (input, output) = Output::in_place(&mut data);
            for start in [0, 3] {
                let mut copy = [0f32; 3];
                // SAFETY: no slice of the output is alive
                copy.copy_from_slice(unsafe { input.slice(start, 3) });
                // SAFETY: the slice of the input is gone
                for (to, v) in unsafe { output.slice(start, 3) }.iter_mut().zip(copy) {
                    to.write(2. * v);
                }
            }
            // SAFETY: no slice of the output is alive
            assert_eq!(unsafe { input.strided(1, 2, 3) }.collect::<Vec<_>>(), [4., 8., 12.]);
        }
        assert_eq!(data, [2., 4., 6., 8., 10., 12.]);
    }

    #[test]
    fn threads_replace_what_lies_between_each_others_elements() {
        let mut data: Vec<i32> = (0..20).collect();
        let (input, output) = Output::in_place(&mut data);
        let (input, output) = (&input, &output);
        std::thread::scope(|scope| {
            for first in 0..2 {
                scope.spawn(move || {
                    // SAFETY: the other thread writes the elements in between
                    let sum: i32 = unsafe { input.strided(first, 2, 10) }.sum();
                    for i in 0..10 {
                        // SAFETY: the other thread neither reads nor writes this element
                        unsafe { output.slice(first + 2 * i, 1)[0].write(sum) };
                    }
                });
            }
        });
        assert_eq!(data, [90, 100].repeat(10));
    }

    #[test]
    #[should_panic(expected = "read past the end")]
    fn a_read_past_the_end_panics() {
        // SAFETY: nobody writes
        unsafe { Input::Shared(&[1f32, 2.]).strided(1, 2, 2) }.for_each(drop);
    }

    #[test]
    fn a_vector_is_built_in_parts() {
        let fill = |out: &Output<u8>| {
            for i in 0..3 {
                // SAFETY: one slice at a time
                unsafe { out.slice(i, 1)[0].write(i as u8) };
            }
        };
        // SAFETY: `fill` writes all three elements
        assert_eq!(unsafe { build(3, fill) }, [0, 1, 2]);
    }

    #[test]
    fn narrowing_initialises_its_destination() {
        let mut narrow = Vec::with_capacity(2);
        f16::narrow(&[1.5, -2.], narrow.spare_capacity_mut().first_chunk_mut::<2>().expect("room for two"));
        // SAFETY: `narrow` wrote both
        unsafe { narrow.set_len(2) };
        assert_eq!(narrow, [f16::from_f32(1.5), f16::from_f32(-2.)]);
    }
}
