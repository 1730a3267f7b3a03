#!/usr/bin/env bash
# Every method on both offline tasks at every budget: accuracy, and one method against the best other, page by page.
#
#   bash scripts/others/method_tables.sh
#
# What is finished stays: an interrupted run goes on where it stopped, and shows how long the model at hand will take.
# With the defaults 92 cells of 400 pages for each model: on a CPU core about a quarter of an hour.
#
# Variables:
#   MODELS         miniatures, those not in assets/ are left out   (llava-vicuna llava-mistral qwen2-vl qwen3-vl)
#   METHODS        methods, or METHOD for a single one             (all that draw and mask nothing)
#   BUDGETS        rows per kv head, or BUDGET for one value       (8 12 16 24 32 64 128)
#   DOCUMENTS      held-out pages, half of them for each task      (400)
#   PAGE_SEED      another seed draws other pages                  (0; calibrations are made on those of 1)
#   PAIR           the method that is compared with the best other (rate_distortion_mixkv)
#   OUTPUT         folder of results, tables and plots             (results/methods)
#   DEVICE, DTYPE  where and how precisely to compute              (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

DOCUMENTS="${DOCUMENTS:-400}"
METHODS="${METHODS:-fullkv streaming_llm knorm keydiff snapkv expected_attention mixkv pyramidkv adakv vl_cache head_kv \
sparsemm rate_distortion rate_distortion_mixkv}"
output="${OUTPUT:-results/methods}"
options_from METHODS BUDGETS DOCUMENTS PAGE_SEED DEVICE DTYPE
for model in ${MODELS:-llava-vicuna llava-mistral qwen2-vl qwen3-vl}; do
    if [[ ! -f "$scripts_folder/../assets/miniatures/$model/config.json" ]]; then
        echo "$model is not in assets/miniatures: left out" >&2
        continue
    fi
    run_sparsemm evaluate --model "$model" --output "$output/$model" "${options[@]}"
    run_sparsemm report "$output/$model/results.json" --pair "${PAIR:-rate_distortion_mixkv}" | tee "$output/$model/table.md"
done
