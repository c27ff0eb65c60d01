#include "../elementwise/elements.cuh"

using In = fused_loss::bf16;
ELEMENT_KERNELS
