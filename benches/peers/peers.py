#!/usr/bin/env python3
"""The same losses in PyTorch, eager and compiled, and on a GPU in Liger-Kernel, QuACK and cut-cross-entropy.

    python3 benches/peers/peers.py --quick --out /tmp/peers     a minute, to see that it runs
    python3 benches/peers/peers.py --threads 2                  the CPU
    python3 benches/peers/peers.py --time-budget 300            a GPU, if PyTorch sees one

The shapes, the method and the columns are those of the bench `report`; see README.md. What cannot be imported, compiled or
run is listed at the end, with the reason.
"""

import argparse
import csv
import datetime
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

COLUMNS = (
    "date,device,driver,toolkit,versions,threads,implementation,loss,pass,dtype,shape,p20_us,p50_us,p80_us,bytes,"
    "bytes_formula,gb_per_s,share_of_copy,peak_bytes,method"
).split(",")
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
ROWS = {"cross_entropy", "nll", "log_softmax"}
MAX_SETS, MIN_SAMPLES, MAX_SAMPLES = 16, 5, 51


def cases(cuda, quick):
    """As `cases` in benches/common/case.rs, what matters most first; and linear cross-entropy on a GPU."""
    ce, bce = "cross_entropy", "binary_cross_entropy_with_logits"
    if quick:
        losses = [ce, bce, "log_softmax", "nll", "cross_entropy_probabilities", "sigmoid_focal", "binary_cross_entropy",
                  "multi_label_soft_margin"]
        return [(loss, "f32", s) for loss in losses for s in [(64, 10), (16, 1000)]]
    found = []

    def add(losses, dtypes, shapes):
        found.extend((loss, dtype, shape) for loss in losses for shape in shapes for dtype in dtypes)

    if cuda:
        add([ce], ["bf16"], [(4096, 32000), (8192, 128256), (16384, 50257), (65536, 1000), (32768, 256)])
        add([ce], ["f32"], [(4096, 32000), (65536, 1000)])
        add([bce], ["f32"], [(8192, 8192)])
        add(["linear_cross_entropy"], ["bf16"], [(8192, 4096, 128256)])
        add([ce], ["bf16"], [(64, 1000), (1, 2), (32768, 1024), (32768, 4096), (16384, 16384)])
        add([ce], ["bf16"], [(8192, 65536), (8192, 262144), (65536, 10), (8, 128256)])
        add([bce], ["bf16"], [(8192, 8192)])
        add([bce], ["f32"], [(64, 1000), (1, 2)])
        add(["log_softmax", "nll", "cross_entropy_probabilities"], ["bf16"], [(4096, 32000), (65536, 1000)])
        add(["sigmoid_focal", "binary_cross_entropy", "multi_label_soft_margin"], ["f32"], [(8192, 8192)])
    else:
        add([ce], ["f32"], [(2048, 32000), (65536, 1000), (32768, 256)])
        add([bce], ["f32"], [(4096, 4096)])
        add([ce], ["f32"], [(1, 2), (64, 10), (64, 1000), (65536, 10), (4, 128256)])
        add([bce], ["f32"], [(1, 2), (64, 10), (64, 1000), (1024, 1000)])
        add([ce], ["bf16"], [(2048, 32000), (65536, 1000), (32768, 256)])
        add([ce], ["f32"], [(1 << 22, 2), (1 << 17, 64), (1 << 15, 257), (1 << 13, 1024), (1 << 11, 4096)])
        add([ce], ["f32"], [(1 << 9, 16384), (166, 50257), (64, 131072)])
        add([bce], ["bf16"], [(4096, 4096)])
        for loss in ["log_softmax", "nll", "cross_entropy_probabilities"]:
            add([loss], ["f32"], [(512, 32000), (16384, 1000), (64, 1000), (1, 2)])
        for loss in ["sigmoid_focal", "binary_cross_entropy", "multi_label_soft_margin"]:
            add([loss], ["f32"], [(2048, 2048), (64, 1000), (1, 2)])
        add([ce], ["f16", "f64"], [(512, 32000)])
    return found


