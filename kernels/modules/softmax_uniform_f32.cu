#define LOGIT float
#define UNIFORM_MODULE
#include "../softmax/entry.cuh"
