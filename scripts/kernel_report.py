#!/usr/bin/env python3
"""What the compiler made of the kernels: registers, spills and the widths of global accesses, without a GPU.

    scripts/kernel_report.py [--arch 75,80,90a] [--only REGEX] [kernels/modules/FILE.cu ...]

Compiles each file as build.rs does, assembles the PTX and disassembles the result. Prints one line for each kernel: registers
of a thread, bytes of static shared memory, bytes spilled, the threads that a multiprocessor has room for, in blocks of the
largest size, and their part of what it can hold (theoretical occupancy, before dynamic shared memory), and how many global
loads and stores there are of each width in bits (in the code, not in time); then one line for each architecture. Exits with 1
if a kernel spills.

Needs nvcc and ptxas (the CUDA toolkit) and nvdisasm (the toolkit, or `pip install nvidia-cuda-nvdisasm`), on PATH or in the
environment of this Python.
"""

import argparse
import collections
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Turing to Blackwell: what the kernels support and CUDA 13 compiles for.
ALL = ["75", "80", "86", "89", "90a", "100", "120"]
REGISTERS = 65536
# Threads, blocks and KB of shared memory of a multiprocessor; of each block's shared memory the system takes 1 KB from sm_80 on.
LIMITS = {
    "75": (1024, 16, 64), "80": (2048, 32, 164), "86": (1536, 16, 100), "89": (1536, 24, 100),
    "90": (2048, 32, 228), "90a": (2048, 32, 228), "100": (2048, 32, 228), "120": (1536, 24, 100),
}  # fmt: skip


def tool(name):
    """The path of a CUDA tool: on PATH, or where NVIDIA's wheels put it."""
    found = shutil.which(name)
    if found:
        return found
    for path in pathlib.Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/*/bin/{name}"):
        return str(path)
    sys.exit(f"{name} not found: install the CUDA toolkit, or `pip install nvidia-cuda-{name}`")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def resources(log):
    """Registers, shared memory and spilled bytes of each kernel, from ptxas -v."""
    kernels, name = {}, None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = {"registers": 0, "shared": 0, "spilled": 0}
        if name is None:
            continue
        if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name]["spilled"] += int(found[1]) + int(found[2])
        if found := re.search(r"Used (\d+) registers", line):
            kernels[name]["registers"] = int(found[1])
        if found := re.search(r"(\d+) bytes smem", line):
            kernels[name]["shared"] = int(found[1])
    return kernels


def accesses(assembly):
    """Global loads and stores of each kernel: {kernel: ({bits: loads}, {bits: stores})}."""
    kernels, name = {}, None
    for line in assembly.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            name = found[1]
            kernels[name] = (collections.Counter(), collections.Counter())
        elif found := re.search(r"\b(LDG|STG)((?:\.\w+)*)", line):
            if name is None:
                continue
            suffixes = found[2].split(".")
            bits = next((int(s) for s in suffixes if s in ("64", "128", "256")), None)
            bits = bits or next((int(s[1:]) for s in suffixes if s in ("U8", "S8", "U16", "S16")), 32)
            kernels[name][found[1] == "STG"][bits] += 1
    return kernels


def block_sizes(ptx):
    """The largest block of each kernel, from its launch bounds."""
    return {name: int(threads) for name, threads in re.findall(r"\.entry (\w+)\([^)]*\)[^{]*?\.maxntid (\d+)", ptx)}


def resident(used, block, arch):
    """The threads that a multiprocessor has room for, in whole blocks."""
    threads, blocks, shared = LIMITS[arch]
    # registers are given to a warp 256 at a time
    by_registers = REGISTERS // ((used["registers"] + 7) // 8 * 8 * block)
    by_shared = (shared << 10) // (used["shared"] + (1024 if arch != "75" else 0) or 1)
    return min(blocks, threads // block, by_registers, by_shared) * block


def widths(counter):
    return " ".join(f"{bits}x{counter[bits]}" for bits in sorted(counter, reverse=True)) or "-"


def report(source, arch, only):
    """Prints a file's kernels as an architecture gets them; what they use."""
    nvcc, ptxas, nvdisasm = tool("nvcc"), tool("ptxas"), tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = f"{folder}/k.ptx", f"{folder}/k.cubin"
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        run(nvcc, gencode, "-std=c++17", "-O3", "--ptx", "-o", ptx, str(source))
        log = run(ptxas, f"-arch=sm_{arch}", "-v", "-o", cubin, ptx)
        moved = accesses(run(nvdisasm, "-c", cubin))
        blocks = block_sizes(pathlib.Path(ptx).read_text())
    kernels = {name: used for name, used in sorted(resources(log).items()) if re.search(only, name)}
    print(f"\n{source.name}, sm_{arch}")
    print(f"{'kernel':36} {'regs':>5} {'smem':>6} {'spilled':>7} {'block':>5} {'threads':>7} {'':>5}  {'loads':28} stores")
    for name, used in kernels.items():
        loads, stores = moved.get(name, ({}, {}))
        threads = resident(used, blocks[name], arch)
        print(
            f"{name:36} {used['registers']:5} {used['shared']:6} {used['spilled']:7}"
            f" {blocks[name]:5} {threads:7} {threads / LIMITS[arch][0]:5.0%}  {widths(loads):28} {widths(stores)}",
            flush=True,
        )
    return kernels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default="90a", metavar="LIST", help="compute capabilities, separated by commas, or `all` (default: %(default)s)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: all of kernels/modules/*.cu")
    args = parser.parse_args()
    sources = args.files or sorted((ROOT / "kernels/modules").glob("*.cu"))
    summary = []
    for arch in ALL if args.arch == "all" else args.arch.split(","):
        kernels = {}
        for source in sources:
            used = report(source, arch, args.only)
            kernels |= {f"{name} ({source.stem})": numbers for name, numbers in used.items()}
        summary.append((arch, kernels))

    print(f"\n{'arch':>6} {'kernels':>7} {'most registers':>14} {'spilling':>8} {'most spilled':>12}")
    for arch, kernels in summary:
        spilling = [name for name, used in kernels.items() if used["spilled"]]
        registers = max((used["registers"] for used in kernels.values()), default=0)
        spilled = max((used["spilled"] for used in kernels.values()), default=0)
        print(f"{arch:>6} {len(kernels):7} {registers:14} {len(spilling):8} {spilled:12}  {', '.join(spilling)}")
    sys.exit(any(used["spilled"] for _, kernels in summary for used in kernels.values()))


if __name__ == "__main__":
    main()
