#include "logistic.cuh"

using In = double;
LOGISTIC_ANY_KERNELS
