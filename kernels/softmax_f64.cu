#define DOUBLE_LOGITS
#define LOGIT double
#define GENERAL_MODULE 0
#include "softmax_entry.cuh"
