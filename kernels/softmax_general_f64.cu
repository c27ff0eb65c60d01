#define LOGIT double
#define GENERAL_MODULE
#include "softmax_entry.cuh"
