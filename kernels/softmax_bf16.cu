#define LOGIT bf16
#include "softmax_entry.cuh"
