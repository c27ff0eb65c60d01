#!/usr/bin/env python3
"""Times the same losses in PyTorch, eager and compiled, and on a GPU in Liger-Kernel, QuACK and cut-cross-entropy.

    python3 benches/peers/peers.py --device cuda|cpu [--threads N] [--without names,by,comma] [--fresh-memory]
    python3 benches/peers/peers.py --check --device cuda        what can be imported, and whether it runs

The first form is a server that the bench `report` starts and asks case by case, so that the peers of a case are timed
on the same device right beside this crate's kernels. It reads requests and writes answers, one line of JSON each. The
first line that it writes says what there is:

    {"implementations": ["torch", "torch.compile"], "versions": "torch 2.11.0", "problems": ["quack: import of ..."]}

then for each request

    {"loss": "cross_entropy", "dtype": "bf16", "layout": "rows", "shape": [4096, 32000], "pass": "forward",
     "seconds": 3.0, "without": ["torch.compile"]}

one answer

    {"results": [{"implementation": "torch", "us": [19.8, 20.1, 20.9], "samples": 51, "calls": 4, "clock": "events",
     "peak_bytes": 123, "sm_mhz": 1980}], "problems": ["liger cross_entropy/...: ValueError: ..."]}

`us` are the 20th, 50th and 80th percentile of the samples, in microseconds a call; the clock is "events", "host" or
"graph"; `sm_mhz` is the clock of the GPU's multiprocessors afterwards, or null. What cannot be imported, compiled or run
is a problem and never the end of the server; without PyTorch all answers are empty. The method is that of `report`, and
described in ../README.md. Everything else that is printed, also by the libraries, goes to stderr.

layouts: "rows" is [n, v]. "shifted" is [batch, length, v], the logits of all but the last of length+1 positions, as
language models take them. "image" is [n, c, h, w], the classes in the second dimension. "linear" is [n, d, v]: n rows
of d features, and a weight of v classes.

passes: "forward", without a graph. "forward+backward". "backward", with the forward outside of the time; only of
PyTorch, as others compute the gradient in the forward. "target_gradient", the same for the target, where that is
probabilities. "host_call": what the host takes to start one forward.
"""

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import pathlib
import re
import resource
import sys
import time
from importlib import metadata

MAX_SETS, MIN_SAMPLES, MAX_SAMPLES = 16, 5, 51
# Logits of up to so many bytes are timed in replays of a CUDA graph too, as in `report`.
REPLAYED_BYTES = 32 << 20
# What compiling may take in one request, in seconds: after that nothing more is compiled, as the asking side gives up.
COMPILING = 60
SOFTCAP = 30.0
LABEL_SMOOTHING = 0.1
# What glibc reads when a program starts: the same that `keep_memory` sets in the asking one.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_ARENA_MAX": "1"}
# Seconds after which samples count even if the heap still grows.
SETTLING = 4.0

INDEXED = {"cross_entropy", "cross_entropy_softcap", "cross_entropy_smoothing", "nll", "log_softmax"}
RANKS = {"rows": 2, "shifted": 3, "image": 4, "linear": 3}
PASSES = ("forward", "forward+backward", "backward", "target_gradient", "host_call")
# Those that go through a graph again and again.
BACKWARD = ("backward", "target_gradient")
# name -> (package, module)
PEERS = {
    "liger": ("liger-kernel", "liger_kernel"),
    "quack": ("quack-kernels", "quack"),
    "cce": ("cut-cross-entropy", "cut_cross_entropy"),
}

torch = F = None


def import_torch():
    global torch, F
    import torch as imported
    import torch.nn.functional as functional

    torch, F = imported, functional


