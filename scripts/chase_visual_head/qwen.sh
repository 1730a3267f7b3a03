#!/usr/bin/env bash
# Visual heads of Qwen2-VL: reads pages and writes head_scores/<name of the model>.json.
#
#   bash scripts/chase_visual_head/qwen.sh [options of `sparsemm chase`, such as --fresh]
#   MODEL=Qwen/Qwen2-VL-7B-Instruct bash scripts/chase_visual_head/qwen.sh      # the real thing
#   DATASET=nnethercott/synthdog-en-detection … the same on the data of the paper
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id      (qwen2-vl)
#   DATASET        generator (documents, miniature), hub id, annotation file, PDF file, or a folder of these
#                                                              (documents; for miniatures, miniature)
#   NUM_IMAGES     number of images                            (1000, as in the paper; miniatures 200)
#   MATCH          unique (the paper's rule) or aligned        (aligned for miniatures, else unique)
#   OUTPUT         score file                                  (head_scores/<name of the model>.json, of a local
#                                                              checkpoint head_scores.json in its folder)
#   FRESH          1 replaces a score file made from more images or with other settings
#   PROCESSES      processes that share the images, a GPU each (1)
#   TENSOR_PARALLEL processes (GPUs) that divide every layer  (none: each has a whole model)
#   DEVICE, DTYPE  where and how precisely to compute          (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL="${MODEL:-qwen2-vl}"
options_from MODEL DATASET NUM_IMAGES MATCH OUTPUT DEVICE DTYPE TENSOR_PARALLEL FRESH
run_sparsemm chase "${options[@]}" "$@"
