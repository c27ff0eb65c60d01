#define LOGIT f16
#define PLAIN_MODULE
#include "../softmax/entry.cuh"
