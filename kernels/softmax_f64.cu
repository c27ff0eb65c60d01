#define DOUBLE_LOGITS
#define LOGIT double
#define PLAIN_MODULE
#include "softmax_entry.cuh"
