#define LOGIT f16
#define DETAIL_UNIFORM
#include "../softmax/entry.cuh"