def focal(x, t, alpha=0.25, gamma=2.0):
    """torchvision.ops.sigmoid_focal_loss, the mean."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = ce * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    return ((alpha * t + (1 - alpha) * (1 - t)) * loss).mean()


def torch_functions():
    return {
        "cross_entropy": F.cross_entropy,
        "cross_entropy_softcap": lambda x, t: F.cross_entropy(SOFTCAP * torch.tanh(x / SOFTCAP), t),
        "cross_entropy_smoothing": lambda x, t: F.cross_entropy(x, t, label_smoothing=LABEL_SMOOTHING),
        "cross_entropy_probabilities": F.cross_entropy,
        "nll": F.nll_loss,
        "log_softmax": lambda x, t: torch.log_softmax(x, 1),
        "binary_cross_entropy": F.binary_cross_entropy,
        "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
        "multi_label_soft_margin": F.multilabel_soft_margin_loss,
        "sigmoid_focal": focal,
        "linear_cross_entropy": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    }


def peer_functions(name, problems):
    """Loss -> function, of one of PEERS. A part of it that cannot be imported is a problem, all of it an exception."""
    if name == "liger":
        from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

        return {
            "cross_entropy": liger_cross_entropy,
            "cross_entropy_softcap": lambda x, t: liger_cross_entropy(x, t, softcap=SOFTCAP),
            "cross_entropy_smoothing": lambda x, t: liger_cross_entropy(x, t, label_smoothing=LABEL_SMOOTHING),
            "linear_cross_entropy": liger_fused_linear_cross_entropy,
        }
    if name == "quack":
        from quack.cross_entropy import cross_entropy

        found = {"cross_entropy": lambda x, t: cross_entropy(x, t, reduction="mean")}
        try:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            # `tuned` would try out many tiles of its products where they have to be general ones: minutes of compiling
            found["linear_cross_entropy"] = lambda x, w, t: chunked_linear_cross_entropy(x, w, t, tuned=False)
        except Exception as e:
            problems.append(f"quack: import of quack.linear_cross_entropy failed: {describe(e)}")
        return found
    from cut_cross_entropy import linear_cross_entropy

    return {"linear_cross_entropy": linear_cross_entropy}


def functorch_config():
    import torch._functorch.config as config

    return config


def describe(e):
    """The first line of an exception, without colours."""
    line = (re.sub("\x1b\\[[0-9;]*m", "", str(e)).strip().splitlines() or [""])[0][:200]
    return f"{type(e).__name__}: {line}"


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def page_faults():
    """The pages that this process has been given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def cpu_cache():
    sizes = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=32 << 20)


