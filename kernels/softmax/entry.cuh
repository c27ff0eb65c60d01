// The kernels of the softmax family for one dtype and one `Detail`, in modules so that a program loads only those that
// it uses. A module defines LOGIT, the C++ type of the logits, and one of DETAIL_PLAIN, DETAIL_UNIFORM, DETAIL_GENERAL
// and DETAIL_LOG_SOFTMAX, and includes this file.
//
// DETAIL_UNIFORM: class indices and one number q for all classes. Where q = 0, these kernels differ from the plain ones
// only by a fused multiply-add in place of a multiplication, so that they serve class indices alone too.
//
//   softmax_reduce_uniform_rows            softmax_emit_uniform_rows       softmax_fused_uniform_rows
//   softmax_reduce_uniform_strided         softmax_emit_uniform_strided    softmax_fused_uniform_strided
//   softmax_reduce_uniform_tile            softmax_emit_uniform_tile       softmax_fused_uniform_tile
//   softmax_reduce_uniform_registers_4                                     softmax_fused_uniform_registers_4
//   softmax_reduce_uniform_registers_8                                     softmax_fused_uniform_registers_8
//   softmax_reduce_uniform_registers_16                                    softmax_fused_uniform_registers_16
//   softmax_merge_uniform
//
// DETAIL_PLAIN: class indices alone, where the further numbers of the uniform kernels would take time: forwards, and
// loss and gradient, of adjacent classes. And log-softmax.
//
//   softmax_reduce_plain_rows              softmax_fused_plain_rows            softmax_log_softmax_rows
//   softmax_reduce_plain_tile              softmax_fused_plain_tile            softmax_log_softmax_tile
//   softmax_reduce_plain_registers_4       softmax_fused_plain_registers_4     softmax_log_softmax_registers_4
//   softmax_reduce_plain_registers_8       softmax_fused_plain_registers_8     softmax_log_softmax_registers_8
//   softmax_reduce_plain_registers_16      softmax_fused_plain_registers_16    softmax_log_softmax_registers_16
//                                                                              softmax_log_softmax_strided
//                                                                              softmax_log_softmax_backward_rows
//                                                                              softmax_log_softmax_backward_any
//
// DETAIL_GENERAL: all other options, and all of them for doubles. These kernels are limited by their arithmetic, so
// there are no tiles and registers, which save memory traffic.
//
//   softmax_reduce_general_rows       softmax_emit_general_rows         softmax_fused_general_rows
//   softmax_reduce_general_strided    softmax_emit_general_strided      softmax_fused_general_strided
//   softmax_merge_general             softmax_statistics_rows           softmax_target_gradient
//                                     softmax_statistics_strided
//
// DETAIL_LOG_SOFTMAX: log-softmax alone, for doubles.
//
//   softmax_log_softmax_rows          softmax_log_softmax_strided       softmax_log_softmax_backward_rows
//                                                                       softmax_log_softmax_backward_any
//
// src/softmax/cuda/detail.rs has the same names, and src/softmax/cuda/params.rs the same parameters. The shapes of
// launches are chosen in src/softmax/cuda/plan.rs.
#include "registers.cuh"
#include "rows.cuh"
#include "strided.cuh"
#include "tile.cuh"

