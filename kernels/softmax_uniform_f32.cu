#define LOGIT float
#define UNIFORM_MODULE
#include "softmax_entry.cuh"
