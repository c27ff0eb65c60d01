#include "../elementwise/elements.cuh"

using In = double;
ELEMENT_ANY_KERNELS
