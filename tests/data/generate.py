"""Records PyTorch's losses and gradients in pytorch.safetensors, next to this file.

    pip install torch==2.11.* numpy safetensors
    python generate.py

The oracle is torch.nn.functional on the CPU, in f64, fed with inputs already rounded to the dtype the case is about.
What PyTorch lacks (z-loss, soft cap, logit scale, normalizer, row weights and transforms, ignore mask, batch mean,
binary label smoothing, focal loss, weights of focal loss and L1) is composed of torch ops around it. Every number is
then checked against NumPy: each loss is written out a second time below, and each gradient is compared with a central
difference of that second version.

Cases in which PyTorch gives NaN and the crate does better (0 * log 0 for a target of 0 at a logit of -inf) are left
out, and so are empty batches. A rerun with the same versions gives the same file, bit for bit.

The file
--------
`__metadata__` has one key, `cases`: a first line `torch=<version>`, then one line a case of `key=value` joined by `;`.
The keys `id`, `loss` and, except for log_softmax, `reduction` are always there; `note` is for people; any other is an
option that differs from its default: ignore_index, label_smoothing, z_loss, softcap, logit_scale, normalizer,
transform and its parameter, alpha, gamma, dim.

The tensors of case `id` are called `<id>.<field>`:

    input, target         as the loss is given them
    weight, pos_weight,   likewise, where the case has one
    row_weight,
    ignore_mask
    upstream              gradient with respect to the loss: the loss's shape, f64 for f64 inputs, f32 for others
                          (the input's dtype for log_softmax)
    loss                  expected, f64
    grad                  expected gradient of sum(loss * upstream) with respect to the input, f64
    target_grad           the same with respect to a floating-point target, f64
    loss32                f32 inputs only: what PyTorch itself makes of the f32 input, f32
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, F64, F16, BF16)
REDUCTIONS = ("none", "mean", "sum")
UNSIGNED_OR_WIDE = (torch.uint8, torch.uint32, torch.int32, torch.int64)
SIGNED = (torch.int64, torch.int32)


# The oracle: torch


def softmax_rows(x, logit_scale=1.0, softcap=None):
    x = x * logit_scale
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def cross_entropy(
    x,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    z_loss=0.0,
    normalizer=None,
    row_weight=None,
    transform=None,
    parameter=0.0,
    **prior,
):
    x = softmax_rows(x, **prior)
    options = dict(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if z_loss == 0.0 and normalizer is None and row_weight is None and transform is None:
        return F.cross_entropy(x, target, reduction=reduction, **options)
    rows = F.cross_entropy(x, target, reduction="none", **options)
    if transform is not None:
        # the own class's part for the transformed one
        own = dict(weight=weight, ignore_index=ignore_index)
        n = F.cross_entropy(x, target, reduction="none", ignore_index=ignore_index)
        of_class = torch.ones((), dtype=x.dtype) if weight is None else weight[torch.where(target == ignore_index, 0, target)]
        kept = (target != ignore_index).to(x.dtype)
        rows = rows - (1.0 - label_smoothing) * F.cross_entropy(x, target, reduction="none", **own)
        rows = rows + (1.0 - label_smoothing) * kept * of_class * transformed(n, transform, parameter)
    lse_squared = torch.logsumexp(x, 0 if x.dim() == 1 else 1) ** 2
    if target.is_floating_point():
        rows, count = rows + z_loss * lse_squared, rows.numel()
    else:
        kept = target != ignore_index
        rows = rows + torch.where(kept, z_loss * lse_squared, 0.0)
        count = kept.sum() if weight is None else weight[target[kept]].sum()
    if row_weight is not None:
        rows = rows * row_weight
        if target.is_floating_point():
            count = row_weight.expand(rows.shape).sum()
        else:
            of_rows = row_weight.expand(rows.shape)[kept]
            count = of_rows.sum() if weight is None else (weight[target[kept]] * of_rows).sum()
    if reduction == "mean":
        return rows.sum() / (count if normalizer is None else normalizer)
    return rows.sum() if reduction == "sum" else rows


def transformed(n, transform, parameter):
    """What a row transform makes of negative log-likelihoods n, which are not 0."""
    p, u = torch.exp(-n), -torch.expm1(-n)
    return {
        "focal": lambda: u**parameter * n,
        "poly1": lambda: n + parameter * u,
        "dft": lambda: p.detach() * n,
        "generalized_ce": lambda: -torch.expm1(-parameter * n) / parameter,
    }[transform]()


def nll(x, target, weight=None, ignore_index=-100, row_weight=None, reduction="mean"):
    options = dict(weight=weight, ignore_index=ignore_index)
    if row_weight is None:
        return F.nll_loss(x, target, reduction=reduction, **options)
    rows = F.nll_loss(x, target, reduction="none", **options) * row_weight
    kept = row_weight * (target != ignore_index)
    count = kept if weight is None else kept * weight[torch.where(target == ignore_index, 0, target)]
    return {"none": rows, "mean": rows.sum() / count.sum(), "sum": rows.sum()}[reduction]


def reduce_losses(loss, count, reduction, normalizer):
    if reduction == "mean":
        return loss.sum() / (count if normalizer is None else normalizer)
    if reduction == "batchmean":
        return loss.sum() / (loss.shape[0] if loss.dim() else 1)
    return loss.sum() if reduction == "sum" else loss


def reduce_elements(loss, weight=None, ignore_mask=None, reduction="mean", normalizer=None):
    """Weight, mask, reduction and normalizer around the losses of elements."""
    loss = loss if weight is None else weight * loss
    if ignore_mask is None:
        return reduce_losses(loss, loss.numel(), reduction, normalizer)
    kept = (ignore_mask != 0).expand_as(loss)
    return reduce_losses(torch.where(kept, loss, 0.0), kept.sum(), reduction, normalizer)


def bce(x, target, weight=None, **options):
    if options.keys() <= {"reduction"} and options.get("reduction") != "batchmean":
        return F.binary_cross_entropy(x, target, weight=weight, **options)
    return reduce_elements(F.binary_cross_entropy(x, target, reduction="none"), weight, **options)


def bce_with_logits(x, target, ignore_mask=None, label_smoothing=0.0, reduction="mean", normalizer=None, **weights):
    target = target * (1.0 - label_smoothing) + label_smoothing / 2.0
    if ignore_mask is None and normalizer is None and reduction != "batchmean":
        return F.binary_cross_entropy_with_logits(x, target, reduction=reduction, **weights)
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none", **weights)
    return reduce_elements(loss, None, ignore_mask, reduction, normalizer)


def multi_label_soft_margin(x, target, weight=None, ignore_mask=None, reduction="mean", normalizer=None):
    if ignore_mask is None:
        if normalizer is None and reduction != "batchmean":
            return F.multilabel_soft_margin_loss(x, target, weight=weight, reduction=reduction)
        rows = F.multilabel_soft_margin_loss(x, target, weight=weight, reduction="none")
        return reduce_losses(rows, rows.numel(), reduction, normalizer)
    loss = F.binary_cross_entropy_with_logits(x, target, weight=weight, reduction="none")
    kept = (ignore_mask != 0).expand_as(loss)
    rows = torch.where(kept, loss, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)
    return reduce_losses(rows, kept.any(-1).sum(), reduction, normalizer)


def sigmoid_focal(x, target, alpha=0.25, gamma=2.0, **options):
    """torchvision.ops.sigmoid_focal_loss, with 1 - p_t expanded so that it does not cancel where p_t is near 1."""
    one_minus_p_t = torch.sigmoid(x) * (1.0 - target) + torch.sigmoid(-x) * target
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none") * one_minus_p_t**gamma
    if alpha >= 0.0:
        loss = (alpha * target + (1.0 - alpha) * (1.0 - target)) * loss
    return reduce_elements(loss, **options)


def l1(x, target, **options):
    if options.keys() <= {"reduction"} and options.get("reduction") != "batchmean":
        return F.l1_loss(x, target, **options)
    return reduce_elements(F.l1_loss(x, target, reduction="none"), **options)


ORACLE = {
    "cross_entropy": cross_entropy,
    "nll": nll,
    "log_softmax": lambda x, _, dim: F.log_softmax(x, dim),
    "binary_cross_entropy": bce,
    "binary_cross_entropy_with_logits": bce_with_logits,
    "multi_label_soft_margin": multi_label_soft_margin,
    "sigmoid_focal": sigmoid_focal,
    "l1": l1,
}


# The second opinion: NumPy


def np_reduce(rows, count, reduction):
    if reduction == "none":
        return rows
    if reduction == "batchmean":
        return rows.sum() / (rows.shape[0] if rows.ndim else 1)
    with np.errstate(invalid="ignore"):
        return rows.sum() / count if reduction == "mean" else rows.sum()


def np_rows(x):
    """(N, C, d1, ..., dk) as rows of C."""
    x = x[None] if x.ndim == 1 else np.moveaxis(x, 1, -1)
    return x.reshape(-1, x.shape[-1])


def np_softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def np_cross_entropy(
    x,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    normalizer=None,
    row_weight=None,
    transform=None,
    parameter=0.0,
):
    shape = x.shape[2:] if x.ndim == 1 else x.shape[:1] + x.shape[2:]
    logits = np_rows(x) * logit_scale
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    n, c = logits.shape
    weight = np.ones(c) if weight is None else weight
    top = logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(1, keepdims=True))
    log_p = logits - top - log_sum
    if target.dtype.kind == "f":
        t = np_rows(target) * (1.0 - label_smoothing) + label_smoothing / c
        kept, count = np.ones(n), n
    else:
        index = target.reshape(-1)
        kept = (index != ignore_index).astype(np.float64)
        index = np.where(kept, index, 0)
        t = np.eye(c)[index] * (1.0 - label_smoothing) + label_smoothing / c
        count = (weight[index] * kept).sum()
        t = t * kept[:, None]
    cost = -np.where(t == 0.0, 0.0, t * weight * np.where(t == 0.0, 0.0, log_p))
    if transform is not None:
        # the own class's n for the transformed one; smoothing keeps its part
        own, n = (np.arange(len(index)), index), -log_p[np.arange(len(index)), index]
        p = np.exp(-n)
        value = {
            "focal": (1.0 - p) ** parameter * n,
            "poly1": n + parameter * (1.0 - p),
            "dft": p * n,
            "generalized_ce": (1.0 - p**parameter) / (parameter or 1.0),
        }[transform]
        cost[own] += (1.0 - label_smoothing) * kept * weight[index] * (value - n)
    loss = cost.sum(1)
    loss = loss + z_loss * kept * ((top + log_sum)[:, 0]) ** 2
    if row_weight is not None:
        of_rows = np.broadcast_to(row_weight, shape).reshape(-1)
        loss = loss * of_rows
        count = (of_rows * (1.0 if target.dtype.kind == "f" else weight[index] * kept)).sum()
    return np_reduce(loss.reshape(shape), count if normalizer is None else normalizer, reduction)


def np_nll(x, target, weight=None, ignore_index=-100, row_weight=1.0, reduction="mean"):
    rows, index = np_rows(x), target.reshape(-1)
    weight = np.ones(rows.shape[1]) if weight is None else weight
    kept = (index != ignore_index) * np.broadcast_to(row_weight, target.shape).reshape(-1)
    index = np.where(index != ignore_index, index, 0)
    loss = -rows[np.arange(len(index)), index] * weight[index] * kept
    return np_reduce(loss.reshape(target.shape), (weight[index] * kept).sum(), reduction)


def np_log_softmax(x, _, dim):
    x = x - x.max(dim, keepdims=True)
    return x - np.log(np.exp(x).sum(dim, keepdims=True))


def np_kept(x, ignore_mask):
    kept = np.ones(x.shape) if ignore_mask is None else (ignore_mask != 0).astype(np.float64)
    return np.broadcast_to(kept, x.shape)


def np_reduce_elements(loss, weight=1.0, ignore_mask=None, reduction="mean", normalizer=None):
    kept = np_kept(loss, ignore_mask)
    return np_reduce(kept * weight * loss, kept.sum() if normalizer is None else normalizer, reduction)


def np_binary_cross_entropy(x, t, **options):
    with np.errstate(divide="ignore"):
        loss = -(t * np.maximum(np.log(x), -100.0) + (1.0 - t) * np.maximum(np.log1p(-x), -100.0))
    return np_reduce_elements(loss, **options)


def np_bce_with_logits(x, t, pos_weight=1.0, label_smoothing=0.0, **options):
    t = t * (1.0 - label_smoothing) + label_smoothing / 2.0
    return np_reduce_elements(pos_weight * t * np_softplus(-x) + (1.0 - t) * np_softplus(x), **options)


def np_multi_label_soft_margin(x, t, weight=1.0, ignore_mask=None, reduction="mean", normalizer=None):
    kept = np_kept(x, ignore_mask)
    left = kept.sum(-1)
    loss = (kept * weight * (t * np_softplus(-x) + (1.0 - t) * np_softplus(x))).sum(-1) / np.maximum(left, 1.0)
    return np_reduce(loss, (left > 0.0).sum() if normalizer is None else normalizer, reduction)


def np_sigmoid_focal(x, t, alpha=0.25, gamma=2.0, **options):
    p_t = t / (1.0 + np.exp(-x)) + (1.0 - t) / (1.0 + np.exp(x))
    alpha_t = alpha * t + (1.0 - alpha) * (1.0 - t) if alpha >= 0.0 else 1.0
    loss = alpha_t * (1.0 - p_t) ** gamma * (t * np_softplus(-x) + (1.0 - t) * np_softplus(x))
    return np_reduce_elements(loss, **options)


def np_l1(x, t, **options):
    return np_reduce_elements(np.abs(x - t), **options)


SECOND_OPINION = {
    "cross_entropy": np_cross_entropy,
    "nll": np_nll,
    "log_softmax": np_log_softmax,
    "binary_cross_entropy": np_binary_cross_entropy,
    "binary_cross_entropy_with_logits": np_bce_with_logits,
    "multi_label_soft_margin": np_multi_label_soft_margin,
    "sigmoid_focal": np_sigmoid_focal,
    "l1": np_l1,
}


def check(line, loss, arrays, options, want, upstream, grads):
    """Asserts that NumPy agrees with torch on the loss, and its central differences with torch's gradients."""
    second = SECOND_OPINION[loss]
    fields = {k: v for k, v in arrays.items() if k not in ("input", "target")} | options
    point = {"input": arrays["input"], "target": arrays.get("target")}
    size = np.abs(np.nan_to_num(point["input"], neginf=0.0)).max()
    got = second(point["input"], point["target"], **fields)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-14 * max(1.0, size), err_msg=line)
    if size > 1e3:
        return  # a difference of two such losses has no digits left
    if options.get("transform") == "dft":
        return  # its p is a constant, so that the gradient is not the slope of the value
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), line
        direction = np.random.default_rng(0).uniform(0.5, 1.5, grad.shape)
        if loss == "binary_cross_entropy" and name == "input":
            direction = np.where((point[name] == 0.0) | (point[name] == 1.0), 0.0, direction)
        if loss == "l1":
            direction = np.where(point["input"] == point["target"], 0.0, direction)
        step, finite, value = 1e-5, np.isfinite(point[name]), []
        for sign in (1.0, -1.0):
            moved = dict(point)
            moved[name] = np.where(finite, point[name] + sign * step * direction, point[name])
            value.append((second(moved["input"], moved["target"], **fields) * upstream).sum())
        if math.isnan(value[0]):
            assert (grad == 0.0).all(), line  # a mean over no rows
            continue
        difference = (value[0] - value[1]) / (2.0 * step)
        scale = np.abs(grad * direction).sum() + abs(value[0])
        assert abs(difference - (grad * direction).sum()) <= 1e-6 * scale + 1e-9, (line, name, difference)


