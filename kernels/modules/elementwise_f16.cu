#include "../elementwise/elements.cuh"

using In = fused_loss::f16;
LOGISTIC_KERNELS
