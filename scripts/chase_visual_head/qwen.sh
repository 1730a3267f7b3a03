#!/usr/bin/env bash
# Visual heads of Qwen2-VL: reads synthetic pages and writes head_scores/<name of the model>.json.
#
#   bash scripts/chase_visual_head/qwen.sh [options of `sparsemm chase`, such as --fresh]
#   MODEL=Qwen/Qwen2-VL-7B-Instruct bash scripts/chase_visual_head/qwen.sh      # the real thing
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id      (qwen2-vl)
#   PAGES          number of pages; the paper took 1000        (200)
#   NUM_WORDS      words of a page, taking turns               (1 2 3 4)
#   PAGE_SIZE      side of a page in pixels                    (224)
#   MATCH          unique (the paper's rule) or aligned        (aligned for miniatures, else unique)
#   OUTPUT         score file                                  (head_scores/<name of the model>.json)
#   DEVICE, DTYPE  where and how precisely to compute          (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
help_if_asked "$@"

MODEL="${MODEL:-qwen2-vl}"
option_from MODEL --model PAGES --pages NUM_WORDS --num-words PAGE_SIZE --page-size MATCH --match OUTPUT --output \
    DEVICE --device DTYPE --dtype
run_sparsemm chase "${options[@]}" "$@"