class Machine:
    def __init__(self, device):
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        self.flush = None
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else cpu_cache()

    def prepare(self):
        if self.cuda:
            self.flush = torch.zeros(max(96 << 20, 3 * self.cache // 4), dtype=torch.int32, device="cuda")

    def release(self):
        """Gives back all memory of the GPU: the asking process needs it."""
        self.flush = None
        if self.cuda:
            torch.cuda.synchronize()
            torch._dynamo.reset()
            gc.collect()
            clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
            if clear is not None:
                clear()
            torch.cuda.empty_cache()

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def sm_mhz(self):
        try:
            return torch.cuda.clock_rate() if self.cuda else None
        except Exception:  # without the package nvidia-ml-py, or where the driver does not say
            return None

    def time(self, work, count=1, first=0):
        """Microseconds a call. On a GPU by events, after a read of more than the cache: it leaves nothing to be written
        back, and the host enqueues meanwhile."""
        if self.cuda:
            self.flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(first, first + count):
                work(i)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3 / count
        return self.host_time(work, count, first)

    def host_time(self, work, count=1, first=0):
        """Microseconds of the host a call, which on a GPU are those of starting it."""
        start = time.perf_counter()
        for i in range(first, first + count):
            work(i)
        elapsed = time.perf_counter() - start
        self.synchronize()
        return elapsed * 1e6 / count

    def calls(self, us, kind):
        """The calls of one sample."""
        if kind == "host_call":
            # so few that the queue to the GPU does not fill up: then the host would wait
            return max(1, min(200, int((2000 if self.cuda else 500) / us)))
        if self.cuda:
            return 1 if us < 30 else max(1, min(8, int(500 / us)))
        return max(1, min(2000, int(500 / us)))


class Case:
    def __init__(self, request):
        self.loss, self.dtype_name = str(request["loss"]), str(request["dtype"])
        self.layout, self.kind = str(request["layout"]), str(request["pass"])
        self.shape = [int(size) for size in request["shape"]]
        self.seconds = float(request["seconds"])
        dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
        if self.layout not in RANKS or len(self.shape) != RANKS[self.layout]:
            raise ValueError(f"layout {self.layout} with shape {self.shape}")
        if (self.layout == "linear") != (self.loss == "linear_cross_entropy"):
            raise ValueError(f"loss {self.loss} in layout {self.layout}")
        if self.kind not in PASSES:
            raise ValueError(f"pass {self.kind}")
        if self.kind == "target_gradient" and self.loss != "cross_entropy_probabilities":
            raise ValueError(f"loss {self.loss}, whose target has no gradient")
        self.dtype = dtypes[self.dtype_name]

    def __str__(self):
        shape = "x".join(map(str, self.shape))
        return f"{self.loss}/{self.dtype_name}/{'' if self.layout == 'rows' else self.layout + '/'}{shape} {self.kind}"

    def input_bytes(self):
        """Those of the logits; of a linear layer's input and weight, as it need not store the logits."""
        n, *_, v = self.shape
        numbers = (n + v) * self.shape[1] if self.layout == "linear" else math.prod(self.shape)
        return numbers * self.dtype.itemsize

    def inputs(self, machine):
        """As many sets as push each other out of the cache. The last of each is the target, which gets no gradient."""
        sets = max(1, min(MAX_SETS, -(-3 * machine.cache // max(1, self.input_bytes()))))
        return [self.input_set(machine.device) for _ in range(sets)]

    def input_set(self, device):
        kind = {"dtype": self.dtype, "device": device}
        if self.layout == "linear":
            n, d, v = self.shape
            hidden, weight = torch.randn(n, d, **kind), torch.randn(v, d, **kind).div_(d**0.5)
            return [hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), device=device)]
        classes = 1 if self.layout == "image" else -1
        logits = list(self.shape)
        if self.layout == "shifted":
            logits[1] += 1
        x = torch.randn(logits, **kind).mul_(2)
        if self.loss == "binary_cross_entropy":
            x = x.sigmoid_().clamp_(0.01, 0.99)
        if self.loss == "nll":
            x = x.abs_().neg_().sub_(0.5)
        if self.loss in INDEXED:
            indices = [size for i, size in enumerate(self.shape) if i != classes % len(self.shape)]
            t = torch.randint(self.shape[classes], indices, device=device)
        elif self.loss == "cross_entropy_probabilities":
            t = torch.rand(self.shape, **kind).mul_(2 / self.shape[classes])
        else:
            t = torch.randint(2, self.shape, device=device).to(self.dtype)
        return [x.requires_grad_(), t]

    def function(self, function):
        """With what the layout asks for before it: a part of the positions, as rows."""
        if self.layout != "shifted":
            return function
        v = self.shape[-1]

        def shifted(x, t):
            t = t.reshape(-1) if self.loss in INDEXED else t.reshape(-1, v)
            return function(x[:, :-1].reshape(-1, v), t)

        return shifted

    def work(self, function, sets):
        """The call that is timed, of the i-th set; it returns the loss."""
        if self.kind in ("forward", "host_call"):
            # detached, because Liger-Kernel asks the logits whether they want a gradient, not whether there is a graph
            without_graph = [[x.detach() for x in arguments] for arguments in sets]

            def forward(i):
                with torch.no_grad():
                    return function(*without_graph[i % len(sets)])

            return forward

        def ones(y):
            return None if y.dim() == 0 else torch.ones_like(y)

        if self.kind == "forward+backward":

            def step(i):
                arguments = sets[i % len(sets)]
                y = function(*arguments)
                torch.autograd.grad(y, arguments[:-1], ones(y))
                return y

            return step

        if self.kind == "target_gradient":
            sets = [[x.detach(), t.detach().requires_grad_()] for x, t in sets]
        wanted = [[x for x in arguments if x.requires_grad] for arguments in sets]
        graphs = [function(*arguments) for arguments in sets]
        gradients = [ones(y) for y in graphs]

        def backward(i):
            i %= len(sets)
            torch.autograd.grad(graphs[i], wanted[i], gradients[i], retain_graph=True)
            return graphs[i]

        return backward


class Contender:
    """One of those that are compared, with what its samples need."""

    def __init__(self, name, work, clock, calls=1, us=0.0, peak=None):
        self.name, self.work, self.clock, self.calls, self.us, self.peak = name, work, clock, calls, us, peak
        self.samples = []

    def sample(self, machine, r):
        """Microseconds a call, and the pages that they got."""
        if self.clock == "graph":
            return machine.time(self.work) / self.calls, 0
        timed = machine.host_time if self.clock == "host" else machine.time
        if self.clock == "host" and self.us < 5e4:
            # timed as in a loop, whatever ran before
            timed(self.work, self.calls, 3 + r * self.calls)
        pages = page_faults()
        us = timed(self.work, self.calls, 3 + r * self.calls)
        return us, page_faults() - pages


class Server:
    def __init__(self, options):
        self.cuda = options.device == "cuda"
        self.machine = None
        self.tables = {}
        self.versions = []
        self.problems = []
        self.lost = False
        self.keeps_memory = not self.cuda and not options.fresh_memory
        without = set(filter(None, options.without.split(",")))
        try:
            import_torch()
        except Exception as e:
            self.problems.append(f"torch: import of torch failed: {describe(e)}")
            return
        self.versions.append(f"torch {torch.__version__}")
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            self.machine = Machine(options.device)
        except Exception as e:
            self.problems.append(f"torch: {options.device} cannot be used: {describe(e)}")
            return
        self.tables = {"torch": torch_functions(), "torch.compile": torch_functions()}
        if self.cuda:
            self.tables["torch-graph"] = torch_functions()
        for name, (package, module) in PEERS.items() if self.cuda else ():
            if name in without:
                continue
            try:
                self.tables[name] = peer_functions(name, self.problems)
                self.versions.append(f"{package} {version(package)}")
            except Exception as e:  # whatever a missing or misfitting package raises
                self.problems.append(f"{name}: import of {module} failed: {describe(e)}")
        self.tables = {name: table for name, table in self.tables.items() if name not in without}

    def hello(self):
        versions = "; ".join(self.versions).replace(",", " ")
        return {"implementations": list(self.tables), "versions": versions, "problems": self.problems}

    def answer(self, line):
        problems, results = [], []
        if self.machine is None:
            return {"results": results, "problems": problems}
        what = line.strip()[:120]
        try:
            request = json.loads(line)
            case = Case(request)
            what = str(case)
            without = request.get("without") or ()
            results = self.measure(case, [name for name in self.tables if name not in without], problems)
        except Exception as e:
            problems.append(f"{what}: {describe(e)}")
        try:
            self.machine.release()
        except Exception as e:  # an access out of bounds, say: nothing runs on this context any more
            problems.append(f"{what}: the CUDA context was lost: {describe(e)}")
            self.lost = True
        return {"results": results, "problems": problems}

    def measure(self, case, names, problems):
        """What is compared is measured in turns."""
        machine = self.machine
        machine.prepare()
        sets = case.inputs(machine)
        contenders, reference = [], None
        spent, asked = 0.0, time.perf_counter()
        # a compiled backward may otherwise write over what the forward kept, and then runs only once
        with functorch_config().patch(donated_buffer=False) if case.kind in BACKWARD else contextlib.nullcontext():
            for name in names:
                try:
                    function = self.function_of(name, case)
                    if function is None:
                        continue
                    if time.perf_counter() - asked > COMPILING + spent:
                        problems.append(f"{name} {case}: left out, as compiling the others took long")
                        continue
                    if name == "torch-graph":
                        contenders.append(self.replayed(case, function, sets))
                        continue
                    contender, value, seconds = self.prepared(case, name, function, sets)
                    spent += seconds
                    contenders.append(contender)
                    if reference is None and name == "torch":
                        reference = value
                    if reference is None and "torch" in names:
                        problems.append(f"{name} {case}: not compared, as torch has no value")
                    elif reference is not None and not abs(value - reference) <= 0.02 * abs(reference) + 0.02:
                        problems.append(f"{name} {case}: {value}, where torch has {reference}")
                except Exception as e:  # a peer that fails is listed, the others go on
                    problems.append(f"{name} {case}: {describe(e)}")
                    self.after_failure()
            self.sample(case, contenders, problems, min(spent, case.seconds / 2))
        sm_mhz = machine.sm_mhz()
        return [
            {
                "implementation": c.name,
                "us": quantiles(c.samples),
                "samples": len(c.samples),
                "calls": c.calls,
                "clock": c.clock,
                "peak_bytes": c.peak,
                "sm_mhz": sm_mhz,
            }
            for c in contenders
        ]

    def sample(self, case, contenders, problems, spent):
        """Samples of all in turns, of whose seconds some are spent. Of kept memory, each call should get what the one
        before has freed. But an aligned block, as PyTorch's are, takes a larger one to be found in, and glibc's heap
        grows for up to a dozen calls until there are such: a sample in which it grew does not count."""
        few = max(16, case.input_bytes() // 4096 // 100) if self.keeps_memory else math.inf
        began, r = time.perf_counter(), 0
        todo = list(contenders)
        while todo:
            for c in list(todo):
                elapsed = time.perf_counter() - began
                enough = 1 if c.us * c.calls > case.seconds * 1e5 else MIN_SAMPLES
                if len(c.samples) == MAX_SAMPLES or len(c.samples) >= enough and elapsed + spent > case.seconds:
                    todo.remove(c)
                    continue
                try:
                    us, pages = c.sample(self.machine, r)
                except Exception as e:
                    problems.append(f"{c.name} {case}: {describe(e)}")
                    contenders.remove(c)
                    todo.remove(c)
                    continue
                c.us = min(c.us, us)
                if pages < few or elapsed > max(SETTLING, 2 * case.seconds):
                    c.samples.append(us)
            r += 1

    def function_of(self, name, case):
        function = self.tables[name].get(case.loss)
        of_torch = name.startswith("torch")
        if function is None or (case.layout == "image" and not of_torch):
            return None
        if case.kind in BACKWARD and not of_torch:
            return None
        if name == "torch-graph":
            replayed = case.kind in ("forward", "forward+backward") and case.input_bytes() <= REPLAYED_BYTES
            return case.function(function) if replayed else None
        function = case.function(function)
        if name == "torch.compile":
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False)
        return function

    def prepared(self, case, name, function, sets):
        """A contender that is warm, its first value, and the seconds that this took, compiling left out."""
        machine = self.machine
        if name == "liger" and case.kind == "forward+backward" and case.layout != "linear":
            # it writes the gradient over the logits, which the others are still to read
            sets = [[x.detach().clone().requires_grad_() for x in s[:-1]] + s[-1:] for s in sets]
        started = time.perf_counter()
        work = case.work(function, sets)
        value = work(0).detach().float().mean().item()  # compiles
        peak = None
        if machine.cuda:
            machine.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work(0)
            machine.synchronize()
            if case.kind != "host_call":
                peak = torch.cuda.max_memory_allocated() - before
        # past what runs slower at first: a compiled function's second call, clocks, inputs that are in no cache yet
        timed = machine.host_time if case.kind == "host_call" else machine.time
        us = 1e6
        began = time.perf_counter()
        for i in range(1, 2 * len(sets) + 1) if began - started < 60 else ():
            if i > 2 and time.perf_counter() - began > case.seconds / 10:
                break
            us = min(us, timed(work, 1, i))
        clock = "events" if machine.cuda and case.kind != "host_call" else "host"
        contender = Contender(name, work, clock, machine.calls(us, case.kind), us, peak)
        return contender, value, time.perf_counter() - began

    def replayed(self, case, function, sets):
        """PyTorch without the host: one call on each set of inputs, recorded once; a sample is one replay."""
        work = case.work(function, sets)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(len(sets)):
                work(i)  # what a recording cannot do: load kernels, make cuBLAS's workspace
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(len(sets)):
                work(i)

        def replay(_):
            graph.replay()

        us = min(self.machine.time(replay) for _ in range(2)) / len(sets)
        return Contender("torch-graph", replay, "graph", len(sets), us)

    def after_failure(self):
        """What a failed peer held is for the next one. A context that is lost fails here too; `answer` notices."""
        with contextlib.suppress(Exception):
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()


def quantiles(samples):
    s = sorted(samples)
    return [round(s[round((len(s) - 1) * q)], 4) for q in (0.2, 0.5, 0.8)]


def serve(options):
    # the real ones are kept; whatever else reads or prints, a library or its compiler, does so elsewhere
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def say(message):
        answers.write(json.dumps(message).encode() + b"\n")

    server = Server(options)
    if not options.resumed:
        say(server.hello())
    while line := requests.readline():
        if not line.strip():
            continue
        say(server.answer(line.decode(errors="replace")))
        if server.lost:
            # a new process has a new context
            os.dup2(requests.fileno(), 0)
            os.dup2(answers.fileno(), 1)
            arguments = [a for a in sys.argv[1:] if a != "--resumed"]
            os.execv(sys.executable, [sys.executable, os.path.abspath(__file__), "--resumed", *arguments])


def check(options):
    """One line for each library: its version, how long its import took, and whether a small case runs."""

    small = {"cross_entropy": [(64, 1000)], "linear_cross_entropy": [(128, 128), (1024, 128)]}

    def inputs(*shapes):
        x = [torch.randn(*shape, dtype=torch.bfloat16, device=options.device).requires_grad_() for shape in shapes]
        return [*x, torch.randint(1000, shapes[0][:1], device=options.device)]

    def run(function, arguments):
        began = time.perf_counter()
        y = function(*arguments)
        gradients = torch.autograd.grad(y, arguments[:-1])
        if not all(x.isfinite().all() for x in (y, *gradients)):
            raise ValueError("the loss or a gradient is not finite")
        return f"{y.item():.4f} after {time.perf_counter() - began:.1f} s"

    def line(name, package, load):
        said, imported = [], ""
        try:
            began = time.perf_counter()
            functions = load()
            imported = f", imported in {time.perf_counter() - began:.1f} s"
            for loss, shapes in small.items():
                if loss in functions:
                    try:
                        said.append(f"{loss} {run(functions[loss], inputs(*shapes))}")
                    except Exception as e:
                        said.append(f"{loss} FAILED: {describe(e)}")
        except Exception as e:
            said.append(f"import FAILED: {describe(e)}")
        print(f"{name} {version(package)}{imported}: {'; '.join(said)}", flush=True)
        return not any("FAILED" in s for s in said)

    def load_torch():
        import_torch()
        return torch_functions()

    def load_triton():
        import triton  # noqa: F401

        return {"cross_entropy": torch.compile(F.cross_entropy, dynamic=False)}

    problems = []
    good = line("torch", "torch", load_torch)
    line("triton, by torch.compile", "triton", load_triton)
    for name, (package, _) in PEERS.items():
        line(name, package, functools.partial(peer_functions, name, problems))
    for problem in problems:
        print(problem)
    return 0 if good else 1


def settle_environment(options):
    """Starts this program anew where the environment that it was started in is not the one to measure in."""
    wanted = dict(os.environ)
    # PyTorch would load the software GPU's stand-ins for CUDA's libraries
    home, path = os.environ.get("SOFTGPU_HOME"), os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if home and f"{home}/lib" in path:
        wanted["LD_LIBRARY_PATH"] = ":".join(p for p in path if p != f"{home}/lib")
    # as the asking process has told its own allocator; on a GPU neither tells it anything
    for variable in KEPT_MEMORY:
        wanted.pop(variable, None)
    if options.device == "cpu" and not options.fresh_memory:
        wanted.update(KEPT_MEMORY)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, os.path.abspath(__file__), *sys.argv[1:]], wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--without", default="", help="implementations to leave out, by commas")
    parser.add_argument("--fresh-memory", action="store_true", help="on the CPU, do not keep memory that is freed")
    parser.add_argument("--check", action="store_true", help="say what can be imported and run, and end")
    parser.add_argument("--resumed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle_environment(options)
    if options.check:
        sys.exit(check(options))
    serve(options)


if __name__ == "__main__":
    main()
