#define LOGIT double
#define GENERAL_MODULE
#include "../softmax/entry.cuh"
