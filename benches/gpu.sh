#!/usr/bin/env bash
# Two runs on a machine with a GPU, each one command, which leaves all its results in one archive:
#
#   bash benches/gpu.sh smoke      two minutes: which tools and peers work here, all kernels loaded (and compiled for the runs
#                                  after it), the tests that need a real GPU, the accuracy's real values, a quick report
#   bash benches/gpu.sh measure    six minutes: the report with the peers beside it, profiles of four cases, a memory
#                                  checker on some tests; then the table of goals
#
#   bash benches/gpu.sh --rehearse smoke|measure    the same steps on shrunk cases, on the software GPU: says that they run
#   OUT=/tmp/results bash benches/gpu.sh smoke      where smoke.tar.gz goes [default: benches/results]
#
# Where cargo is, the binaries are built first, outside of the time. For a machine without Rust `scripts/pack` packs them
# before, and `scripts/pack-peers` the peers that PyTorch doesn't bring.
#
# Each step has a limit, and a step that fails or is cut off does not stop the others. The archive is written again every few
# seconds, so that a run which is cut off itself leaves one too. The exit status says whether a step failed.
# shellcheck disable=SC2329  # functions that are called by name, or by another bash
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

usage() {
    sed -n 's/^#   bash/bash/p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

rehearse="" # or the option, which `report` has too
if [[ "${1:-}" == --rehearse ]]; then
    rehearse="$1"
    shift
fi
run="${1:-}"
case "$run" in
    smoke) seconds=120 ;;
    measure) seconds=360 ;;
    *) usage ;;
esac
[[ -z "$rehearse" ]] || seconds=1800

if command -v cargo >/dev/null; then
    scripts/pack --plain || exit 1
elif [[ ! -e .gpu/run ]]; then
    echo "gpu.sh: neither cargo nor .gpu/run is here: run scripts/pack where cargo is, and copy .gpu/ too" >&2
    exit 2
fi

SECONDS=0
out="${OUT:-$PWD/benches/results}"
work="$(mktemp -d)"
results="$work/$run"
mkdir -p "$out" "$results"

archive() {
    local part
    part="$(mktemp "$out/.$run.XXXXXX")"
    # files that grow meanwhile are as long as they are
    tar -C "$work" -czf "$part" "$run" 2>/dev/null
    chmod 644 "$part"
    mv "$part" "$out/$run.tar.gz"
}
finish() {
    trap '' INT TERM
    # the archivist, and a step that still runs
    jobs -p | xargs -r kill 2>/dev/null
    wait
    archive
    rm -rf "$work"
}
while sleep 10 && kill -0 $$ 2>/dev/null; do archive; done &
trap finish EXIT
trap 'exit 143' INT TERM

failed=0
# What a step did, and the end of its log if it failed. `partly`: being cut off at its limit is no failure, if until then
# there was none that a sanitizer says like "========= Invalid __global__ write".
step() { # [partly] name, limit in seconds, command…
    local partly=""
    if [[ "$1" == partly ]]; then
        partly=1
        shift
    fi
    local name="$1" limit="$2" begun=$SECONDS status
    shift 2
    local left=$((seconds - SECONDS))
    ((limit <= left)) || limit=$((left > 1 ? left : 1))
    [[ -z "$rehearse" ]] || limit=900
    # in the background, so that a signal is heard at once
    timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1 &
    wait $!
    status=$?
    local said="ok"
    if [[ $status -eq 124 && -n "$partly" ]] && ! grep -q '^=========.*\(Invalid\|Error\|Race\|hazard\)' "$results/$name.log"; then
        said="cut off, no failure until then"
    elif [[ $status -ne 0 ]]; then
        said="FAILED with $status"
        failed=1
    fi
    printf '== %-12s %s after %d s\n' "$name" "$said" $((SECONDS - begun)) | tee -a "$results/steps.txt"
    if [[ $status -ne 0 ]]; then
        tail -n 8 "$results/$name.log"
    fi
}

packed() { bash .gpu/run "$@"; }
export -f packed

# A tool that is not here is said, and is no failure of this crate.
step_with() { # tool, then as for `step`
    if command -v "$1" >/dev/null || [[ -x "/usr/local/cuda/bin/$1" ]]; then
        step "${@:2}"
    else
        echo "== $1 is not here" | tee -a "$results/steps.txt"
    fi
}

