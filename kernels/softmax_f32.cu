#define LOGIT float
#include "softmax_entry.cuh"
