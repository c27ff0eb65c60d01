#include "../elementwise/elements.cuh"

namespace fused_loss {

// The elements that a mask leaves: one number for each block.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
    count_mask(const void *mask, long long *counts, const __grid_constant__ ElementParams params) {
    count_pass(mask, counts, params);
}

} // namespace fused_loss
