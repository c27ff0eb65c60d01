#define LOGIT double
#include "softmax_entry.cuh"
