#define LOGIT float
#define DETAIL_GENERAL
#include "../softmax/entry.cuh"
