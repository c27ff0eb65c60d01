#define LOGIT f16
#define DETAIL_GENERAL
#include "../softmax/entry.cuh"