# Recording


class Record:
    def __init__(self):
        self.lines = [f"torch={torch.__version__.split('+')[0]}"]
        self.tensors = {}

    def add(self, loss, values, note=None, **options):
        """Records one case; `values` holds input, target and weights in the dtypes the crate shall be given."""
        options = {key: value for key, value in options.items() if value is not None}
        number = f"{len(self.lines) - 1:03}"
        fields = {"id": number, "loss": loss} | options | ({"note": note} if note else {})
        line = ";".join(f"{key}={value}" for key, value in fields.items())
        dtype = values["input"].dtype

        wide = {name: widen(loss, name, tensor) for name, tensor in values.items() if tensor is not None}
        x = wide["input"].requires_grad_()
        target = wide.get("target")
        leaves = {"input": x}
        # At an input of 0 or 1 PyTorch's target gradient is infinite although the loss, whose logs are clamped, has a
        # finite slope there: nothing to compare with.
        unclamped = loss == "binary_cross_entropy" and bool(((x == 0.0) | (x == 1.0)).any())
        if target is not None and values["target"].is_floating_point() and not unclamped:
            leaves["target"] = target.requires_grad_()
        more = {name: tensor for name, tensor in wide.items() if name not in ("input", "target")}
        want = ORACLE[loss](x, target, **more, **options)
        upstream = self.upstream(want.shape, dtype if loss == "log_softmax" else F64 if dtype == F64 else F32)
        (want * upstream.to(F64)).sum().backward()
        grads = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
        arrays = {name: tensor.detach().numpy() for name, tensor in wide.items()}
        check(line, loss, arrays, options, want.detach().numpy(), upstream.to(F64).numpy(), grads)

        saved = {name: tensor for name, tensor in values.items() if tensor is not None}
        saved |= {"upstream": upstream, "loss": want.detach(), "grad": x.grad}
        if "target" in leaves:
            saved["target_grad"] = target.grad
        if dtype == F32:
            narrow = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in wide.items()}
            saved["loss32"] = ORACLE[loss](
                narrow.pop("input"), narrow.pop("target", None), **narrow, **options
            ).detach()
        self.lines.append(line)
        for name, tensor in saved.items():
            self.tensors[f"{number}.{name}"] = tensor.detach().clone().contiguous()

    def upstream(self, shape, dtype):
        rng = np.random.default_rng(len(self.lines))
        sign = rng.choice([-1.0, 1.0], shape)
        return torch.tensor(sign * rng.uniform(0.25, 2.0, shape), dtype=F32).to(dtype)

    def save(self, path):
        # One key only: safetensors writes several in no fixed order.
        save_file(self.tensors, path, metadata={"cases": "\n".join(self.lines)})


