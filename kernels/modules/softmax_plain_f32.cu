#define LOGIT float
#define DETAIL_PLAIN
#include "../softmax/entry.cuh"
