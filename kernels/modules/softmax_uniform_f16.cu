#define LOGIT f16
#define UNIFORM_MODULE
#include "../softmax/entry.cuh"
