#define LOGIT bf16
#define GENERAL_MODULE 0
#include "softmax_entry.cuh"
