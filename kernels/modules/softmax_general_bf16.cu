#define LOGIT bf16
#define DETAIL_GENERAL
#include "../softmax/entry.cuh"
