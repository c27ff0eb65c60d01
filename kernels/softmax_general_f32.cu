#define LOGIT float
#define GENERAL_MODULE
#include "softmax_entry.cuh"
