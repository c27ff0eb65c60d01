#define LOGIT double
#define DETAIL_GENERAL
#include "../softmax/entry.cuh"
