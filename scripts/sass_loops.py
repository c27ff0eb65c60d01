#!/usr/bin/env python3
"""What the hot loops of the kernels cost, without a GPU: instructions for each element, from the machine code.

    scripts/sass_loops.py [--arch 90a] [--only REGEX] [--windows N] [--fix OLD=>NEW]... [--blocks] [kernels/modules/FILE.cu ...]

Finds the innermost loops that load 16 bytes at a time and prints, for each, the windows of 16 bytes that it moves in a round
and, for each element, the issue slots, the operations of the special-function unit (MUFU), of the half-rate pipe (ALU: minima,
comparisons, integers, conversions) and of shared memory. All instructions between a loop's first and its last are counted,
so a branch that is not taken counts too: these are upper bounds. --fix 'p.capped=>0' compiles copies of the headers with one
text in place of another, so that the branches that such a launch does not take are gone. With --blocks, each loop's basic blocks
follow, a line each, so that those on a path can be added up: where a block begins, its instructions for each element, and where
it branches to.

Where a loop loads probabilities too, its loads in all branches are taken for windows of logits: --windows says how many there are.

Behind each kernel: the threads that a multiprocessor has room for by the kernel's registers, and the bytes that they have in
flight, all at their loads at once.

The budget, an element: what one multiprocessor can issue while its share of the memory's copy bandwidth moves that element.
A loop that needs more than about two thirds of it will not run at the memory's speed.
"""

import argparse
import collections
import importlib.util
import pathlib
import re
import shutil
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "scripts" / "kernel_report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

# name, multiprocessors, clock in GHz, copy bandwidth in TB/s: 4 schedulers issue 32 threads' instruction a clock each
DEVICES = [("H100", 132, 1.755, 3.0), ("H200", 132, 1.755, 4.3)]
REGISTERS = 65536
THREADS = 2048

MUFU = {"MUFU"}
SHARED = {"LDS", "STS", "SHFL"}
# 16 lanes a clock and scheduler instead of 32
HALF = {
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "SEL", "ISETP", "IMNMX", "VIMNMX", "LOP3", "PLOP3", "SHF", "PRMT", "LEA",
    "IADD3", "F2FP", "HMNMX2", "HSET2", "HSETP2", "VIADD", "SGXT", "R2P", "P2R", "MOV",
}  # fmt: skip


def functions(assembly):
    """The instructions and labels of each kernel, in order: {kernel: [("label", name) or (opcode, text)]}."""
    kernels, code = {}, None
    for line in assembly.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            code = kernels.setdefault(found[1], [])
        elif line.strip().startswith(".section"):
            code = None
        elif code is None:
            continue
        elif found := re.match(r"(\.L_x_\d+):", line):
            code.append(("label", found[1]))
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z0-9_]+)((?:\.\w+)*)(.*?);", line):
            code.append((found[2], found[2] + found[3] + found[4]))
    return kernels


def loops(code):
    """The innermost loops that load 16 bytes at a time: (first, last) of `code`."""
    places = {text: i for i, (op, text) in enumerate(code) if op == "label"}
    found = []
    for i, (op, text) in enumerate(code):
        if op == "BRA" and (target := re.search(r"(\.L_x_\d+)", text)) and places.get(target[1], i) < i:
            body = code[places[target[1]] : i]
            # `STRONG`: the partial sums of other blocks, once a launch
            if any(op in ("LDG", "LDS") and ".128" in text and ".STRONG" not in text for op, text in body):
                found.append((places[target[1]], i))
    return [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]


def count(body):
    ops = collections.Counter()
    for op, text in body:
        if op == "label":
            continue
        ops["slots"] += 1
        ops["mufu"] += op in MUFU
        ops["half"] += op in HALF
        ops["shared"] += op in SHARED
        wide = ".128" in text
        for name, starts in [("loads", "LDG"), ("stores", "STG"), ("kept", "LDS")]:
            ops[name] += wide and op == starts
    return ops


