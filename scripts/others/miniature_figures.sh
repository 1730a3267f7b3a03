#!/usr/bin/env bash
# Every figure about the miniatures' visual heads that this repository reports, made again: head scores, their
# sparsity, two page styles and two match rules compared, the masking experiment, the cost of chasing, the pictures.
#
#   bash scripts/others/miniature_figures.sh
#
# Variables:
#   MODELS         miniatures, those not in assets/ are left out   (llava-vicuna llava-mistral qwen2-vl qwen3-vl)
#   NUM_IMAGES     pages of every chase                            (200)
#   DOCUMENTS      pages of the masking experiment                 (64)
#   SEEDS          of the random heads that are masked             (0 1 2 3 4)
#   BUDGET         budget of the pictures                          (24)
#   OUTPUT         folder of tables and of what is compared        (results/miniatures)
#   PICTURES       folder of the pictures of the first model       (assets/pictures)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

output="${OUTPUT:-results/miniatures}"
pictures="${PICTURES:-assets/pictures}"
count="${NUM_IMAGES:-200}"
first=""
score_files=()

for model in ${MODELS:-llava-vicuna llava-mistral qwen2-vl qwen3-vl}; do
    if [[ ! -f "$scripts_folder/../assets/miniatures/$model/config.json" ]]; then
        echo "$model is not in assets/miniatures: left out" >&2
        continue
    fi
    folder="$output/$model"
    scores="head_scores/$model.json"
    first="${first:-$model}"
    score_files+=("$scores")
    mkdir -p "$folder"
    run_sparsemm chase --model "$model" --num-images "$count" --output "$scores"
    run_sparsemm chase --model "$model" --num-images "$count" --fonts train --output "$folder/train_fonts.json"
    run_sparsemm chase --model "$model" --num-images "$count" --match unique --output "$folder/unique.json"
    {
        echo "== $model"
        run_sparsemm head-scores show "$scores" --top 5
        echo "-- held-out against training fonts and words"
        run_sparsemm head-scores compare "$scores" "$folder/train_fonts.json" --fraction 0.125
        echo "-- aligned against unique"
        run_sparsemm head-scores compare "$scores" "$folder/unique.json" --fraction 0.125
        echo "-- masking"
        run_sparsemm mask --model "$model" --head-scores "$scores" --documents "${DOCUMENTS:-64}" \
            --seeds "${SEEDS:-0 1 2 3 4}" --output "$folder"
        echo "-- cost of chasing"
        run_sparsemm bench chase --model "$model" --output "$folder/chase_cost.json"
    } | tee "$folder/figures.txt"
    run_sparsemm viz all --model "$model" --head-scores "$scores" --budget "${BUDGET:-24}" --output "$folder/pictures"
    run_sparsemm viz calibration --model "$model" --budget "${BUDGET:-24}" --output "$folder/pictures/calibration.png"
done

if [[ -n "$first" ]]; then
    mkdir -p "$pictures"
    cp "$output/$first/pictures/"* "$output/$first/masking.png" "$pictures/"
    run_sparsemm viz sparsity "${score_files[@]}" --output "$pictures/sparsity.png"
    run_sparsemm data convert documents "$output/pages" --num-images 1 --seed 3 --page-size 420x560 --no-progress ||
        echo "the example page is in $output/pages already" >&2
    cp "$output/pages/images/img_000001.png" "$pictures/document.png"
    run_sparsemm data convert miniature "$output/miniature_pages" --num-images 4 --seed 3 --no-progress ||
        echo "the miniatures' page is in $output/miniature_pages already" >&2
    cp "$output/miniature_pages/images/img_000004.png" "$pictures/page.png"
fi
