#include "../elementwise/elements.cuh"

using In = double;
LOGISTIC_ANY_KERNELS
