#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: the tests, the report, the peers, an example, and compute-sanitizer on what of
# the tests it gets through in the time that is left.
#
#   bash benches/gpu.sh RUNNER      RUNNER starts the binaries: see `start` below; without one, cargo does
#   OUT=/tmp/results SECONDS_REPORT=240 SECONDS_PEERS=150 bash benches/gpu.sh
#   STEPS="report peers" bash benches/gpu.sh
#   REHEARSE=1 bash benches/gpu.sh  all of it on shrunk cases, where there is no GPU to speak of: says nothing about speed
#
# Results and logs go to $OUT (default: benches/results). Rows and pictures are written as they come: what is cut off keeps
# them. Each step has its own limit, and a step that fails does not stop the others; the exit status says whether one did.
# The peers and the sanitizers take what time is left, and are expected to be cut off.
set -uo pipefail
cd "$(dirname "$0")/.."
runner="${1:-}"
if [ -n "${REHEARSE:-}" ]; then
    # the example's sizes are what they are
    steps="${STEPS:-tests report peers memcheck racecheck}"
    out="${OUT:-${TMPDIR:-/tmp}/candle-fused-loss-rehearsal}"
    tests=900 report_options=(--rehearse) peers_options=(--quick --device cpu)
else
    steps="${STEPS:-tests report peers train memcheck racecheck}"
    out="${OUT:-$PWD/benches/results}"
    tests=150 report_options=() peers_options=(--device cuda)
fi
mkdir -p "$out"
failed=0

# A runner's interface: `tests`, `sanitizer TOOL`, `bench NAME ARGS…`, `example NAME ARGS…`, `python SCRIPT ARGS…`.
start() {
    if [ -n "$runner" ]; then
        bash "$runner" "$@"
        return
    fi
    case "$1" in
        tests) cargo test --release --features cuda --tests ;;
        sanitizer)
            shift
            test_binary="$(cargo test --release --features cuda --no-run --test it --message-format=json \
                | sed -n 's/.*"executable":"\([^"]*\/it-[^"]*\)".*/\1/p')"
            compute-sanitizer --tool "$1" --error-exitcode 9 "$test_binary" --test-threads=1 "${@:2}"
            ;;
        bench) cargo bench --features cuda --bench "$2" -- "${@:3}" ;;
        example) cargo run --release --features cuda --example "$2" -- "${@:3}" ;;
        python) shift; python3 "$@" ;;
    esac
}

step() { # name, limit in seconds, then what `start` gets; the step's status
    local name="$1" limit="$2"
    shift 2
    case " $steps " in *" $name "*) ;; *) return 0 ;; esac
    echo "== $name (at most $limit s)"
    local begin=$SECONDS
    export -f start
    runner="$runner" timeout "$limit" bash -c 'start "$@"' start "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
    echo "== $name: status $status after $((SECONDS - begin)) s"
    return $status
}

# What is left of ten minutes, less so many seconds for the steps to come.
left() {
    local seconds=$((590 - SECONDS - $1))
    echo $((seconds > 30 ? seconds : 30))
}

# A step of which anything is worth having: what it did until it was cut off counts. `pattern`: what its log has if it failed.
partly() { # name, limit in seconds, pattern, then what `start` gets
    local name="$1" limit="$2" pattern="$3"
    shift 3
    step "$name" "$limit" "$@"
    local status=$?
    if [ $status -eq 124 ] && ! grep -q "$pattern" "$out/$name.log"; then
        echo "== $name was cut off, and had not failed until then"
        status=0
    fi
    return $status
}

step tests "$tests" tests || failed=1
step report $((${SECONDS_REPORT:-160} + 30)) bench report --bench --out "$out" --device cuda \
    --time-budget "${SECONDS_REPORT:-160}" "${report_options[@]}" || failed=1
step train 40 example train --quick --device cuda || failed=1
limit="${SECONDS_PEERS:-$(left 90)}"
partly peers $((limit + 10)) Traceback python benches/peers/peers.py --out "$out" \
    --time-budget $((limit - 10)) "${peers_options[@]}" || failed=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        limit="$(left 0)"
        [ $tool = memcheck ] && limit=$((limit / 2))
        partly $tool "$limit" '========= .*\(Invalid\|Error\|Race\|hazard\)' sanitizer $tool || failed=1
    done
else
    echo "== compute-sanitizer was not found: neither memcheck nor racecheck ran"
    [ -n "${REHEARSE:-}" ] || failed=1
fi
exit $failed
