#define LOGIT bf16
#define GENERAL_MODULE
#include "softmax_entry.cuh"
