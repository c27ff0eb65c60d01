#define LOGIT bf16
#define UNIFORM_MODULE
#include "../softmax/entry.cuh"
