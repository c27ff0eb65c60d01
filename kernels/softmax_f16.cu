#define LOGIT f16
#define GENERAL_MODULE 0
#include "softmax_entry.cuh"
