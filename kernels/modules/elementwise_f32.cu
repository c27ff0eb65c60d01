#include "../elementwise/elements.cuh"

using In = float;
LOGISTIC_KERNELS
