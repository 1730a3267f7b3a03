#!/usr/bin/env bash
# Why the methods differ on the miniatures: one kv head after the other is given other rows than its method gives it.
# With the full cache every head loses its rows but the window; under a budget every head gets the mean.
#
#   bash scripts/others/head_rows.sh
#
# Variables:
#   CASES          model:method[:budget], in turn     (the five that assets/benchmarks/README.md shows)
#   DOCUMENTS      held-out pages of both tasks       (128)
#   OUTPUT         folder of the JSON files and maps  (assets/benchmarks/head_rows)
#   FRESH          1 measures again what OUTPUT holds
#   DEVICE, DTYPE  where and how precisely to compute (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

cases="llava-vicuna:fullkv llava-mistral:fullkv qwen2-vl:fullkv llava-vicuna:sparsemm:16 qwen2-vl:sparsemm:32"
options_from DEVICE DTYPE FRESH
for each in ${CASES:-$cases}; do
    IFS=: read -r model method budget <<<"$each"
    name="$model-$method${budget:+-$budget}"
    echo "== $name"
    run_sparsemm head-rows --model "$model" --method "$method" ${budget:+--budget "$budget"} \
        --documents "${DOCUMENTS:-128}" --output "${OUTPUT:-assets/benchmarks/head_rows}/$name.json" \
        ${options[@]+"${options[@]}"} "$@"
done
