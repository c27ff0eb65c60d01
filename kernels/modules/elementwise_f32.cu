#include "../elementwise/elements.cuh"

using In = float;
ELEMENT_KERNELS
