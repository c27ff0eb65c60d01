// What is done with operands ahead of a pass, whatever the dtype of its input: contiguous class indices, and counts of the rows
// or elements that a gradient of the mean is divided by. Each reads its operand once.
#include "../elementwise/elements.cuh"
#include "../softmax/state.cuh"

namespace fused_loss {

// Class indices one after the other, from a tensor with any strides. candle's own copy has no kernel for i32, and uploads the
// strides for the others, which a CUDA graph can't record.

// `Axes` of src/cuda/operands.rs, outermost first.
struct Axes {
    int64_t size[MAX_AXES], stride[MAX_AXES];
    int count;
};

template <class T> __device__ __forceinline__ void copy_indices(const T *from, T *to, int64_t rows, const Axes &axes) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int64_t rest = row, at = 0;
    for (int axis = axes.count - 1; axis >= 0; axis--) {
        at += rest % axes.size[axis] * axes.stride[axis];
        rest /= axes.size[axis];
    }
    to[row] = from[at];
}

#define COPY_INDICES(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                          \
        copy_indices_##NAME(const T *from, T *to, int64_t rows, const __grid_constant__ Axes axes) {                           \
        copy_indices(from, to, rows, axes);                                                                                    \
    }

COPY_INDICES(u8, uint8_t)
COPY_INDICES(u32, uint32_t)
COPY_INDICES(i32, int32_t)
COPY_INDICES(i64, int64_t)

// The rows that are not ignored, or their class weights: one number for each block.
#define COUNT_ROWS(NAME, A)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(1024)                                                                         \
        count_rows_##NAME(const softmax::Problem p, const void *t, const A *weight, double *counts) {                          \
        softmax::count(p, t, weight, counts);                                                                                  \
    }

COUNT_ROWS(f32, float)
COUNT_ROWS(f64, double)

// The elements that a mask leaves: one number for each block.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) count_mask(const void *mask, long long *counts, const __grid_constant__ Problem q) {
    count_pass(mask, counts, q);
}

} // namespace fused_loss
