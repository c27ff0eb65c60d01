#include "../elementwise/elements.cuh"

using In = fused_loss::bf16;
LOGISTIC_KERNELS
