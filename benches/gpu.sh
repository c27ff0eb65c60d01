#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: the tests, compute-sanitizer on a part of them, the report, and the peers.
#
#   bash benches/gpu.sh RUNNER      RUNNER starts the binaries: see `start` below; without one, cargo does
#   OUT=/tmp/results SECONDS_REPORT=240 SECONDS_PEERS=150 bash benches/gpu.sh
#
# Results and logs go to $OUT (default: benches/results). Rows are written as they come: what is cut off keeps them. Each
# step has its own limit, and a step that fails does not stop the others; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
runner="${1:-}"
out="${OUT:-$PWD/benches/results}"
mkdir -p "$out"
failed=0

# A runner's interface: `tests`, `sanitizer TOOL`, `bench NAME ARGS…`, `python SCRIPT ARGS…`.
start() {
    if [ -n "$runner" ]; then
        bash "$runner" "$@"
        return
    fi
    case "$1" in
        tests) cargo test --release --features cuda ;;
        sanitizer)
            shift
            test_binary="$(cargo test --release --features cuda --no-run --test it --message-format=json \
                | sed -n 's/.*"executable":"\([^"]*\/it-[^"]*\)".*/\1/p')"
            compute-sanitizer --tool "$1" --error-exitcode 9 "$test_binary" --test-threads=1 "${@:2}"
            ;;
        bench) cargo bench --features cuda --bench "$2" -- "${@:3}" ;;
        python) shift; python3 "$@" ;;
    esac
}

step() { # name, limit in seconds, then what `start` gets
    local name="$1" limit="$2"
    shift 2
    echo "== $name (at most $limit s)"
    local begin=$SECONDS
    export -f start
    runner="$runner" timeout "$limit" bash -c 'start "$@"' start "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
    echo "== $name: status $status after $((SECONDS - begin)) s"
    [ "$status" -eq 0 ] || failed=1
}

step tests 150 tests
step report $((${SECONDS_REPORT:-200} + 30)) bench report --bench --out "$out" --device cuda --time-budget "${SECONDS_REPORT:-200}"
step peers $((${SECONDS_PEERS:-120} + 30)) python benches/peers/peers.py --out "$out" --device cuda --time-budget "${SECONDS_PEERS:-120}"
# last, because it takes what time is left: instrumented code is slow
step memcheck "${SECONDS_MEMCHECK:-60}" sanitizer memcheck
step racecheck "${SECONDS_RACECHECK:-60}" sanitizer racecheck
exit $failed
