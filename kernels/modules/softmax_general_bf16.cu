#define LOGIT bf16
#define GENERAL_MODULE
#include "../softmax/entry.cuh"
