#!/usr/bin/env bash
# The masking experiment: how much a model still reads without its visual heads, and without random others.
#
#   bash scripts/eval/mask.sh [options of `sparsemm mask`, such as --fresh]
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id      (qwen2-vl)
#   HEADS          numbers of heads to mask                    (miniatures: 0 1 2 3 4 6 8)
#   SHARES         the same in per cent of all heads           (0 1 2 5 10 20)
#   SEEDS          seeds of the random heads                   (0 1 2 3 4)
#   DOCUMENTS      number of held-out pages                    (64)
#   MASK_MODE      zero_query (the original's) or zero_output  (zero_query)
#   HEAD_SCORES    score file                                  (head_scores/<name of the model>.json)
#   OUTPUT         folder of masking.json and masking.png      (results/masking/<name of the model>)
#   FRESH          1 measures again what OUTPUT holds
#   DEVICE, DTYPE  where and how precisely to compute          (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

options_from MODEL HEADS SHARES SEEDS DOCUMENTS MASK_MODE HEAD_SCORES OUTPUT DEVICE DTYPE FRESH
run_sparsemm mask ${options[@]+"${options[@]}"} "$@"
