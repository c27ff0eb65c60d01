#define LOGIT float
#define DETAIL_UNIFORM
#include "../softmax/entry.cuh"