def widen(loss, name, tensor):
    if name == "ignore_mask" or (
        name == "target" and loss in ("cross_entropy", "nll") and not tensor.is_floating_point()
    ):
        return tensor.long()
    return tensor.to(F64)


class Draw:
    """Random tensors of one case. Those beside an f32 or 16-bit input are exact in f32, where the crate computes."""

    def __init__(self, *seed, wide=False):
        self.rng = np.random.default_rng(seed)
        self.wide = wide

    def tensor(self, array, dtype):
        array = torch.tensor(np.asarray(array, dtype=np.float64))
        return (array if self.wide else array.float()).to(dtype)

    def normal(self, shape, dtype, scale=2.0):
        return self.tensor(scale * self.rng.standard_normal(shape), dtype)

    def uniform(self, shape, dtype, low=0.25, high=2.0):
        return self.tensor(self.rng.uniform(low, high, shape), dtype)

    def index(self, shape, classes, dtype):
        return torch.tensor(self.rng.integers(0, classes, shape)).to(dtype)

    def binary(self, shape, dtype):
        return torch.tensor(self.rng.integers(0, 2, shape)).to(dtype)

    def mixture(self, shape, axis, dtype, normalized):
        """Probability targets; unnormalised rows have sums between 0.3 and 3."""
        array = self.rng.exponential(size=shape)
        array = array / array.sum(axis, keepdims=True)
        if not normalized:
            array = array * self.rng.uniform(0.3, 3.0, array.sum(axis, keepdims=True).shape)
        return self.tensor(array, dtype)


