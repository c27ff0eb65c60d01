#define LOGIT float
#define PLAIN_MODULE
#include "softmax_entry.cuh"
