#!/usr/bin/env bash
# Everything that needs a GPU, in one go, in less than 25 minutes: build, tests (graph capture with growth, no host
# waits), compute-sanitizer, bandwidth of the operators, whole models with the kernels of a step. Called by
# `make gpu-check`.
#
#   bash scripts/others/gpu_check.sh
#
# A step that has passed is not repeated, and the benchmarks keep their finished cells, so a stopped run goes on; remove
# OUTPUT to start over (FRESH=1: the benchmarks alone). Variables:
#   DRY            1: walk through it on a CPU, with tiny shapes             (unset)
#   OUTPUT         folder of the results                                     (results/gpu_check)
#   MODEL          shape or folder of the whole model                        (vicuna-7b)
#   BENCH_SECONDS  seconds after which the benchmark begins no further cell  (240)
#   PROMPTS, BUDGETS, BATCHES, SHAPES  grid of the benchmark                 (4096 32768 131072; 64 256 1024 full; 1 8 32; all)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

cd "$scripts_folder/.."
output="${OUTPUT:-results/gpu_check}"
python=.venv/bin/python
[[ -x "$python" ]] || python=python3
mkdir -p "$output"

# step NAME command...: runs it unless it has passed for these sources, keeping what it prints.
sources="$(cat csrc/*.h csrc/*.cpp csrc/*/* sparsemm/ops/*.py tests/ops/test_ops_gpu.py | sha256sum | cut -c1-16)"
step() {
    local name="$1" mark
    shift
    mark="$output/$name.$sources.passed"
    if [[ -e "$mark" ]]; then
        echo "$name: passed before"
        return
    fi
    echo "$name: $*"
    local begun=$SECONDS
    "$@" 2>&1 | tee "$output/$name.log"
    echo "$((SECONDS - begun)) s" > "$mark"
}

if [[ -n "${DRY:-}" ]]; then
    gpu_tests=(tests/ops/test_ops_gpu.py -q)  # are collected, and skip themselves
    place=(--device cpu)
    SHAPES="${SHAPES:-tiny}" PROMPTS="${PROMPTS:-256}" BUDGETS="${BUDGETS:-64}" BATCHES="${BATCHES:-1}"
    whole=(--model "${MODEL:-tiny}" --prompts "64,128" --budgets 48 --steps 3 --warmup 1 --throughput-prompts "")
else
    gpu_tests=(tests)
    place=()
    SHAPES="${SHAPES:-vicuna-7b mistral-7b qwen2-vl-7b}" PROMPTS="${PROMPTS:-4096 32768 131072}"
    whole=(--model "${MODEL:-vicuna-7b}" --prompts "2048,32768" --budgets 256 --throughput-prompts "")
    "$python" csrc/build.py  # costs nothing when nothing has changed
    "$python" - <<'CODE'
import sys

import torch

from sparsemm.ops import library

if not torch.cuda.is_available():
    sys.exit("gpu-check: built; from here on a GPU is needed, and torch sees none")
if not library.is_loaded("cuda"):
    sys.exit("gpu-check: the CUDA kernels are not built; is nvcc installed?")
print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
CODE
fi

step tests "$python" -m pytest -m gpu "${gpu_tests[@]}" -p no:cacheprovider
if [[ -n "${DRY:-}" ]]; then
    echo "memcheck, racecheck and synccheck: nothing to check on a CPU"
elif sanitizer="$(command -v compute-sanitizer)"; then
    for tool in memcheck racecheck synccheck; do
        step "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -m gpu tests/ops/test_ops_gpu.py -k small_run -p no:cacheprovider
    done
else
    echo "compute-sanitizer is not installed: memcheck, racecheck and synccheck left out"
fi

options_from SHAPES PROMPTS BUDGETS BATCHES FRESH
run_sparsemm bench kernels "${options[@]}" "${place[@]}" --time-limit "${BENCH_SECONDS:-240}" \
    --output "$output/kernels.json" --no-progress "$@" | tee "$output/kernels.log"

options=()
options_from FRESH
run_sparsemm bench e2e "${whole[@]}" "${place[@]}" --methods hf,fullkv,sparsemm "${options[@]}" --output "$output/e2e" \
    | tee "$output/e2e.log"