namespace fused_loss {
namespace softmax {

using X = LOGIT;
using A = Acc<X>;

constexpr int ROWS_THREADS = 256;
// The blocks that a multiprocessor has to have room for, for each `Detail`, which limits the registers of a thread.
// With three blocks, 768 threads have 96 KB of loads in flight. Two are enough for the general kernels, which compute
// more than they load, and for doubles, which take two registers each. Fewer where an architecture's code takes more
// registers: on sm_75 for want of minima of pairs and of NaN, and from sm_100 on.
constexpr int BLOCKS_OF[] = {
    ARCH < 800 || sizeof(A) == 8 || (ARCH >= 1200 && sizeof(X) == 4) ? 2 : 3, // PLAIN
    ARCH < 800 || ARCH >= 1000 ? 2 : 3,                                       // UNIFORM
    ARCH >= 1000 || (ARCH < 900 && sizeof(A) == 8) ? 1 : 2,                   // GENERAL
    ARCH >= 1000 ? 1 : 2,                                                     // STATISTICS
};
// The same for forwards over tiles, for fused passes over tiles and for strided rows. 0 leaves the registers to the
// compiler, which would give the general kernels more of them than there are, and plain tiles more than they need.
constexpr int TILE_BLOCKS_OF[] = {ARCH < 800 ? 4 : ARCH >= 1000 ? 5 : 6, 4};
#if defined(DETAIL_GENERAL)
// f16 has no registers for the third block, and from sm_100 on bf16 has none
constexpr bool TWO_STRIDED = sizeof(A) == 8 || ARCH < 900 || (ARCH >= 1000 && sizeof(X) == 2) ||
                             dtype_of(static_cast<const X *>(nullptr)) == DType::F16;
constexpr int STRIDED_BLOCKS = TWO_STRIDED ? 2 : 3, FUSED_STRIDED_BLOCKS = 2;
#elif defined(DETAIL_UNIFORM)
constexpr int FUSED_TILE_BLOCKS = 4, STRIDED_BLOCKS = ARCH == 900 ? 3 : 2, FUSED_STRIDED_BLOCKS = STRIDED_BLOCKS;
#else
constexpr int FUSED_TILE_BLOCKS = ARCH < 800 || sizeof(A) == 8 ? 0 : ARCH >= 1000 ? 4 : 5;
constexpr int STRIDED_BLOCKS = sizeof(A) == 8 ? 0 : ARCH == 900 ? 3 : 2;
#endif

// Forwards.
#define REDUCE_KERNEL(NAME, BOUNDS, BODY)                                                                          \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const Params p, const X *x, const Targets<A> targets, \
                                                             A *splits, A *loss, A *statistics, double2 *partials, \
                                                             unsigned *ticket, A *result, A *denominator) {        \
        const Outputs<A> out = {loss, statistics, partials, ticket, result, denominator};                          \
        BODY;                                                                                                      \
    }
#define REDUCE_ROWS(NAME, D) \
    REDUCE_KERNEL(NAME, (ROWS_THREADS, BLOCKS_OF[D]), (reduce_rows<D>(p, x, targets, splits, out)))
#define REDUCE_STRIDED(NAME, D) \
    REDUCE_KERNEL(NAME, (STRIDED_THREADS, STRIDED_BLOCKS), (reduce_strided<D>(p, x, targets, out)))
#define REDUCE_TILE(NAME, D) \
    REDUCE_KERNEL(NAME, (TILE_THREADS, TILE_BLOCKS_OF[D]), (reduce_tiles<D>(p, x, targets, out)))
#define MERGE(NAME, D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, 1)                                                      \
        NAME(const Params p, const X *x, const Targets<A> targets, const A *splits, int count, A *loss, A *statistics, \
             A *result, A *denominator) {                                                                              \
        merge_splits<D>(p, x, targets, splits, count, {loss, statistics, nullptr, nullptr, result, denominator});      \
    }

// Backwards: see `emit_rows` and `UniformGradient`.
#define EMIT_KERNEL(NAME, BOUNDS, BODY)                                                                            \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const Params p, const X *x, const Targets<A> targets, \
                                                             const A *statistics, const A *denominator,            \
                                                             const A *upstream, X *out) {                          \
        BODY(p, x, targets, {statistics, denominator, upstream}, out);                                             \
    }
#define EMIT_ROWS(NAME, RULE) EMIT_KERNEL(NAME, (ROWS_THREADS, BLOCKS_OF[RULE::DETAIL]), emit_rows<RULE>)
#define EMIT_STRIDED(NAME, RULE) EMIT_KERNEL(NAME, (STRIDED_THREADS, STRIDED_BLOCKS), emit_strided<RULE>)
#define EMIT_TILE(NAME, RULE) EMIT_KERNEL(NAME, (TILE_THREADS, 4), emit_tiles<RULE>)

// Loss and gradient in one pass.
#define FUSED_KERNEL(NAME, BOUNDS, BODY)                                                                              \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const Params p, const X *x, X *out,                      \
                                                             const Targets<A> targets, const double *counts, A *loss, \
                                                             double2 *partials, unsigned *ticket, A *result) {        \
        const Outputs<A> left = {loss, nullptr, partials, ticket, result, nullptr};                                   \
        BODY;                                                                                                         \
    }
#define FUSED_ROWS(NAME, RULE) \
    FUSED_KERNEL(NAME, (ROWS_THREADS, BLOCKS_OF[RULE::DETAIL]), (fused_rows<RULE>(p, x, out, targets, counts, left)))
