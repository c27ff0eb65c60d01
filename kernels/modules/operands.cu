// What is done with operands ahead of a pass, whatever the dtype of its input: contiguous class indices, and counts of the rows
// or elements that a gradient of the mean is divided by. Each reads its operand once.
#include <type_traits>

#include "../elementwise/elements.cuh"
#include "../targets.cuh"

namespace fused_loss {

// Class indices one after the other, from a tensor with any strides. candle's own copy has no kernel for i32, and uploads the
// strides for the others, which a CUDA graph can't record.

// `Axes` of src/cuda/operands.rs, outermost first.
struct Axes {
    int64_t size[MAX_AXES], stride[MAX_AXES];
    int count;
};

extern "C" __global__ void __launch_bounds__(256)
    copy_indices(const void *from, void *to, int64_t rows, DType dtype, const __grid_constant__ Axes axes) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int64_t rest = row, at = 0;
    for (int axis = axes.count - 1; axis >= 0; axis--) {
        at += rest % axes.size[axis] * axes.stride[axis];
        rest /= axes.size[axis];
    }
    with_dtype(dtype, [&](auto pointer) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(pointer)>>;
        static_cast<T *>(to)[row] = static_cast<const T *>(from)[at];
    });
}

// The rows that are not ignored, or their class weights: one number for each block.
#define COUNT_ROWS(NAME, A)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(1024)                                                                         \
        count_rows_##NAME(const RowParams p, const void *t, const A *weight, double *counts) {                          \
        count(p, t, weight, counts);                                                                                  \
    }

COUNT_ROWS(f32, float)
COUNT_ROWS(f64, double)

// The elements that a mask leaves: one number for each block.
extern "C" __global__ void __launch_bounds__(MAX_THREADS) count_mask(const void *mask, long long *counts, const __grid_constant__ ElementParams q) {
    count_pass(mask, counts, q);
}

} // namespace fused_loss
