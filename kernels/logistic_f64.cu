#include "logistic.cuh"

using In = double;
LOGISTIC_KERNELS
