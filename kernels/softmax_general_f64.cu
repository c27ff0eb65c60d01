#define LOGIT double
#define GENERAL_MODULE 1
#include "softmax_entry.cuh"
