#define LOGIT f16
#define GENERAL_MODULE
#include "../softmax/entry.cuh"
