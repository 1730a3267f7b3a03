#!/usr/bin/env bash
# The whole method on a miniature: methods at several budgets on held-out pages, as a table, JSON and a plot.
#
#   bash scripts/quickstart.sh [options of `sparsemm quickstart`, such as --chase or --fresh]
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id      (llava-vicuna)
#   METHODS        methods, or METHOD for a single one; or all (the paper's eight, and rate_distortion_mixkv)
#   BUDGETS        rows per kv head, or BUDGET for one value   (miniatures: 8 12 16 24 32 64 128)
#   RATIO          share of the budget all heads get alike     (0.1)
#   MASK_RATIO     share of heads masked by mask, mask_random  (0.1)
#   DOCUMENTS      number of held-out pages                    (64)
#   HEAD_SCORES    score file                                  (head_scores/<name of the model>.json)
#   OUTPUT         folder of the results                       (results/quickstart)
#   FRESH          1 measures again what OUTPUT holds
#   DEVICE, DTYPE  where and how precisely to compute          (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options_from MODEL METHODS BUDGETS RATIO MASK_RATIO DOCUMENTS HEAD_SCORES OUTPUT DEVICE DTYPE FRESH
run_sparsemm quickstart ${options[@]+"${options[@]}"} "$@"
