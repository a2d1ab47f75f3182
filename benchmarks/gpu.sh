#!/bin/bash
# Every GPU measurement of the project, in calls of at most nine minutes.
#
#   benchmarks/gpu.sh            measure what has no result yet; call it again until it says "done"
#   benchmarks/gpu.sh --again    forget what is there and begin anew
#   benchmarks/gpu.sh --dry-run  every part in miniature on this machine's CPU; nothing is kept
#
# A part is left alone if its result lies in benchmarks/results/GPU/, where GPU names the kind. Where
# $OUT is a folder, results are copied there after every part, so that a call that is cut off loses
# one part at most. PYTHON is the interpreter, MINUTES the length of a call.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=".:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
limit=$((${MINUTES:-9} * 60))
dry=""; again=""
for option in "$@"; do
    case $option in
        --dry-run) dry=1 ;;
        --again) again=1 ;;
        *) echo "unknown option $option; choose --dry-run or --again." >&2; exit 2 ;;
    esac
done

if [ -n "$dry" ]; then
    results=$(mktemp -d)
    trap 'rm -rf "$results"' EXIT
else
    name='from speed_engine.runtime.machine import machine_name as m; print(m("cuda"))'
    gpu=$("$python" -c "$name") || { echo "no GPU: --dry-run proves the script." >&2; exit 2; }
    results=benchmarks/results/$gpu
fi
mkdir -p "$results"
[ -n "$again" ] && [ -z "$dry" ] && rm -f "$results"/*

# part RESULT SECONDS COMMAND...: run it if its result is missing and the call has that much left
part() {
    local result=$results/$1 needs=$2 left
    shift 2
    [ -e "$result" ] || [ -e "$result.failed" ] && return
    left=$((limit - SECONDS))
    if [ -z "$dry" ] && [ "$left" -lt "$needs" ]; then
        echo "next: $(basename "$result"), about $needs s; $left s left of this call. Call again."
        exit 3
    fi
    echo "== $(basename "$result"), at $SECONDS s"
    timeout "$([ -n "$dry" ] && echo 600 || echo "$left")" bash -c '"$@"' part "$@"
    local status=$?
    if [ $status = 124 ] && [ "$left" -lt $((limit - 60)) ]; then
        echo "out of time: $(basename "$result"). Call again."
        exit 3
    fi
    [ $status = 0 ] || echo "$*" > "$result.failed"
    [ -n "${OUT:-}" ] && [ -z "$dry" ] && mkdir -p "$OUT/$(basename "$results")" \
        && cp "$results"/* "$OUT/$(basename "$results")/"
    return 0
}

kernels() { part "kernels_$1.json" "$2" "$python" benchmarks/bench_kernels.py --again --sections "$1"; }
train_step() { "$python" benchmarks/bench_train_step.py ${dry:+--dry-run} --again "$@"; }
export -f train_step
export python dry
tests() {  # into a file, whole or nothing
    "$python" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib "${@:2}" \
        > "$1.running" 2>&1
    local status=$?
    tail -3 "$1.running"
    mv "$1.running" "$1"
    return $status
}
curve() {  # METHOD RESULT options: train, keep its records
    local run
    run=$(mktemp -d)
    "$python" -m speed_engine train "$preset" --method "$1" --run "$run/run" "${@:3}" \
        && mv "$run/run/metrics.jsonl" "$2"
    local status=$?
    rm -rf "$run"
    return $status
}
export -f tests curve

preset=emoji64; short=(--steps 4000 --checkpoint-every 4000 --evaluation.every 2000)
if [ -n "$dry" ]; then
    preset=digits; short=(--steps 2 --evaluation.num-images 10 --evaluation.solver-steps 1)
    short+=(--evaluation.features none)
fi
export preset

# What decides first: the ladder of the largest model, then what training acts on.
if [ -n "$dry" ]; then
    part bench_kernels 0 "$python" benchmarks/bench_kernels.py --dry-run
    part train_step 0 train_step --sections step
    part train_loader.json 0 train_step --sections loader
    part train_startup.json 0 train_step --sections startup
    part tests.txt 0 tests "$results/tests.txt" tests/speed_kernels/test_philox.py -k committed_bits
else
    part train_step_dit-xl-2.json 480 train_step --sections step --cases DiT-XL/2
    kernels stored_noise 60
    part train_step_dit-s-2.json 240 train_step --sections step --cases DiT-S/2
    part train_step_dit-b-2.json 270 train_step --sections step --cases DiT-B/2
    part train_step_dit-l-2.json 420 train_step --sections step --cases DiT-L/2
    part train_step_unet.json 360 train_step --sections step --cases unet
    part train_loader.json 150 train_step --sections loader
    part train_startup.json 400 train_step --sections startup
    for section in block adaln noise loss hybrid_loss clean_images qk_norm_rope group_norm optimizer
    do
        kernels "$section" 120
    done
    part tests_speed_kernels.txt 400 tests "$results/tests_speed_kernels.txt" tests/speed_kernels
    part tests_gpu.txt 200 tests "$results/tests_gpu.txt" -m gpu tests --ignore=tests/speed_kernels
fi
if [ -n "$dry" ] || [ -d "shards/$preset" ]; then
    for method in uniform speed_paper; do
        part "${preset}_$method.jsonl" 300 curve "$method" "$results/${preset}_$method.jsonl" "${short[@]}"
    done
else
    echo "left out: shards/$preset is not there; speed-engine shards make emoji shards/$preset --size 64"
fi

failed=$(cd "$results" && ls | grep '\.failed$')
if [ -n "$failed" ]; then
    echo "FAILED, delete RESULT.failed to try again:" $failed
    exit 1
fi
echo "done: $results"
