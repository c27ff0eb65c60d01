// Rows with targets, for every loss that has rows: the place of a row, its target, counts of rows, and the scalar loss.
#pragma once

#include "common.cuh"

namespace fused_loss {

// Where the logits of each row lie: row r is position (r / inner, r % inner).
struct Strides {
    int64_t inner, outer_stride, inner_stride, class_stride;

    __device__ __forceinline__ int64_t start(int64_t row) const {
        if (inner == 1) return row * outer_stride;
        // a 64-bit division is a long subroutine
        if (static_cast<uint64_t>(row) <= UINT32_MAX && static_cast<uint64_t>(inner) <= UINT32_MAX) {
            const uint32_t r = static_cast<uint32_t>(row), n = static_cast<uint32_t>(inner);
            return r / n * outer_stride + r % n * inner_stride;
        }
        return row / inner * outer_stride + row % inner * inner_stride;
    }
};

// Where the numbers of rows lie that have one each: as `Strides`, for fewer than 2^32 rows unless `inner` is 1.
struct RowPlaces {
    int64_t outer_stride, inner_stride;
    uint32_t inner;

    __device__ __forceinline__ int64_t at(int64_t row) const {
        if (inner == 1) return row * outer_stride;
        const uint32_t r = static_cast<uint32_t>(row);
        return r / inner * outer_stride + r % inner * inner_stride;
    }
};

// The parameters of every pass over rows: mirrored by `RowParams` in src/rows/cuda.rs.
struct RowParams {
    int64_t rows;
    int64_t ignore_index;
    double keep;       // 1 - label smoothing: a factor of the own class's weight
    double normalizer; // the divisor of the sum of the losses, unless `counted` or in `Targets`
    double grad_scale; // the upstream gradient of a pass that is given none
    int classes;
    DType target;         // class indices if an integer, else probabilities
    int counted;          // the denominator is the number (the weights) of the rows that are not ignored
    int counts;           // partial counts made by an earlier launch; 0: each block counts the rows itself
    DType row_weight;     // the dtype of the rows' weights: u8 is a mask
    RowPlaces row_places; // where they lie
};

// ---------------------------------------------------------------------------------------------------------------------
// Targets

enum class Kind : int { LIVE, IGNORED, BAD };

// The targets of all rows, and the weights; null where absent.
template <class A> struct Targets {
    const void *t;            // class indices or probabilities
    const A *weight;          // of the classes
    const void *row_weight;   // of the rows: one of weight 0 is ignored
    const double *normalizer; // the divisor of the sum of the losses, where the host does not know it
};

// The target of a row. `BAD` is an index outside of [0, classes): the row's loss and gradient are NaN, and no memory is
// addressed by the index.
template <class A> struct Target {
    Kind kind;
    int index; // the own class, or -1
    A own;     // its weight times (1 - label smoothing)
    A weight;  // the row's part of a counted denominator, its own weight included
};

__device__ __forceinline__ bool is_index(DType dtype) {
    switch (dtype) {
    case DType::U8:
    case DType::U32:
    case DType::I16:
    case DType::I32:
    case DType::I64: return true;
    case DType::F16:
    case DType::BF16:
    case DType::F32:
    case DType::F64: return false;
    }
    return false;
}

// Whether rows have weights: rarely, for the compiler.
template <class A> __device__ __forceinline__ bool has_row_weights(const Targets<A> &targets) {
    return __builtin_expect(targets.row_weight != nullptr, false);
}

// The weight of a row, where there are weights.
template <class A> __device__ __forceinline__ A row_weight(const RowParams &p, const Targets<A> &targets, int64_t row) {
    // opaque, so that nothing of this is computed, and kept in registers, before it is known to be needed
    asm volatile("" : "+l"(row));
    const int64_t at = p.row_places.at(row);
    switch (p.row_weight) {
    case DType::U8: return static_cast<const uint8_t *>(targets.row_weight)[at] ? A(1) : A(0);
    case DType::F16: return widen<A>(static_cast<const f16 *>(targets.row_weight)[at]);
    case DType::BF16: return widen<A>(static_cast<const bf16 *>(targets.row_weight)[at]);
    case DType::F32: return widen<A>(static_cast<const float *>(targets.row_weight)[at]);
    case DType::F64: return widen<A>(static_cast<const double *>(targets.row_weight)[at]);
    case DType::U32:
    case DType::I16:
    case DType::I32:
    case DType::I64: break; // no weights
    }
    return quiet_nan<A>();
}

// A number of a row that counts, times the weight of the row. That is read where it is needed, twice, so that no
// register has it during the pass over the row.
template <class A>
__device__ __forceinline__ A times_row_weight(const RowParams &p, const Targets<A> &targets, int64_t row, A value) {
    return has_row_weights(targets) ? value * row_weight(p, targets, row) : value;
}

// The target of a row of that weight.
template <class A>
__device__ __forceinline__ Target<A> read_target(const RowParams &p, const Targets<A> &targets, int64_t row, A of_row) {
    if (of_row == A(0)) return {Kind::IGNORED, -1, A(0), A(0)};
    if (!is_index(p.target)) return {Kind::LIVE, -1, A(0), of_row};
    const int64_t index = load_index(targets.t, p.target, row);
    if (index == p.ignore_index) return {Kind::IGNORED, -1, A(0), A(0)};
    // checked in 64 bits: 2^32 + 1 is not class 1
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(p.classes)) {
        return {Kind::BAD, -1, quiet_nan<A>(), targets.weight ? A(0) : of_row};
    }
    const A w = targets.weight ? targets.weight[index] : A(1);
    return {Kind::LIVE, static_cast<int>(index), w * A(p.keep), w * of_row};
}