#define FUSED_STRIDED(NAME, RULE) \
    FUSED_KERNEL(NAME, (STRIDED_THREADS, FUSED_STRIDED_BLOCKS), (fused_strided<RULE>(p, x, out, targets, counts, left)))
#define FUSED_TILE(NAME, RULE) \
    FUSED_KERNEL(NAME, (TILE_THREADS, FUSED_TILE_BLOCKS), (fused_tiles<RULE>(p, x, out, targets, counts, left)))

// Rows in registers, W windows a thread: the blocks of 256 threads that a multiprocessor has to have room for, of
// kernels that write a value for each class and of those that don't. src/softmax/cuda/plan.rs has the same numbers,
// except on sm_75 and, for one kernel, on sm_100, whose code takes more registers than these leave.
constexpr int REGISTERS_WRITING = ARCH < 800 ? 1 : 2;
constexpr int registers_reading(Detail detail, int w) {
    if (ARCH < 800 || (ARCH >= 1000 && detail == UNIFORM && w == 16 && sizeof(X) == 4)) return 1;
    return w == 4 ? 3 : 2;
}

#define REDUCE_REGISTERS(NAME, D, W) \
    REDUCE_KERNEL(NAME, (ROWS_THREADS, registers_reading(D, W)), (reduce_registers<D, W>(p, x, targets, out)))
#define FUSED_REGISTERS(NAME, RULE, W) \
    FUSED_KERNEL(NAME, (ROWS_THREADS, REGISTERS_WRITING), (fused_registers<RULE, W>(p, x, out, targets, counts, left)))

#define LOG_SOFTMAX_KERNEL(NAME, BOUNDS, BODY)                                                                    \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const Params p, const X *x, X *out, A *statistics) { \
        BODY(p, x, out, statistics);                                                                              \
    }
#define LOG_SOFTMAX_REGISTERS(NAME, W) \
    LOG_SOFTMAX_KERNEL(NAME, (ROWS_THREADS, REGISTERS_WRITING), log_softmax_registers<W>)

// Forwards with the statistics of rows.
#define STATISTICS_KERNEL(NAME, BOUNDS, BODY)                                                            \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(                                            \
        const Params p, const X *x, const Targets<A> targets, A *loss, A *statistics, double2 *partials, \
        unsigned *ticket, A *result, A *denominator, const StatisticsOutputs<A> numbers) {               \
        BODY(p, x, targets, {loss, statistics, partials, ticket, result, denominator}, numbers);         \
    }

#if defined(DETAIL_GENERAL)

REDUCE_ROWS(softmax_reduce_general_rows, GENERAL)
REDUCE_STRIDED(softmax_reduce_general_strided, GENERAL)
MERGE(softmax_merge_general, GENERAL)
EMIT_ROWS(softmax_emit_general_rows, GeneralGradient)
EMIT_STRIDED(softmax_emit_general_strided, GeneralGradient)
FUSED_ROWS(softmax_fused_general_rows, GeneralGradient)
FUSED_STRIDED(softmax_fused_general_strided, GeneralGradient)
STATISTICS_KERNEL(softmax_statistics_rows, (ROWS_THREADS, BLOCKS_OF[STATISTICS]), statistics_rows)
STATISTICS_KERNEL(softmax_statistics_strided, (STRIDED_THREADS, sizeof(A) == 4 && ARCH == 900 ? 3 : 2),
                  statistics_strided)

// For adjacent classes and for classes apart; written in the logits' dtype where that is the target's too, else in the
// arithmetic one.
extern "C" __global__ void __launch_bounds__(ROWS_THREADS, sizeof(A) == 4 ? 3 : 2)
    softmax_target_gradient(const Params p, const X *x, const Targets<A> targets, const A *statistics,
                            const A *denominator, const A *upstream, void *out) {
    const GradientInputs<A> in = {statistics, denominator, upstream};
    const auto write = [&](auto *out) {
        if (p.x.class_stride == 1) {
            target_gradient_rows(p, x, targets, in, out);
        } else {
            target_gradient_strided(p, x, targets, in, out);
        }
    };
    if (sizeof(X) < sizeof(A) && p.target == dtype_of(x)) {
        write(static_cast<X *>(out));
    } else {
        write(static_cast<A *>(out));
    }
}

#elif defined(DETAIL_UNIFORM)

