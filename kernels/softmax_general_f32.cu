#define LOGIT float
#define GENERAL_MODULE 1
#include "softmax_entry.cuh"
