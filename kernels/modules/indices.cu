// Class indices one after the other and as i64, from a tensor with any strides. candle's own copy and cast have no
// kernel for i16 and i32, and its copy uploads the strides, which a CUDA graph can't record.
#include "../common.cuh"

namespace fused_loss {

constexpr int MAX_INDEX_AXES = 8;

// `IndexAxes` of src/cuda/indices.rs, outermost axis first.
struct IndexAxes {
    int64_t size[MAX_INDEX_AXES], stride[MAX_INDEX_AXES];
    int count;
};

extern "C" __global__ void __launch_bounds__(256)
    copy_indices(const void *from, int64_t *to, int64_t rows, DType dtype, const __grid_constant__ IndexAxes axes) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    int64_t rest = row, at = 0;
    for (int axis = axes.count - 1; axis >= 0; axis--) {
        at += rest % axes.size[axis] * axes.stride[axis];
        rest /= axes.size[axis];
    }
    to[row] = load_index(from, dtype, at);
}

} // namespace fused_loss
