#include "../elementwise/elements.cuh"

using In = fused_loss::f16;
ELEMENT_KERNELS
