#define LOGIT double
#define DETAIL_LOG_SOFTMAX
#include "../softmax/entry.cuh"
