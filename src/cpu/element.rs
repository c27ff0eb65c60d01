//! Storage types and how the kernels read and write them: in blocks of the arithmetic type, through any strides.

use super::math::{Ahead, Isa, Kernel, LANES, Real, dispatch};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

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
        let mut lanes = [Self::Acc::ZERO; LANES];
        for (lane, x) in lanes.iter_mut().zip(xs) {
            *lane = x.to_acc();
        }
        lanes
    }
    fn widen(src: &[Self], dst: &mut [Self::Acc]);
    fn narrow(src: &[Self::Acc], dst: &mut [MaybeUninit<Self>]);
}

macro_rules! own_arithmetic {
    ($t:ty) => {
        impl Element for $t {
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
own_arithmetic!(f32);
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
        impl Kernel for Widen<'_> {
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
        impl Kernel for Narrow<'_> {
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

/// Read access to a buffer of which another part may be written by another task, or the same part later by this one:
/// the gradient may replace the logits in place.
pub(crate) struct Input<'a, T> {
    data: *const T,
    len: usize,
    marker: PhantomData<&'a [T]>,
}

impl<T> Clone for Input<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Input<'_, T> {}

// SAFETY: an `Input` only hands out shared slices of `T: Sync` data; that nobody writes to a slice while it is alive is
// what the callers of `Output::slice` promise.
unsafe impl<T: Sync> Sync for Input<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Send for Input<'_, T> {}

impl<'a, T> Input<'a, T> {
    pub fn new(data: &'a [T]) -> Self {
        Input { data: data.as_ptr(), len: data.len(), marker: PhantomData }
    }

    /// The memory from an element on, which need not exist.
    #[inline(always)]
    pub fn ahead(&self, start: usize) -> Ahead<T> {
        Ahead(self.data.wrapping_add(start))
    }

    /// The slice, valid as long as nobody writes to it through an [`Output`] of the same buffer.
    #[inline(always)]
    pub fn slice(&self, start: usize, len: usize) -> &[T] {
        assert!(start <= self.len && len <= self.len - start, "read past the end of the storage");
        // SAFETY: in bounds by the assertion, and the buffer is borrowed for 'a
        unsafe { std::slice::from_raw_parts(self.data.add(start), len) }
    }
}

/// Write access to a buffer whose parts are written by several tasks.
pub(crate) struct Output<'a, T> {
    data: *mut MaybeUninit<T>,
    len: usize,
    marker: PhantomData<&'a mut [T]>,
}

// SAFETY: an `Output` is a pointer to data that may be sent; `slice`'s contract makes the parts disjoint.
unsafe impl<T: Send> Sync for Output<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    /// The first `len` elements of a vector's capacity.
    pub fn new(vec: &'a mut Vec<T>, len: usize) -> Self {
        let spare = &mut vec.spare_capacity_mut()[..len];
        Output { data: spare.as_mut_ptr(), len, marker: PhantomData }
    }

    /// Reads and writes of one buffer.
    pub fn in_place(data: &'a mut [T]) -> (Input<'a, T>, Self) {
        let (pointer, len) = (data.as_mut_ptr(), data.len());
        (Input { data: pointer, len, marker: PhantomData }, Output { data: pointer.cast(), len, marker: PhantomData })
    }

    /// # Safety
    /// While the slice is alive, no other slice of this buffer that overlaps it is, here or from an [`Input`].
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [MaybeUninit<T>] {
        assert!(start <= self.len && len <= self.len - start, "write past the end of the output");
        // SAFETY: in bounds by the assertion, exclusive by this function's contract
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// Initialised memory as a destination that is only written.
#[inline(always)]
pub(crate) fn as_uninit<T: Copy>(slice: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: MaybeUninit<T> has T's layout. Safe code could write uninitialised values through it; the kernels, the only
    // callers, write results
    unsafe { std::slice::from_raw_parts_mut(slice.as_mut_ptr().cast(), slice.len()) }
}

/// An empty vector with room for `len` elements that will all be written.
///
/// A large one is a fresh mapping, and the page faults of writing 4 KB at a time would cost more than computing what is
/// written: ask for large pages.
pub(crate) fn with_room<T>(len: usize) -> Vec<T> {
    let vec = Vec::with_capacity(len);
    #[cfg(target_os = "linux")]
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
#[cfg(target_os = "linux")]
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
    pub fn load<T: Element>(&self, data: &Input<T>, start: usize, dst: &mut [T::Acc]) {
        if let Some(first) = self.contiguous_start() {
            return T::widen(data.slice(first + start, dst.len()), dst);
        }
        self.runs(start, dst.len(), |at, index, stride, n| {
            let dst = &mut dst[at..at + n];
            match stride {
                1 => T::widen(data.slice(index, n), dst),
                0 => dst.fill(data.slice(index, 1)[0].to_acc()),
                _ => {
                    let src = data.slice(index, (n - 1) * stride + 1);
                    for (d, s) in dst.iter_mut().zip(src.iter().step_by(stride)) {
                        *d = s.to_acc();
                    }
                }
            }
        })
    }
}

/// An operand of any dtype that is read in blocks of the arithmetic type.
pub(crate) trait Source<A>: Sync {
    fn load(&self, start: usize, dst: &mut [A]);

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
    data: Input<'a, A>,
    order: Strided,
}

impl<A: Real + Element<Acc = A>> Source<A> for OwnSource<'_, A> {
    fn load(&self, start: usize, dst: &mut [A]) {
        self.order.load(&self.data, start, dst)
    }

    fn borrow(&self, start: usize, len: usize) -> Option<&[A]> {
        self.order.contiguous_start().map(|first| self.data.slice(first + start, len))
    }
}

struct FloatSource<'a, T> {
    data: Input<'a, T>,
    order: Strided,
}

impl<T: Element, A: Real> Source<A> for FloatSource<'_, T> {
    fn load(&self, start: usize, dst: &mut [A]) {
        // through the storage type's own arithmetic type
        let mut piece = [T::Acc::ZERO; 64];
        for (i, dst) in dst.chunks_mut(64).enumerate() {
            let piece = &mut piece[..dst.len()];
            self.order.load(&self.data, start + i * 64, piece);
            for (d, s) in dst.iter_mut().zip(piece) {
                *d = A::of(s.to_f64());
            }
        }
    }
}

struct IntSource<'a, T> {
    data: &'a [T],
    order: Strided,
}

impl<T: WithDType, A: Real> Source<A> for IntSource<'_, T> {
    fn load(&self, start: usize, dst: &mut [A]) {
        self.order.runs(start, dst.len(), |at, index, stride, n| {
            for (i, d) in dst[at..at + n].iter_mut().enumerate() {
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
        return Ok(Box::new(OwnSource { data: Input::new(data), order }));
    }
    fn float<'a, T: Element, A: Real>(data: &'a [T], order: Strided) -> Box<dyn Source<A> + 'a> {
        Box::new(FloatSource { data: Input::new(data), order })
    }
    Ok(match storage {
        CpuStorage::F16(data) => float(data, order),
        CpuStorage::BF16(data) => float(data, order),
        CpuStorage::F32(data) => float(data, order),
        CpuStorage::F64(data) => float(data, order),
        CpuStorage::U8(data) => Box::new(IntSource { data, order }),
        CpuStorage::U32(data) => Box::new(IntSource { data, order }),
        CpuStorage::I32(data) => Box::new(IntSource { data, order }),
        CpuStorage::I64(data) => Box::new(IntSource { data, order }),
        other => bail!("no loss kernel reads an operand of dtype {:?}", other.dtype()),
    })
}