def minimum_bytes(loss, gradient, dtype, shape):
    """As `Case::bytes`: the gradient's bytes are those of forward and backward, which read everything twice."""
    size = DTYPES[dtype].itemsize
    if loss == "linear_cross_entropy":
        n, d, v = shape
        operands = (n * d + v * d) * size
        return (3 * operands + 8 * n, "3(ND+VD)+8N") if gradient else (operands + 4 * n, "ND+VD+4N")
    n, v = shape
    e, index, picked = n * v * size, 4 * n, n * size
    if loss == "cross_entropy":
        return (3 * e + 2 * index, "3E+8N") if gradient else (e + index, "E+4N")
    if loss == "nll":
        return (e + picked + 2 * index, "E+E/V+8N") if gradient else (picked + index, "E/V+4N")
    return (5 * e, "5E") if gradient else (2 * e, "2E")


def focal(x, t, alpha=0.25, gamma=2.0):
    """torchvision.ops.sigmoid_focal_loss, the mean."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = ce * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    return ((alpha * t + (1 - alpha) * (1 - t)) * loss).mean()


TORCH = {
    "cross_entropy": F.cross_entropy,
    "cross_entropy_probabilities": F.cross_entropy,
    "nll": F.nll_loss,
    "log_softmax": lambda x, t: torch.log_softmax(x, 1),
    "binary_cross_entropy": F.binary_cross_entropy,
    "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
    "multi_label_soft_margin": F.multilabel_soft_margin_loss,
    "sigmoid_focal": focal,
    "linear_cross_entropy": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
}


def implementations(cuda, problems):
    """Name -> loss -> function. What cannot be imported is noted in `problems`."""
    found = {"torch": TORCH, "torch.compile": {}}
    versions = [f"torch {torch.__version__}"]

    def peer(name, module, package, functions):
        try:
            found[name] = functions()
            from importlib.metadata import version

            versions.append(f"{package} {version(package)}")
        except Exception as e:  # whatever a missing or misfitting package raises
            problems.append(f"{name}: import of {module} failed: {type(e).__name__}: {first_line(e)}")

    def liger():
        from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

        return {
            "cross_entropy": liger_cross_entropy,
            "linear_cross_entropy": liger_fused_linear_cross_entropy,
        }

    def quack():
        from quack.cross_entropy import cross_entropy

        return {"cross_entropy": lambda x, t: cross_entropy(x, t, reduction="mean")}

    def cce():
        from cut_cross_entropy import linear_cross_entropy

        return {"linear_cross_entropy": linear_cross_entropy}

    if cuda:
        peer("liger", "liger_kernel", "liger-kernel", liger)
        peer("quack", "quack", "quack-kernels", quack)
        peer("cce", "cut_cross_entropy", "cut-cross-entropy", cce)
    return found, "; ".join(versions)


def first_line(e):
    return (str(e).strip().splitlines() or [""])[0][:200]


def function_of(table, name, loss):
    if name != "torch.compile":
        return table[name].get(loss)
    torch._dynamo.reset()
    return torch.compile(TORCH[loss], dynamic=False)


class Machine:
    def __init__(self, device):
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        if self.cuda:
            properties = torch.cuda.get_device_properties(0)
            self.name, self.cache = properties.name, properties.L2_cache_size
            self.flush = torch.zeros(max(96 << 20, 3 * self.cache // 4), dtype=torch.int32, device="cuda")
            self.toolkit = f"CUDA {torch.version.cuda}"
            self.driver = command(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        else:
            self.name, self.cache = cpu_name(), cpu_cache()
            self.toolkit = f"Python {platform.python_version()}"
            self.driver = f"linux {platform.release()}"

    def time(self, work, count=1, first=0):
        """Microseconds a call. On a GPU by events, after a read of more than the cache: it leaves nothing to be written back,
        and the host enqueues meanwhile."""
        if self.cuda:
            self.flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(first, first + count):
                work(i)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3 / count
        start = time.perf_counter()
        for i in range(first, first + count):
            work(i)
        return (time.perf_counter() - start) * 1e6 / count

    def calls(self, us):
        if self.cuda:
            return 1 if us < 30 else max(1, min(8, int(500 / us)))
        return max(1, min(2000, int(500 / us)))

    def copy(self, quick):
        """Bytes read and written, and the times."""
        size = (16 << 20) if quick else (1 << 30) if self.cuda else max(256 << 20, 8 * self.cache)
        a, b = (torch.zeros(size // 8, dtype=torch.int64, device=self.device) for _ in range(2))
        a.random_()
        b.copy_(a)
        rounds, count = (5, 1) if quick else (21, 4 if self.cuda else 1)
        return 2 * size, [self.time(lambda i: b.copy_(a), count) for _ in range(rounds)]


def command(arguments):
    try:
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def cpu_name():
    info = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M))
    name = info.get("model name", platform.machine())
    if not re.search(r"\d", name) and "cpu family" in info:
        name += f" family {info['cpu family']} model {info['model']}"
    return name


def cpu_cache():
    sizes = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=32 << 20)


def inputs(loss, dtype, shape, machine):
    """As many sets as push each other out of the cache. The first of each is what the gradient is of."""
    kind = {"dtype": DTYPES[dtype], "device": machine.device}
    n, v = shape[0], shape[-1]
    sets = max(1, min(MAX_SETS, -(-3 * machine.cache // (n * v * DTYPES[dtype].itemsize))))

    def one():
        if loss == "linear_cross_entropy":
            hidden, weight = torch.randn(n, shape[1], **kind), torch.randn(v, shape[1], **kind) / shape[1] ** 0.5
            return [hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), device=machine.device)]
        x = torch.randn(n, v, **kind) * 2
        if loss == "binary_cross_entropy":
            x = x.sigmoid().clamp(0.01, 0.99)
        if loss == "nll":
            x = x.abs().neg() - 0.5
        if loss in ROWS:
            t = torch.randint(v, (n,), device=machine.device)
        elif loss == "cross_entropy_probabilities":
            t = torch.rand(n, v, **kind) * (2 / v)
        else:
            t = torch.randint(2, (n, v), device=machine.device).to(kind["dtype"])
        return [x.requires_grad_(), t]

    return [one() for _ in range(1 if loss == "linear_cross_entropy" else sets)]


def work_of(function, loss, gradient, sets):
    def forward(i):
        with torch.no_grad():
            return function(*sets[i % len(sets)])

    def step(i):
        arguments = sets[i % len(sets)]
        y = function(*arguments)
        return torch.autograd.grad(y, arguments[:-1], None if y.dim() == 0 else torch.ones_like(y))

    return step if gradient else forward


def quantiles(samples):
    s = sorted(samples)
    return [s[round((len(s) - 1) * q)] for q in (0.2, 0.5, 0.8)]


def measure(machine, table, loss, dtype, shape, gradient, seconds, problems, label):
    """[(implementation, [p20, p50, p80], method, peak bytes or None)], measured in turns."""
    sets = inputs(loss, dtype, shape, machine)
    contenders = []
    reference = None
    for name in table:
        try:
            function = function_of(table, name, loss)
            if function is None:
                continue
            started = time.perf_counter()
            if not gradient and loss != "linear_cross_entropy":
                value = work_of(function, loss, False, sets)(0).float().mean().item()
                reference = value if reference is None else reference
                if abs(value - reference) > 0.02 * abs(reference) + 0.02:
                    problems.append(f"{name} {label}: {value}, where torch has {reference}")
            work = work_of(function, loss, gradient, sets)
            work(0)  # compiles
            if machine.cuda:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                work(0)
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
            else:
                peak = None
            # past what runs slower at first: a compiled function's second call, clocks, inputs that are in no cache yet
            us = 1e6
            began = time.perf_counter()
            for i in range(1, 2 * len(sets) + 1) if began - started < 60 else ():
                if i > 2 and time.perf_counter() - began > seconds / 10:
                    break
                us = min(us, machine.time(work, 1, i))
            contenders.append([name, work, machine.calls(us), us, [], peak])
        except Exception as e:  # a peer that fails is listed, the others go on
            problems.append(f"{name} {label}: {type(e).__name__}: {first_line(e)}")
    started = time.perf_counter()
    for r in range(MAX_SAMPLES):
        for name, work, calls, us, samples, _ in contenders:
            needed = 1 if us > seconds * 1e5 else MIN_SAMPLES
            if r < needed or time.perf_counter() - started < seconds:
                if us < 5e4 and not machine.cuda:
                    machine.time(work, calls, 3 + r * calls)  # timed as in a loop, whatever ran before
                samples.append(machine.time(work, calls, 3 + r * calls))
    clock = "events" if machine.cuda else "host"
    return [(name, quantiles(s), f"{clock} {len(s)}x{calls}", peak) for name, _, calls, _, s, peak in contenders]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small cases only")
    parser.add_argument("--filter", default="", help="only cases whose loss/dtype/shape contains one of these, by commas")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "results")
    parser.add_argument("--device", choices=["best", "cpu", "cuda"], default="best")
    parser.add_argument("--time-budget", type=float, default=1800, help="seconds")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--without", default="", help="implementations to leave out, by commas")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or (options.device == "best" and torch.cuda.is_available())
    machine = Machine("cuda" if cuda else "cpu")
    problems = []
    table, versions = implementations(cuda, problems)
    for name in filter(None, options.without.split(",")):
        table.pop(name, None)
    print(f"{machine.name}, {torch.get_num_threads()} threads, {versions}")
    for problem in problems:
        print(problem)

    options.out.mkdir(parents=True, exist_ok=True)
    slug = "-".join(re.findall("[a-z0-9]+", machine.name.lower()))
    path = options.out / f"{slug}.peers.csv"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    head = [today, machine.name, machine.driver, machine.toolkit, versions, torch.get_num_threads()]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)

        def row(what, times, size, formula, copy_rate, peak, method):
            rate = size / times[1] / 1e3
            share = f"{rate / copy_rate:.4f}" if copy_rate else ""
            numbers = [f"{t:.3f}" for t in times]
            fields = head + what + numbers + [size, formula, f"{rate:.3f}", share, "" if peak is None else peak, method]
            writer.writerow([str(f).replace(",", " ") for f in fields])
            file.flush()
            return rate, share

        size, samples = machine.copy(options.quick)
        times = quantiles(samples)
        copy_rate, _ = row(["memory", "-", "copy", "-", size], times, size, "read+written", None, None, "torch copy_")
        print(f"copy {copy_rate:.1f} GB/s")
        wanted = [f for f in options.filter.split(",") if f]
        selected = cases(cuda, options.quick)
        selected = [(c, f"{c[0]}/{c[1]}/{'x'.join(map(str, c[2]))}") for c in selected]
        names = {name for _, name in selected}
        selected = [
            (c, name) for c, name in selected if not wanted or any(name == f if f in names else f in name for f in wanted)
        ]
        for i, ((loss, dtype, shape), name) in enumerate(selected):
            left = options.time_budget - (time.perf_counter() - started)
            if left < 2:
                problems.append(f"left out, the time budget being spent: {name}")
                continue
            seconds = min(left / (len(selected) - i), 0.2 if options.quick else 40) / 2
            for gradient in (False, True):
                label = "forward+backward" if gradient else "forward"
                try:
                    results = measure(
                        machine, table, loss, dtype, shape, gradient, seconds, problems, f"{name} {label}"
                    )
                except Exception as e:
                    problems.append(f"{name} {label}: {type(e).__name__}: {first_line(e)}")
                    continue
                size, formula = minimum_bytes(loss, gradient, dtype, shape)
                what = [loss, label, dtype, "x".join(map(str, shape))]
                for implementation, times, method, peak in results:
                    rate, share = row([implementation] + what, times, size, formula, copy_rate, peak, method)
                    print(f"{name:<52} {implementation:<14} {label:<17} {times[1]:>11.2f} us {rate:>8.1f} GB/s {share}")
                    sys.stdout.flush()
    for problem in problems:
        print("not measured:", problem)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