tools() {
    uname -srm
    echo "hypervisor: $(cat /sys/class/dmi/id/sys_vendor /sys/hypervisor/type 2>/dev/null | tr '\n' ' ')"
    nproc
    free -g | sed -n 2p
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv
    local tool
    for tool in ncu compute-sanitizer nvcc gcc python3; do
        echo "$tool: $(command -v "$tool" || ls "/usr/local/cuda/bin/$tool" 2>/dev/null || echo "not here")"
    done
    [[ -w "$HOME" ]] && echo "HOME is writable" || echo "HOME is not writable"
    true
}
export -f tools

# Loads, and so compiles, the kernels in as many processes as there are cores.
modules() {
    local processes=() status=0 part count
    count="$(nproc)"
    for ((part = 0; part < count; part++)); do
        MODULES="$part/$count" bash .gpu/run test lib every_module_loads --nocapture &
        processes+=($!)
    done
    for part in "${processes[@]}"; do
        wait "$part" || status=1
    done
    return "$status"
}
export -f modules

smoke() {
    local device_options=(--device cuda) all_tests=(--include-ignored)
    if [[ -n "$rehearse" ]]; then
        # what is ignored needs a real GPU, or takes minutes
        device_options=(--device cpu) all_tests=()
    fi
    step unpack 20 bash -c "packed unpack"
    step tools 10 bash -c tools
    # importing and compiling the peers takes a core, the kernels all the others
    bash -c "timeout 90 bash .gpu/run python benches/peers/peers.py --check ${device_options[*]}" >"$results/peers.log" 2>&1 &
    local peers=$!
    step modules 60 bash -c modules
    sort -t : -k 2 -rn "$results/modules.log" | grep -m 3 " s, from "
    step accuracy 30 bash -c "packed test it accuracy:: --nocapture"
    grep -h "^| \`" "$results/accuracy.log" | tail -n 8
    step driver 20 bash -c "packed test driver"
    step cuda 60 bash -c "packed test it cuda_softmax:: ${all_tests[*]}"
    grep -h "^test .*\.\.\. [^o]" "$results/cuda.log"
    step report 40 bash -c "packed bench report --quick --device cuda --time-budget 20 --out '$results' $rehearse"
    grep -h "^copy \|^first call\|^no " "$results/report.log"
    # whether they work here, on little
    step_with ncu ncu 15 bash -c "packed profile --clock-control none --section SpeedOfLight -c 1 -k regex:softmax -- \
        bench report --profile --device cuda --filter cross_entropy/bf16/64x1000"
    step_with compute-sanitizer memcheck 20 bash -c "packed sanitizer memcheck it cuda_softmax::bad_targets"
    wait "$peers" || echo "== peers: no PyTorch here, or it failed" | tee -a "$results/steps.txt"
    last="$results/peers.log"
}

measure() {
    step unpack 20 bash -c "packed unpack"
    step partly report 240 bash -c "packed bench report --device cuda --time-budget 220 --peers 'bash .gpu/run python' \
        --peers-share 0.5 --out '$results' $rehearse"
    # where the predictions are shakiest: rows in registers, rows that clusters share, rows that begin anywhere in a
    # word, and the soft cap
    local sections="--section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis --section Occupancy"
    local profile="packed profile --clock-control none $sections -c 2"
    local report="bench report --profile --device cuda --filter"
    step_with ncu partly registers 20 bash -c "$profile -k regex:softmax_reduce_plain_registers -- \
        $report cross_entropy/bf16/65536x1000"
    step_with ncu partly clusters 20 bash -c "$profile -k regex:softmax_fused_plain_rows -- \
        $report cross_entropy/bf16/8192x128256"
    step_with ncu partly shifted 15 bash -c "$profile -k regex:softmax_fused_plain_rows -- \
        $report cross_entropy/bf16/8x2047+1x50257"
    step_with ncu partly softcap 15 bash -c "$profile -k regex:softmax_fused -- \
        $report cross_entropy_softcap/bf16/4096x256000"
    step_with compute-sanitizer partly memcheck 45 bash -c \
        "packed sanitizer memcheck it cuda_softmax:: --test-threads=1"
    step table 10 bash -c "packed bench report --goals '$results'/*.csv $rehearse"
    last="$results/table.log"
    if [[ -n "$rehearse" ]] && grep "not measured" "$last"; then
        failed=1
    fi
}

"$run"
echo "all results: $out/$run.tar.gz"
cat "$last"
exit $failed