def class_shapes():
    """(C), (N, C), (N, C, d1), (N, C, d1, d2): few rows where there are many classes."""
    for c, n, d in ((1, 5, (2, 3)), (2, 5, (2, 3)), (7, 5, (2, 3)), (33, 3, (1, 2)), (130, 2, (2, 1))):
        yield (c,)
        yield (n, c)
        yield (1 if c == 130 else 2, c, max(d))
        yield (1 if c == 130 else 2, c, *d)


def row_shape(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def class_axis(shape):
    return 1 if len(shape) > 1 else 0


def index_targets(draw, shape, ignore, turn):
    """Targets and the ignore_index option for `ignore`: nothing ignored, rows of -100, or a class that is ignored."""
    rows, c = row_shape(shape), shape[class_axis(shape)]
    if ignore == "rows":
        target = draw.index(rows, c, SIGNED[turn % 2])
        hidden = draw.rng.random(rows) < 0.4
        if rows:
            hidden.reshape(-1)[:2] = True, False
        else:
            hidden = np.asarray(turn % 2 == 0)
        return torch.where(torch.tensor(hidden), torch.tensor(-100, dtype=target.dtype), target), None
    return draw.index(rows, c, UNSIGNED_OR_WIDE[turn % 4]), c // 2 if ignore == "class" else None


def class_weight(draw, classes, dtype, turn):
    """Weights in each float dtype in turn, one of them 0 where there are some to spare."""
    weight = draw.uniform((classes,), (dtype, F32, F64, F16, BF16)[turn % 5])
    if classes > 7:
        weight[classes // 3] = 0.0
    return weight


def class_index_cases(record, loss, smoothings):
    shapes = list(class_shapes())
    grid = itertools.product(DTYPES, (False, True), ("no", "rows", "class"), smoothings, REDUCTIONS)
    for turn, (dtype, weighted, ignore, smoothing, reduction) in enumerate(grid):
        shape = shapes[turn % len(shapes)]
        if ignore == "rows" and len(shape) == 1:
            shape = shapes[(turn + 1) % len(shapes)]  # some rows ignored and some not takes more than one
        draw = Draw(1, len(smoothings), turn, wide=dtype == F64)
        target, ignore_index = index_targets(draw, shape, ignore, turn // 3)
        x = draw.normal(shape, F64)
        values = {
            "input": draw.tensor(F.log_softmax(x, class_axis(shape)) if loss == "nll" else x, dtype),
            "target": target,
            "weight": class_weight(draw, shape[class_axis(shape)], dtype, turn) if weighted else None,
        }
        record.add(loss, values, reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing or None)


def probability_cases(record):
    shapes = list(class_shapes())
    grid = itertools.product(DTYPES, (False, True), (0.0, 0.1, 1.0), REDUCTIONS)
    for turn, (dtype, weighted, smoothing, reduction) in enumerate(grid):
        shape = shapes[turn % len(shapes)]
        draw = Draw(2, turn, wide=dtype == F64)
        target_dtype = F32 if turn % 4 == 3 else dtype
        normalized = turn % 5 < 2
        values = {
            "input": draw.normal(shape, dtype),
            "target": draw.mixture(shape, class_axis(shape), target_dtype, normalized),
            "weight": class_weight(draw, shape[class_axis(shape)], dtype, turn) if weighted else None,
        }
        note = "rows sum to 1" if normalized else "rows do not sum to 1"
        record.add("cross_entropy", values, note, reduction=reduction, label_smoothing=smoothing or None)


def extra_cases(record):
    extras = (
        dict(z_loss=0.01),
        dict(softcap=5.0),
        dict(logit_scale=0.5),
        dict(normalizer=17.5),
        dict(z_loss=0.5, softcap=3.0, logit_scale=1.5, normalizer=4.0),
    )
    shapes = list(class_shapes())
    for turn, (dtype, extra, reduction) in enumerate(itertools.product(DTYPES, extras, REDUCTIONS)):
        # a mean divides by the normalizer, and nothing else does
        extra = {key: value for key, value in extra.items() if key != "normalizer" or reduction == "mean"}
        for probabilities in (False, True):
            # Shapes below 130 classes only: the class count is not what these are about.
            shape = shapes[(turn * 2 + probabilities) % (len(shapes) - 4)]
            axis = class_axis(shape)
            draw = Draw(3, turn, probabilities, wide=dtype == F64)
            if probabilities:
                target, ignore_index = draw.mixture(shape, axis, dtype, turn % 2 == 0), None
            else:
                target, ignore_index = index_targets(draw, shape, ("no", "rows", "class")[turn // 3 % 3], turn)
            values = {
                "input": draw.normal(shape, dtype),
                "target": target,
                "weight": class_weight(draw, shape[axis], dtype, turn) if turn // 2 % 2 else None,
            }
            smoothing = (None, 0.1)[turn // 4 % 2]
            options = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=smoothing)
            record.add("cross_entropy", values, **options, **extra)


ROW_WEIGHT_DTYPES = (F32, torch.uint8, F64, BF16, F16)


def row_weights(draw, shape, turn):
    """Of the rows' shape, or one that broadcasts to it; some are 0, the last one isn't."""
    rows = row_shape(shape)
    rows = rows if turn % 3 else (1,) * (len(rows) > 1) + rows[1:]
    weight = draw.uniform(rows, F64) * torch.tensor(draw.rng.random(rows) < 0.7)
    weight.reshape(-1)[-1] = 1.5
    dtype = ROW_WEIGHT_DTYPES[turn % 5]
    return (weight != 0 if dtype == torch.uint8 else draw.tensor(weight, F64)).to(dtype)


def some_count(target, ignore_index):
    """The last row's class is not the ignored one, nor one of weight 0."""
    target.reshape(-1)[-1] = 0
    return target, ignore_index


def row_weight_cases(record):
    grid = itertools.product(DTYPES, (False, True), (None, 0.1), ("no", "rows", "class"), REDUCTIONS)
    shapes = list(class_shapes())
    for turn, (dtype, weighted, smoothing, ignore, reduction) in enumerate(grid):
        # what is ignored takes several rows, and another class
        fitting = shapes if ignore == "no" else [s for s in shapes if len(s) > 1 and s[1] > 1]
        shape = fitting[turn % len(fitting)]
        axis = class_axis(shape)
        draw = Draw(11, turn, wide=dtype == F64)
        target, ignore_index = some_count(*index_targets(draw, shape, ignore, turn // 3))
        x = draw.normal(shape, F64)
        values = {
            "input": draw.tensor(x, dtype),
            "target": target,
            "weight": class_weight(draw, shape[axis], dtype, turn) if weighted else None,
            "row_weight": row_weights(draw, shape, turn),
        }
        options = dict(reduction=reduction, ignore_index=ignore_index)
        record.add("cross_entropy", values, label_smoothing=smoothing, z_loss=(None, 0.01)[turn % 2], **options)
        if smoothing is None:
            values["input"] = draw.tensor(F.log_softmax(x, axis), dtype)
            record.add("nll", values, **options)
        if ignore == "no":
            values["input"] = draw.normal(shape, dtype)
            values["target"] = draw.mixture(shape, axis, dtype, turn % 2 == 0)
            record.add("cross_entropy", values, label_smoothing=smoothing, reduction=reduction)


def transform_cases(record):
    transforms = (
        dict(transform="focal", parameter=2.0),
        dict(transform="focal", parameter=0.5),
        dict(transform="poly1", parameter=1.5),
        dict(transform="dft"),
        dict(transform="generalized_ce", parameter=0.7),
    )
    # several classes: one alone has n = 0, where torch's focal loss has no slope
    shapes = [shape for shape in class_shapes() if shape[class_axis(shape)] > 1]
    for turn, (dtype, transform, reduction) in enumerate(itertools.product(DTYPES, transforms, REDUCTIONS)):
        shape = shapes[turn % len(shapes)]
        draw = Draw(12, turn, wide=dtype == F64)
        target, ignore_index = some_count(*index_targets(draw, shape, ("no", "class")[turn // 2 % 2], turn))
        values = {
            "input": draw.normal(shape, dtype),
            "target": target,
            "weight": class_weight(draw, shape[class_axis(shape)], dtype, turn) if turn % 3 == 0 else None,
            "row_weight": row_weights(draw, shape, turn) if turn % 2 else None,
        }
        options = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=(None, 0.1)[turn // 3 % 2])
        record.add("cross_entropy", values, **options, **transform)


def special_cases(record):
    for turn, dtype in enumerate(DTYPES):
        draw = Draw(4, turn, wide=dtype == F64)

        for reduction in REDUCTIONS:
            values = {"input": draw.normal((3, 33), dtype), "target": draw.index((3,), 16, torch.int64)}
            values["input"][:, 16:] = -math.inf
            record.add("cross_entropy", values, "-inf logits", reduction=reduction)
            for smoothing in (None, 0.1):
                values = {"input": draw.normal((3, 7), dtype), "target": torch.full((3,), -100)}
                values["weight"] = class_weight(draw, 7, dtype, turn) if smoothing else None
                record.add("cross_entropy", values, "all ignored", reduction=reduction, label_smoothing=smoothing)

        values = {
            "input": draw.tensor([[20, 0, 0], [0, 15, -3], [-1, 1, 11]], dtype),
            "target": torch.tensor([0, 1, 2]),
        }
        record.add("cross_entropy", values, "confident rows", reduction="none")

        common = {F16: 4e4, BF16: 1e6}.get(dtype, 1e8)
        values = {"input": draw.tensor([[common] * 2, [-common] * 2], dtype), "target": torch.tensor([0, 1])}
        record.add("cross_entropy", values, "common offset", reduction="none")


def log_softmax_cases(record):
    turn = 0
    for dtype, shape in itertools.product(DTYPES, ((7,), (2, 130), (2, 33, 2), (2, 3, 2, 5))):
        for dim in range(len(shape)):
            draw = Draw(5, turn, wide=dtype == F64)
            record.add("log_softmax", {"input": draw.normal(shape, dtype)}, dim=dim)
            turn += 1


def bce_cases(record):
    grid = itertools.product(DTYPES, (None, "full", "classes"), REDUCTIONS, (False, True))
    for turn, (dtype, weight, reduction, extremes) in enumerate(grid):
        shape = ((13,), (3, 7), (2, 3, 5))[turn // 2 % 3]
        draw = Draw(6, turn, wide=dtype == F64)
        values = {
            "input": draw.uniform(shape, dtype, 0.02, 0.98),
            "target": draw.uniform(shape, (dtype, dtype, F32, BF16)[turn % 4], 0.0, 1.0),
        }
        if weight is not None:
            values["weight"] = draw.uniform(shape if weight == "full" else shape[-1:], (dtype, F32)[turn % 2])
        if extremes:
            if turn % 3 == 0:
                values["target"] = draw.binary(shape, (dtype, torch.uint8)[turn // 6 % 2])
            ends = torch.tensor([[x, t] for x in (0, 1) for t in (0, 1)])
            values["input"].view(-1)[:4] = ends[:, 0].to(dtype)
            values["target"].view(-1)[:4] = ends[:, 1].to(values["target"].dtype)
        record.add("binary_cross_entropy", values, "extremes" if extremes else None, reduction=reduction)


def bce_with_logits_cases(record):
    shape, flat = (2, 3, 2, 5), (5, 7)
    variants = (
        "hard",
        "soft",
        "weight",
        "full weight",
        "pos_weight",
        "channels",
        "full",
        "smooth",
        "mask",
        "all",
        "far",
    )
    for turn, (dtype, variant, reduction) in enumerate(itertools.product(DTYPES, variants, REDUCTIONS)):
        draw = Draw(7, turn, wide=dtype == F64)
        where = shape if variant in ("channels", "all") else flat
        values = {"input": draw.normal(where, dtype)}
        options = {}
        if variant in ("soft", "pos_weight", "channels", "mask"):
            values["target"] = draw.uniform(where, (dtype, F32, BF16)[turn % 3], 0.0, 1.0)
        else:
            values["target"] = draw.binary(where, (dtype, torch.uint8, torch.uint32, torch.int64, F32)[turn % 5])
        if variant in ("weight", "full weight", "all"):
            values["weight"] = draw.uniform(
                where if variant == "full weight" else where[-1:], (dtype, F32, F64)[turn % 3]
            )
        if variant in ("pos_weight", "channels", "full", "all"):
            per = {"pos_weight": where[-1:], "full": where}.get(variant, (where[1], 1, 1))
            values["pos_weight"] = draw.uniform(per, (dtype, F16, F32)[turn % 3], 0.25, 4.0)
        if variant in ("mask", "all"):
            values["ignore_mask"] = draw.binary(where, torch.uint8)
        if variant in ("smooth", "all"):
            options["label_smoothing"] = (0.1, 0.2)[variant == "all"]
        if variant == "far":
            far = [8.0, 17.0, -89.0, 1e4, -1e4, 0.0, -8.0, -17.0, 89.0, -30.0]
            values["input"] = draw.tensor([[v, v] for v in far], dtype)
            values["target"] = torch.tensor([[0, 1]] * len(far)).to(values["target"].dtype)
        record.add("binary_cross_entropy_with_logits", values, variant, reduction=reduction, **options)


def multi_label_cases(record):
    grid = itertools.product(DTYPES, (False, True), ((5,), (2, 33), (2, 3, 7)), REDUCTIONS)
    for turn, (dtype, weighted, shape, reduction) in enumerate(grid):
        draw = Draw(8, turn, wide=dtype == F64)
        soft = draw.uniform(shape, dtype, 0.0, 1.0)
        values = {
            "input": draw.normal(shape, dtype),
            "target": soft if turn % 3 == 1 else draw.binary(shape, (dtype, F32, torch.uint8, torch.int64)[turn % 4]),
            "weight": draw.uniform(shape[-1:], (dtype, F32)[turn % 2]) if weighted else None,
        }
        record.add("multi_label_soft_margin", values, reduction=reduction)


def focal_cases(record):
    grid = itertools.product(DTYPES, (None, -1.0), (0.0, 0.5, None, 5.0), REDUCTIONS)
    for turn, (dtype, alpha, gamma, reduction) in enumerate(grid):
        alpha = 0.6 if alpha is None and turn % 5 == 0 else alpha
        shape = ((3, 7), (19,), (2, 3, 5))[turn // 3 % 3]
        draw = Draw(9, turn, wide=dtype == F64)
        values = {"input": draw.normal(shape, dtype)}
        if turn % 4 == 1:
            values["target"] = draw.uniform(shape, dtype, 0.0, 1.0)
        else:
            values["target"] = draw.binary(shape, (dtype, F32, torch.uint8, torch.int64)[turn % 4])
        if turn % 2:
            values["input"].view(-1)[:4] = torch.tensor([17.0, -17.0, 60.0, -60.0]).to(dtype)
        record.add("sigmoid_focal", values, reduction=reduction, alpha=alpha, gamma=gamma)


def l1_cases(record):
    variants = ("plain", "weight", "mask", "integers")
    for turn, (dtype, variant, reduction) in enumerate(itertools.product(DTYPES, variants, REDUCTIONS)):
        shape = ((3, 7), (19,), (2, 3, 5))[turn // 3 % 3]
        draw = Draw(10, turn, wide=dtype == F64)
        values = {"input": draw.normal(shape, dtype)}
        if variant == "integers":
            values["target"] = draw.index(shape, 5, UNSIGNED_OR_WIDE[turn % 4])
        else:
            values["target"] = draw.normal(shape, (dtype, F32, BF16)[turn % 3])
        # where they are equal the slope is 0
        values["input"].view(-1)[:2] = torch.tensor([1.0, 3.0]).to(dtype)
        values["target"].view(-1)[:2] = torch.tensor([1, 3]).to(values["target"].dtype)
        if variant == "weight":
            values["weight"] = draw.uniform(shape if turn % 2 else shape[-1:], (dtype, F32)[turn % 2])
        if variant == "mask":
            values["ignore_mask"] = draw.binary(shape, torch.uint8)
        record.add("l1", values, variant, reduction=reduction)


def element_option_cases(record):
    losses = (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "multi_label_soft_margin",
        "sigmoid_focal",
        "l1",
    )
    variants = (
        *(("weight and mask", reduction) for reduction in (*REDUCTIONS, "batchmean")),
        ("plain", "batchmean"),
        ("mask", "mean"),
        ("normalizer", "mean"),
        ("all", "mean"),
    )
    for turn, (loss, dtype, (variant, reduction)) in enumerate(itertools.product(losses, DTYPES, variants)):
        shape = ((4, 7), (19,), (2, 3, 5))[turn % 3]
        draw = Draw(11, turn, wide=dtype == F64)
        x = draw.uniform(shape, dtype, 0.02, 0.98) if loss == "binary_cross_entropy" else draw.normal(shape, dtype)
        values = {"input": x, "target": draw.binary(shape, (dtype, torch.uint8, F32, torch.int64)[turn % 4])}
        if variant in ("weight and mask", "all"):
            classes = loss == "multi_label_soft_margin" or turn % 2
            values["weight"] = draw.uniform(shape[-1:] if classes else shape, (dtype, F32)[turn // 2 % 2])
        if variant in ("weight and mask", "mask", "all"):
            # of elements, of rows or of columns; always with something left, and of rows one without anything
            mask = draw.binary((shape, (*shape[:-1], 1), shape[-1:])[turn // 3 % 3], torch.uint8)
            if len(shape) > 1 and mask.dim() > 1:
                mask[-1] = 0
            mask.view(-1)[0] = 1
            values["ignore_mask"] = mask
        normalizer = 5.5 if variant in ("normalizer", "all") else None
        record.add(loss, values, variant, reduction=reduction, normalizer=normalizer)


def main():
    torch.set_num_threads(1)
    record = Record()
    class_index_cases(record, "cross_entropy", (0.0, 0.1, 1.0))
    probability_cases(record)
    extra_cases(record)
    special_cases(record)
    row_weight_cases(record)
    transform_cases(record)
    class_index_cases(record, "nll", (0.0,))
    log_softmax_cases(record)
    bce_cases(record)
    bce_with_logits_cases(record)
    multi_label_cases(record)
    focal_cases(record)
    l1_cases(record)
    element_option_cases(record)
    path = Path(__file__).with_name("pytorch.safetensors")
    record.save(path)
    print(f"{len(record.lines) - 1} cases, {len(record.tensors)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
