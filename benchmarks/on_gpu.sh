#!/usr/bin/env bash
# Proves and times the kernels on this machine's CUDA GPU, in less than nine minutes.
#
#   benchmarks/on_gpu.sh FOLDER [warm|correct|kernels|step|decode|tune ...]
#
# Needs Python with torch, triton, pytest, pytest-benchmark and tqdm; builds, installs and downloads
# nothing. Leaves a log and a JSON file of every stage in FOLDER (of kernels, step and decode what
# `python -m benchmarks.report` reads), written as it goes: a stage that is stopped leaves its results so
# far. Prints a short table last. Without a stage: all of them, each within a share of the time; with
# some, they have more. Exit code 1 if one failed. DRY=1 runs the same tiny and interpreted, on any
# machine (TESTS: these files' for `correct`): the times mean nothing.
set -uo pipefail

stages=(warm correct kernels step decode tune)
# seconds of each stage when all run
declare -A share=([warm]=30 [correct]=150 [kernels]=120 [step]=120 [decode]=50 [tune]=80)

usage() {
    echo "usage: benchmarks/on_gpu.sh FOLDER [${stages[*]// /|}]" >&2
    exit 2
}

[ $# -ge 1 ] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
if [ $# -gt 0 ]; then
    stages=("$@")
fi
total=0
for stage in "${stages[@]}"; do
    [ -n "${share[$stage]:-}" ] || usage
    total=$((total + share[$stage]))
done

cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
scale=() dry=() limit=520
# which tests prove the kernels, and how many parameter sets of each at most
which=(-m gpu tests/kernels tests/generate/test_gpu_step.py) sets=4
if [ -n "${DRY:-}" ]; then
    export TRITON_INTERPRET=1
    # the interpreter on a busy machine
    limit=5200
    scale=(--scale dry) dry=(--dry)
    # tests at a GPU's sizes are rehearsed with small ones
    which=(-k rehearsal ${TESTS:-tests/kernels}) sets=1
else
    unset TRITON_INTERPRET
fi

# Ctrl-C at the end of a stage's time, and not an end without notice: pytest and the tuner then
# write what they have. A script in the background hands down that Ctrl-C is ignored: undo that.
within() {
    local seconds=$1
    shift
    timeout --foreground --signal INT --kill-after 15 "$seconds" env --default-signal=INT "$@"
}

bench() {
    local stage=$1 seconds=$2
    shift 2
    # the file first: pytest 8.3 looks for a conftest, which has these options, beside what comes first
    within "$seconds" "$python" -m pytest "$@" -p no:cacheprovider --benchmark-only -q \
        "${scale[@]}" --json-so-far "$out/$stage.json" --budget $((seconds * 6 / 10))
}

run_stage() {
    local stage=$1 seconds=$2
    local b=benchmarks/bench
    case $stage in
    warm)
        if [ -n "${DRY:-}" ]; then
            echo "interpreted kernels are not compiled"
            return
        fi
        # GPT-2's kernels, all cores at once: the stages after it find them in Triton's cache
        within "$seconds" "$python" -m fastgpt2.kernels.warm --batch-size 64
        ;;
    correct)
        local workers=()
        if "$python" -c "import xdist" 2>/dev/null; then
            # most of the time goes into compiling kernels, which other cores can do
            workers=(-n 6)
        fi
        # a few of each test's parameter sets: nearly every one compiles kernels of its own. What has
        # ended is in the file at once, so that a run that is stopped leaves what it found
        within "$seconds" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" \
            -p tests.results_so_far --results-so-far "$out/correct.jsonl" \
            --most-per-test "$sets" "${which[@]}"
        ;;
    kernels)
        bench kernels "$seconds" ${b}_ops.py --seconds 1
        ;;
    step)
        bench step "$seconds" ${b}_train_step.py --seconds 3
        ;;
    decode)
        bench decode "$seconds" ${b}_generate.py --rounds 3
        ;;
    tune)
        within "$seconds" "$python" -m tools.tune --out "$out" \
            --seconds $((seconds * 6 / 10)) "${dry[@]}"
        ;;
    esac
}

status=0
for stage in "${stages[@]}"; do
    seconds=$((share[$stage] * limit / total))
    echo "== $stage (at most $seconds s)"
    run_stage "$stage" "$seconds" >"$out/$stage.log" 2>&1
    code=$?
    if [ $code -ne 0 ]; then
        echo "$stage ended with exit code $code; the end of $out/$stage.log:"
        tail -n 15 "$out/$stage.log"
        status=1
    fi
done
"$python" -m benchmarks.summary "$out"
exit $status