REDUCE_ROWS(softmax_reduce_uniform_rows, UNIFORM)
REDUCE_STRIDED(softmax_reduce_uniform_strided, UNIFORM)
REDUCE_TILE(softmax_reduce_uniform_tile, UNIFORM)
REDUCE_REGISTERS(softmax_reduce_uniform_registers_4, UNIFORM, 4)
REDUCE_REGISTERS(softmax_reduce_uniform_registers_8, UNIFORM, 8)
REDUCE_REGISTERS(softmax_reduce_uniform_registers_16, UNIFORM, 16)
MERGE(softmax_merge_uniform, UNIFORM)
EMIT_ROWS(softmax_emit_uniform_rows, UniformGradient)
EMIT_STRIDED(softmax_emit_uniform_strided, UniformGradient)
EMIT_TILE(softmax_emit_uniform_tile, UniformGradient)
FUSED_ROWS(softmax_fused_uniform_rows, UniformGradient)
FUSED_STRIDED(softmax_fused_uniform_strided, UniformGradient)
FUSED_TILE(softmax_fused_uniform_tile, UniformGradient)
FUSED_REGISTERS(softmax_fused_uniform_registers_4, UniformGradient, 4)
FUSED_REGISTERS(softmax_fused_uniform_registers_8, UniformGradient, 8)
FUSED_REGISTERS(softmax_fused_uniform_registers_16, UniformGradient, 16)

#elif defined(DETAIL_PLAIN)

REDUCE_ROWS(softmax_reduce_plain_rows, PLAIN)
REDUCE_TILE(softmax_reduce_plain_tile, PLAIN)
REDUCE_REGISTERS(softmax_reduce_plain_registers_4, PLAIN, 4)
REDUCE_REGISTERS(softmax_reduce_plain_registers_8, PLAIN, 8)
REDUCE_REGISTERS(softmax_reduce_plain_registers_16, PLAIN, 16)
FUSED_ROWS(softmax_fused_plain_rows, PlainGradient)
FUSED_TILE(softmax_fused_plain_tile, PlainGradient)
FUSED_REGISTERS(softmax_fused_plain_registers_4, PlainGradient, 4)
FUSED_REGISTERS(softmax_fused_plain_registers_8, PlainGradient, 8)
FUSED_REGISTERS(softmax_fused_plain_registers_16, PlainGradient, 16)
LOG_SOFTMAX_REGISTERS(softmax_log_softmax_registers_4, 4)
LOG_SOFTMAX_REGISTERS(softmax_log_softmax_registers_8, 8)
LOG_SOFTMAX_REGISTERS(softmax_log_softmax_registers_16, 16)
LOG_SOFTMAX_KERNEL(softmax_log_softmax_tile, (TILE_THREADS), log_softmax_tiles)

#elif !defined(DETAIL_LOG_SOFTMAX)
#error \
    "a module of the softmax family defines one of DETAIL_PLAIN, DETAIL_UNIFORM, DETAIL_GENERAL and DETAIL_LOG_SOFTMAX"
#endif

#if defined(DETAIL_PLAIN) || defined(DETAIL_LOG_SOFTMAX)

// on sm_120 the third block would spill
constexpr int LOG_SOFTMAX_BLOCKS = ARCH >= 1200 ? 2 : BLOCKS_OF[PLAIN];
LOG_SOFTMAX_KERNEL(softmax_log_softmax_rows, (ROWS_THREADS, LOG_SOFTMAX_BLOCKS), log_softmax_rows)
LOG_SOFTMAX_KERNEL(softmax_log_softmax_strided, (STRIDED_THREADS, STRIDED_BLOCKS), log_softmax_strided)

#define LOG_SOFTMAX_BACKWARD_KERNEL(NAME, BOUNDS, BODY)                                                       \
    extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const Params p, const X *x, const A *statistics, \
                                                             const X *g, X *out) {                            \
        BODY(p, x, statistics, g, out);                                                                       \
    }

LOG_SOFTMAX_BACKWARD_KERNEL(softmax_log_softmax_backward_rows, (ROWS_THREADS, LOG_SOFTMAX_BLOCKS),
                            log_softmax_backward_rows)
LOG_SOFTMAX_BACKWARD_KERNEL(softmax_log_softmax_backward_any, (STRIDED_THREADS, sizeof(A) == 8 || ARCH >= 1000 ? 2 : 4),
                            log_softmax_backward_any)

#endif

} // namespace softmax
} // namespace fused_loss