def blocks(body):
    """The basic blocks of a loop: (its label, its instructions, where it branches to)."""
    label, code = "", []
    for op, text in body:
        if op == "label":
            if code:
                yield label, code, ""
            label, code = text, []
            continue
        code.append((op, text))
        if op in ("BRA", "BRX", "EXIT"):
            yield label, code, (re.search(r"\.L_x_\d+", text) or [op])[0]
            label, code = "", []
    if code:
        yield label, code, ""


def fixed(folder, fixes):
    """A copy of the kernels with some texts in place of others, each of which is somewhere in their headers."""
    copy = pathlib.Path(shutil.copytree(ROOT / "kernels", f"{folder}/kernels"))
    for old, new in fixes:
        found = [path for path in copy.rglob("*.cuh") if old in path.read_text()]
        if not found:
            raise SystemExit(f"no header has {old!r}")
        for path in found:
            path.write_text(path.read_text().replace(old, new))
    return copy / "modules"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a", help="compute capability (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("--windows", type=int, help="the windows of logits of a round")
    parser.add_argument(
        "--fix", action="append", default=[], metavar="OLD=>NEW", type=lambda fix: fix.split("=>", 1), help="one text for another"
    )
    parser.add_argument("--blocks", action="store_true", help="the basic blocks of each loop too")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: all of kernels/modules/*.cu")
    args = parser.parse_args()
    nvcc, ptxas, nvdisasm = report.tool("nvcc"), report.tool("ptxas"), report.tool("nvdisasm")

    for source in args.files or sorted((ROOT / "kernels/modules").glob("*.cu")):
        size = {"f64": 8, "f32": 4}.get(source.stem.split("_")[-1], 2)
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = f"{folder}/k.ptx", f"{folder}/k.cubin"
            gencode = f"-gencode=arch=compute_{args.arch},code=sm_{args.arch}"
            file = fixed(folder, args.fix) / source.name if args.fix else source
            report.run(nvcc, gencode, "-std=c++17", "-O3", "--ptx", "-o", ptx, str(file))
            used = report.resources(report.run(ptxas, f"-arch=sm_{args.arch}", "-v", "-o", cubin, ptx))
            code = functions(report.run(nvdisasm, "-c", cubin))
        print(f"\n{source.name}, sm_{args.arch}")
        for name, processors, clock, bandwidth in DEVICES:
            slots = processors * 128 * clock * 1e9 / (bandwidth * 1e12 / size)
            print(
                f"{name}, for each element read or written:"
                f" {slots:.1f} slots, {slots / 2:.1f} half-rate, {slots / 8:.2f} MUFU"
            )
        print(f"{'kernel':34} {'threads':>7}  {'in a round':26} {'slots':>6} {'half':>6} {'MUFU':>6} {'shared':>6}     KB")
        for kernel, body in sorted(code.items()):
            if not re.search(args.only, kernel) or kernel not in used:
                continue
            registers = (used[kernel]["registers"] + 7) // 8 * 8
            threads = min(THREADS, REGISTERS // (registers * 256) * 256)
            for first, last in loops(body):
                ops = count(body[first : last + 1])
                windows = max(ops["loads"], ops["kept"])
                if source.stem.startswith("elementwise"):
                    # two windows of each operand: see `walk_dense`
                    windows = 2
                per = (args.windows or windows) * 16 // size
                moved = " ".join(f"{ops[k]} {k}" for k in ("loads", "kept", "stores") if ops[k])
                flight = ops["loads"] * 16 * threads / 1024
                print(
                    f"{kernel:34} {threads:7}  {moved:26} {ops['slots'] / per:6.2f} {ops['half'] / per:6.2f}"
                    f" {ops['mufu'] / per:6.2f} {ops['shared'] / per:6.2f}  {flight:5.0f}"
                )
                for label, instructions, to in blocks(body[first : last + 1]) if args.blocks else ():
                    ops = count(instructions)
                    moved = " ".join(f"{ops[k]} {k}" for k in ("loads", "kept", "stores") if ops[k])
                    print(
                        f"    {label:38}  {moved:26} {ops['slots'] / per:6.2f} {ops['half'] / per:6.2f}"
                        f" {ops['mufu'] / per:6.2f} {ops['shared'] / per:6.2f}  {to}"
                    )


if __name__ == "__main__":
    main()
