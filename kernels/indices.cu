// Class indices one after the other, from a tensor with any strides. Reads and writes 4 bytes a row: what candle does for
// the other dtypes of class indices, and has no kernel for in i32.
#include "common.cuh"

namespace fused_loss {

constexpr int MAX_AXES = 8;

// `Axes` of src/cuda/indices.rs, outermost first.
struct Axes {
    int64_t size[MAX_AXES], stride[MAX_AXES];
    int count;
};

extern "C" __global__ void __launch_bounds__(256) copy_indices_i32(const int32_t *from, int32_t *to, int64_t rows, const __grid_constant__ Axes axes) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int64_t rest = row, at = 0;
    for (int axis = axes.count - 1; axis >= 0; axis--) {
        at += rest % axes.size[axis] * axes.stride[axis];
        rest /= axes.size[axis];
    }
    to[row] = from[at];
}

} // namespace fused_loss
