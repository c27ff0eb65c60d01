#define LOGIT bf16
#define PLAIN_MODULE
#include "../softmax/entry.cuh"
