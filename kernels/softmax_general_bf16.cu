#define LOGIT bf16
#define GENERAL_MODULE 1
#include "softmax_entry.cuh"
