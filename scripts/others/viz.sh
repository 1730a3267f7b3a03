#!/usr/bin/env bash
# Every kind of picture of one model and one page: head scores, sparsity, attention, budgets, kept positions.
#
#   bash scripts/others/viz.sh [options of `sparsemm viz all`]
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id      (qwen2-vl)
#   IMAGE          page to read                                (a held-out page of the miniatures)
#   PROMPT         what the model is asked                     (read everything)
#   METHOD         method whose budgets and rows are shown     (sparsemm)
#   BUDGET         mean prompt rows kept per kv head           (32)
#   RATIO          share of the budget all heads get alike     (0.1)
#   TOP, BOTTOM    heads drawn: highest and lowest scores      (4, 2)
#   HEAD_SCORES    score file                                  (head_scores/<name of the model>.json)
#   OUTPUT         folder of the pictures                      (results/viz/<model>/<page>-<method>-<budget>)
#   DEVICE, DTYPE  where and how precisely to compute          (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

options_from MODEL IMAGE PROMPT METHOD BUDGET RATIO TOP BOTTOM HEAD_SCORES OUTPUT DEVICE DTYPE
run_sparsemm viz all ${options[@]+"${options[@]}"} "$@"
