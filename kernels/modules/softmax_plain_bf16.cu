#define LOGIT bf16
#define DETAIL_PLAIN
#include "../softmax/entry.cuh"
