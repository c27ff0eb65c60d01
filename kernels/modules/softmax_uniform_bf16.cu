#define LOGIT bf16
#define DETAIL_UNIFORM
#include "../softmax/entry.cuh"
