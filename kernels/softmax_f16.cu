#define LOGIT f16
#include "softmax_entry.cuh"
