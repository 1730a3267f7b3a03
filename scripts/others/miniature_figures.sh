#!/usr/bin/env bash
# Every figure about the miniatures that this repository reports, made again, one step after another for each of them:
#
#   scores     head scores and calibration; the scores by other fonts and match rules, and what chasing costs
#   masks      visual heads masked, and as many random others
#   pictures   what heads look at, budgets, rows kept, sparsity of the scores, example pages
#   tables     methods and ablations through lmms-eval, the methods with windows of 8 and 12, too; random heads three
#              times over (qwen3-vl-wide, whose pages lmms-eval's tasks have not: random heads, and another ratio)
#   methods    every method, page by page, with paired differences     (scripts/others/method_tables.sh)
#   rows       single heads given other rows                           (scripts/others/head_rows.sh)
#
#   bash scripts/others/miniature_figures.sh
#
# What is finished stays: an interrupted run goes on where it stopped. One core of a shared CPU takes about 1.2 hours for
# each miniature: scores 5 minutes, masks 5, pictures 2, tables 40, methods 15, rows 5 (qwen3-vl-wide: tables 15,
# methods 45).
#
# Variables:
#   STEPS          of the above                                    (scores masks pictures tables methods rows)
#   MODELS         miniatures, those not in assets/ are left out   (all five)
#   NUM_IMAGES     pages of every chase                            (200)
#   DOCUMENTS      pages of the masking experiment                 (64)
#   SEEDS          of the random heads that are masked             (0 1 2 3 4)
#   BUDGET         budget of the pictures                          (24, qwen3-vl-wide 64)
#   OUTPUT         folder of tables and of what is compared        (results/miniatures)
#   PICTURES       folder of the pictures of the first model       (assets/pictures)
#   FRESH          1 makes head scores, calibrations and masks again
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

output="${OUTPUT:-results/miniatures}"
pictures="${PICTURES:-assets/pictures}"
steps="${STEPS:-scores masks pictures tables methods rows}"
options_from FRESH
wide_pages=200 # instead of 400, for they have more than twice as many tokens
models=()
score_files=()
for model in ${MODELS:-llava-vicuna llava-mistral qwen2-vl qwen3-vl qwen3-vl-wide}; do
    if [[ -f "$scripts_folder/../assets/miniatures/$model/config.json" ]]; then
        models+=("$model")
        score_files+=("head_scores/$model.json")
    else
        echo "$model is not in assets/miniatures: left out" >&2
    fi
done

# chase_into FILE option...: head scores of $model.
chase_into() {
    run_sparsemm chase --model "$model" --num-images "${NUM_IMAGES:-200}" --output "$1" "${options[@]}" "${@:2}"
}

scores() {
    chase_into "head_scores/$model.json"
    chase_into "$folder/train_fonts.json" --fonts train
    chase_into "$folder/unique.json" --match unique
    run_sparsemm calibrate --model "$model" "${options[@]}"
    run_sparsemm head-scores show "head_scores/$model.json" --top 5
    echo "-- held-out against training fonts and words"
    run_sparsemm head-scores compare "head_scores/$model.json" "$folder/train_fonts.json" --fraction 0.125
    echo "-- aligned against unique"
    run_sparsemm head-scores compare "head_scores/$model.json" "$folder/unique.json" --fraction 0.125
    echo "-- cost of chasing"
    run_sparsemm bench chase --model "$model" --output "$folder/chase_cost.json"
}

masks() {
    run_sparsemm mask --model "$model" --documents "${DOCUMENTS:-64}" --seeds "${SEEDS:-0 1 2 3 4}" --output "$folder" \
        "${options[@]}"
}

pictures() {
    local budget="${BUDGET:-24}"
    [[ "$model" != *-wide ]] || budget="${BUDGET:-64}"
    run_sparsemm viz all --model "$model" --budget "$budget" --output "$folder/pictures"
    run_sparsemm viz calibration --model "$model" --budget "$budget" --output "$folder/pictures/calibration.png"
    [[ "$model" == "${models[0]}" ]] || return 0
    mkdir -p "$pictures"
    cp "$folder/pictures/"* "$pictures/"
    [[ ! -f "$folder/masking.png" ]] || cp "$folder/masking.png" "$pictures/"
    run_sparsemm viz sparsity "${score_files[@]}" --output "$pictures/sparsity.png"
    run_sparsemm data convert documents "$output/pages" --num-images 1 --seed 3 --page-size 420x560 --no-progress ||
        echo "the example page is in $output/pages already" >&2
    cp "$output/pages/images/img_000001.png" "$pictures/document.png"
    run_sparsemm data convert miniature "$output/miniature_pages" --num-images 4 --seed 3 --no-progress ||
        echo "the miniatures' page is in $output/miniature_pages already" >&2
    cp "$output/miniature_pages/images/img_000004.png" "$pictures/page.png"
}

tables() {
    local seed
    if [[ "$model" == *-wide ]]; then
        echo "the pages of lmms-eval's offline tasks are too small for $model: random heads and another ratio, on its own"
        for seed in 0 1 2; do
            evaluate_wide "random-$seed" --methods random --seed "$seed"
        done
        evaluate_wide ratio-0.5 --methods sparsemm --ratio 0.5
        return 0
    fi
    export MODEL="$model" BATCH_SIZE=16 OUTPUT="$output/lmms-eval"
    bash "$scripts_folder/eval/qwen.sh"
    bash "$scripts_folder/eval/ablation.sh"
    for_other_seeds random mask_random
    WINDOW_SIZE=8 with_window "8 16 24 32 64 128"
    WINDOW_SIZE=12 with_window "16 24 32 64 128"
}

# evaluate_wide NAME option...: as `methods` does, with its pages, into a folder of its own.
evaluate_wide() {
    run_sparsemm evaluate --model "$model" --documents "${DOCUMENTS:-$wide_pages}" --output "$folder/$1" "${@:2}"
}

# with_window BUDGETS: the methods with another window, WINDOW_SIZE.
with_window() {
    export WINDOW_SIZE BUDGETS="$1"
    METHODS="snapkv pyramidkv adakv sparsemm random" bash "$scripts_folder/eval/qwen.sh"
    for_other_seeds random
}

# for_other_seeds METHOD...: methods that draw heads, twice more.
for_other_seeds() {
    local seed
    for seed in 1 2; do
        SEED=$seed METHODS="$*" bash "$scripts_folder/eval/qwen.sh"
    done
}

methods() {
    local pages=400
    [[ "$model" != *-wide ]] || pages=$wide_pages
    MODELS="$model" OUTPUT="$output/methods" DOCUMENTS="${DOCUMENTS:-$pages}" bash "$scripts_folder/others/method_tables.sh"
}

rows() {
    local cases="$model:fullkv"
    [[ "$model" != llava-vicuna ]] || cases="$cases $model:sparsemm:16"
    [[ "$model" != qwen2-vl ]] || cases="$cases $model:sparsemm:32"
    CASES="$cases" bash "$scripts_folder/others/head_rows.sh"
}

for step in $steps; do
    case "$step" in
        scores | masks | pictures | tables | methods | rows) ;;
        *) echo "STEPS holds $step; use scores masks pictures tables methods rows" >&2 && exit 2 ;;
    esac
    for model in "${models[@]}"; do
        folder="$output/$model"
        mkdir -p "$folder"
        echo "== $step of $model"
        ("$step") | tee "$folder/$step.txt"
    done
done
