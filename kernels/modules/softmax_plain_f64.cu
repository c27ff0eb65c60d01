#define DOUBLE_LOGITS
#define LOGIT double
#define PLAIN_MODULE
#include "../softmax/entry.cuh"
