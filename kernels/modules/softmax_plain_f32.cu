#define LOGIT float
#define PLAIN_MODULE
#include "../softmax/entry.cuh"
