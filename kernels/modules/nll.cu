#include "../nll.cuh"

namespace fused_loss {
namespace nll {

constexpr int THREADS = 256;

// The loss and, with `grad`, its gradient. `grad` is for few rows, which one block works through.
#define NLL_LOSS(NAME, A)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        NAME(const Params p, const void *x, const Targets<A> targets, A *loss, double2 *partials, unsigned *ticket, \
             A *result, A *denominator, void *grad) {                                                               \
        __shared__ double scratch[WARP];                                                                            \
        with_logits<A>(p.dtype, [&](auto in) {                                                                      \
            using T = decltype(in);                                                                                 \
            losses(p, static_cast<const T *>(x), targets, {loss, nullptr, partials, ticket, result, denominator});  \
            if (!grad) return;                                                                                      \
            const A counted = denominator_of(p, targets, nullptr, scratch);                                         \
            gradient<T>(p, targets, counted, nullptr, static_cast<T *>(grad));                                      \
        });                                                                                                         \
    }

NLL_LOSS(nll_loss_f32, float)
NLL_LOSS(nll_loss_f64, double)

#define NLL_GRADIENT(NAME, A)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        NAME(const Params p, const Targets<A> targets, const A *denominator, const A *upstream, void *grad) { \
        with_logits<A>(p.dtype, [&](auto in) {                                                                \
            using T = decltype(in);                                                                           \
            gradient<T>(p, targets, *denominator, upstream, static_cast<T *>(grad));                          \
        });                                                                                                   \
    }

NLL_GRADIENT(nll_gradient_f32, float)
NLL_GRADIENT(nll_gradient_f64, double)

} // namespace nll
} // namespace fused_loss
