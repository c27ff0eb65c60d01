#include "logistic.cuh"

using In = float;
LOGISTIC_KERNELS
