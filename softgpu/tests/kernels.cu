// What main.cpp launches.
#include <cuda_fp16.h>

#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)

extern "C" __global__ void fill(int* to, int value, int n) {
    if (INDEX < n) to[INDEX] = value;
}

// Order matters: 2x + add
extern "C" __global__ void step(int* x, int add, int n) {
    if (INDEX < n) x[INDEX] = 2 * x[INDEX] + add;
}

extern "C" __global__ void fetch(const int* x, int i) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(x + i));
}

extern "C" __global__ void move_if(const int* flag, const int* from, int* to, int n) {
    if (INDEX < n && *flag) to[INDEX] = from[INDEX];
}

extern "C" __global__ void __launch_bounds__(256) spin(int* out, int rounds) {
    int x = 1;
    for (int i = 0; i < rounds; ++i) x = x * 3 + i;
    *out = x;
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) ranks(int* to) {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (!threadIdx.x) to[blockIdx.x] = rank;
}

// A block's number in its cluster and the size of that.
extern "C" __global__ void places(int* to) {
    unsigned rank, size;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    if (!threadIdx.x) to[2 * blockIdx.x] = rank, to[2 * blockIdx.x + 1] = size;
}

// Each block appends the number to a log.
extern "C" __global__ void append(int* log, int* length, int number) {
    if (!threadIdx.x) log[atomicAdd(length, 1)] = number;
}

__device__ int total;
extern "C" __global__ void add_to_total(int* sum, int n) {
    if (INDEX < n) atomicAdd(&total, 1), atomicAdd(sum, 1);
}

// What all threads of the block say of their numbers: in warps that differ.
extern "C" __global__ void votes(const int* x, int* to) {
    int mine = x[threadIdx.x];
    int count = __syncthreads_count(mine > 0), all = __syncthreads_and(mine > 0), any = __syncthreads_or(mine > 0);
    if (!threadIdx.x) to[0] = count, to[1] = all != 0, to[2] = any != 0;
}

// nvcc calls a function for `pow`: each lane with its own arguments.
extern "C" __global__ void powers(const double* x, const double* y, double* z, int n) {
    if (INDEX < n) z[INDEX] = pow(x[INDEX], y[INDEX]);
}

#define DIRECTED(i, mode)                                                                              \
    z[8 * i] = __dsqrt_##mode(a), z[8 * i + 1] = __drcp_##mode(a), z[8 * i + 2] = __ddiv_##mode(a, b), \
          z[8 * i + 3] = __fma_##mode(a, b, b), z[8 * i + 4] = __double2float_##mode(a),               \
          z[8 * i + 5] = __ll2float_##mode((long long)(a * 1e15)), z[8 * i + 6] = __fmul_##mode(f, g), \
          z[8 * i + 7] = __half2float(__float2half_##mode(f))
// The rounding modes, 32 numbers for each pair.
extern "C" __global__ void directed(const double* x, const double* y, double* results, int n) {
    if (INDEX >= n) return;
    double a = x[INDEX], b = y[INDEX], *z = results + 32 * INDEX;
    float f = (float)a, g = (float)b;
    DIRECTED(0, rn), DIRECTED(1, rz), DIRECTED(2, ru), DIRECTED(3, rd);
}

// Instructions of integers, 8 numbers for each pair.
extern "C" __global__ void integers(const long long* x, const long long* y, long long* results, int n) {
    if (INDEX >= n) return;
    unsigned long long a = x[INDEX], b = y[INDEX], low, high;
    long long* z = results + 8 * INDEX;
    asm("mad.lo.cc.u64 %0, %2, %3, %3; madc.hi.u64 %1, %2, %3, 0;" : "=l"(low), "=l"(high) : "l"(a), "l"(b));
    z[0] = low, z[1] = high;
    z[2] = __ffs((int)a), z[3] = __ffsll(a);
    int signed_bit, saturated;
    asm("bfind.s32 %0, %1;" : "=r"(signed_bit) : "r"((int)a));
    asm("add.sat.s32 %0, %1, %2;" : "=r"(saturated) : "r"((int)a), "r"((int)b));
    z[4] = signed_bit, z[5] = saturated;
    double d = a ? (double)(long long)b * 1e3 : nan("");
    z[6] = (int)d, z[7] = (long long)d;
}

#define APPROXIMATE(i, instruction) asm(instruction ".f32 %0, %1;" : "=f"(z[i]) : "f"(a))
#define QUOTIENT(i, instruction) asm(instruction ".f32 %0, %1, %2;" : "=f"(z[i]) : "f"(a), "f"(b))
// Approximate instructions and what they approximate, 16 numbers for each pair.
extern "C" __global__ void approximate(const float* x, const float* y, float* results, int n) {
    if (INDEX >= n) return;
    float a = x[INDEX], b = y[INDEX], *z = results + 16 * INDEX;
    APPROXIMATE(0, "ex2.approx");
    APPROXIMATE(1, "lg2.approx");
    APPROXIMATE(2, "rcp.approx.ftz");
    APPROXIMATE(3, "rsqrt.approx");
    APPROXIMATE(4, "sqrt.approx");
    APPROXIMATE(5, "tanh.approx");
    QUOTIENT(6, "div.approx");
    QUOTIENT(7, "div.full.ftz");
    APPROXIMATE(8, "rcp.rn");
    APPROXIMATE(9, "sqrt.rn");
    QUOTIENT(10, "div.rn");
    __half2 h = __floats2half2_rn(a, b), e;
    asm("ex2.approx.f16x2 %0, %1;" : "=r"(*(unsigned*)&e) : "r"(*(unsigned*)&h));
    z[11] = __low2float(h), z[12] = __low2float(e), z[13] = __high2float(h), z[14] = __high2float(e);
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(*(unsigned*)&e) : "r"(*(unsigned*)&h));
    z[15] = __low2float(e);
}
