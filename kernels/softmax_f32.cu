#define LOGIT float
#define GENERAL_MODULE 0
#include "softmax_entry.cuh"