template <class A>
__device__ __forceinline__ Target<A> read_target(const RowParams &p, const Targets<A> &targets, int64_t row) {
    return read_target(p, targets, row, times_row_weight(p, targets, row, A(1)));
}

// ---------------------------------------------------------------------------------------------------------------------
// The results of a reduction, and the scalar loss

template <class A> struct Outputs {
    A *loss;           // for each row, or null
    A *statistics;     // numbers of each row for the backward, or null
    double2 *partials; // for each block (loss, weight); null if the grid is one block or there is no scalar loss
    unsigned *ticket;  // with partials: counts the blocks that have arrived, so that the last one knows it is the last
    A *result;         // the reduced loss or null
    A *denominator;    // the divisor of the sum of the losses, and of the backward; or null
};

template <class A>
__device__ __forceinline__ void write_result(const RowParams &p, const Targets<A> &targets, const Outputs<A> &out,
                                             double2 total) {
    const double denominator = p.counted ? total.y : targets.normalizer ? *targets.normalizer : p.normalizer;
    if (out.result) *out.result = A(total.x / denominator);
    if (out.denominator) *out.denominator = A(denominator);
}

// Ends a kernel whose threads hold the losses and weights of their rows: the only block has the result; of several,
// each leaves partial sums at its index of `count`, and the last one to arrive adds them in a fixed order. All threads
// of the block call it.
template <class A>
__device__ __forceinline__ void finish_block(const RowParams &p, const Targets<A> &targets, const Outputs<A> &out,
                                             double loss, double weight, double *scratch, int index, int count) {
    loss = block_reduce<Sum>(loss, scratch);
    weight = block_reduce<Sum>(weight, scratch);
    const int thread = threadIdx.x + blockDim.x * threadIdx.y;
    if (out.partials) {
        if (thread == 0) out.partials[index] = {loss, weight};
        if (!is_last_block(out.ticket, count)) return;
        double2 total = {0, 0};
#pragma unroll 8
        for (int i = thread; i < count; i += blockDim.x * blockDim.y) {
            const double2 part = __ldcg(out.partials + i);
            total.x += part.x, total.y += part.y;
        }
        loss = block_reduce<Sum>(total.x, scratch);
        weight = block_reduce<Sum>(total.y, scratch);
        index = 0;
    }
    // otherwise the only block; or there is no scalar loss, and the denominator is a constant
    if (thread == 0 && index == 0) write_result(p, targets, out, {loss, weight});
}

// An upstream gradient over the denominator. That is 0 where the rows that count weigh nothing: then no gradient goes
// out of this loss, and what else was added to it keeps its own.
template <class A> __device__ __forceinline__ A over(A upstream, A denominator) {
    return denominator == A(0) ? A(0) : upstream / denominator;
}

// The part of a counted denominator that the rows first, first + step, … add.
template <class A>
__device__ __forceinline__ double count_rows(const RowParams &p, const Targets<A> &targets, int64_t first,
                                             int64_t step) {
    double sum = 0;
    for (int64_t row = first; row < p.rows; row += step) sum += read_target(p, targets, row).weight;
    return sum;
}

// The first stage of a counted denominator that a gradient needs before the rows' losses are known: at most 64 sums.
template <class A>
__device__ __forceinline__ void count(const RowParams &p, const Targets<A> &targets, double *counts) {
    __shared__ double scratch[WARP];
    let_next_launch_begin();
    const double sum = count_rows(p, targets, blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x,
                                  static_cast<int64_t>(gridDim.x) * blockDim.x);
    const double total = block_reduce<Sum>(sum, scratch);
    if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// The divisor of a gradient of the reduced loss. All threads of the block call it and get it.
template <class A>
__device__ __forceinline__ A denominator_of(const RowParams &p, const Targets<A> &targets, const double *counts,
                                            double *scratch) {
    if (!p.counted) return A(targets.normalizer ? *targets.normalizer : p.normalizer);
    const int thread = threadIdx.x + blockDim.x * threadIdx.y;
    if (p.counts == 0) return A(block_reduce<Sum>(count_rows(p, targets, thread, blockDim.x * blockDim.y), scratch));
    wait_for_last_launch();
    // each warp by itself, so that none waits for another
    double sum = 0;
    for (int i = thread % WARP; i < p.counts; i += WARP) sum += counts[i];
    return A(warp_reduce<Sum>(sum));
}

// The same, looked up when it is first needed: a block has its first logits on their way by then.
template <class A> class LazyDivisor {
    A value;
    bool known = false;

  public:
    // All threads of the block call it alike.
    __device__ __forceinline__ A get(const RowParams &p, const Targets<A> &targets, const double *counts,
                                     double *scratch) {
        if (!known) value = denominator_of(p, targets, counts, scratch);
        known = true;
        return value;
    }
};

} // namespace fused_loss
