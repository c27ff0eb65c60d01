#define LOGIT float
#define GENERAL_MODULE
#include "../softmax/entry.cuh"
