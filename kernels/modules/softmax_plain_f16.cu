#define LOGIT f16
#define DETAIL_PLAIN
#include "../softmax/entry.cuh"
