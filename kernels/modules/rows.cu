// Counts of the rows that a gradient of the mean is divided by, ahead of a pass that needs them.
#include "../targets.cuh"

namespace fused_loss {

// The number of rows that are not ignored, or the sum of their class weights: one number for each block.
#define COUNT_ROWS(NAME, A)                                                 \
    extern "C" __global__ void __launch_bounds__(1024)                      \
        NAME(const RowParams p, const Targets<A> targets, double *counts) { \
        count(p, targets, counts);                                          \
    }

COUNT_ROWS(count_rows_f32, float)
COUNT_ROWS(count_rows_f64, double)

} // namespace fused_loss
