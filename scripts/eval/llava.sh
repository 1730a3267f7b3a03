#!/usr/bin/env bash
# Benchmarks of the paper (Table 3) with LLaVA-NeXT and a Vicuna language model.
#
#   bash scripts/eval/llava.sh                                             # the miniature, offline tasks
#   MODEL=llava-hf/llava-v1.6-vicuna-7b-hf bash scripts/eval/llava.sh      # the real thing
#
# Finished cells are skipped and an interrupted one goes on; `sparsemm tables $OUTPUT` prints the tables.
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id            (llava-vicuna)
#   METHODS        methods, or METHOD for a single one               (the paper's eight; rate_distortion, ... by name)
#   BUDGETS        rows per kv head, or BUDGET for one value         (64 ... 2048, miniatures: 8 ... 128)
#   TASKS          tasks of lmms-eval                                (the five of Table 3)
#   RATIO          share of the budget all heads get alike           (0.1)
#   ROUNDING       paper or exact                                    (paper, miniatures: exact)
#   MASK_RATIO     share of heads masked by mask, mask_random        (0.1)
#   HEAD_SCORES    score file                                        (head_scores/<name of the model>.json)
#                  for rate_distortion*, head_kv a calibration       (head_scores/calibrations/<name of the model>.json)
#   LIMIT          documents a cell                                  (all, miniatures: 200)
#   NUM_PROCESSES  data-parallel processes, one a GPU                (1)
#   TENSOR_PARALLEL processes (GPUs) that divide every layer     (none: each has a whole model)
#   BATCH_SIZE     prompts generated together                        (1)
#   OUTPUT         folder of the results                             (results/lmms-eval)
#   DEVICE         cpu, cuda, or auto: a large model over all GPUs   (cuda where there is one)
#   also WINDOW_SIZE, SEED, MASK_MODE, DTYPE, MIN_PIXELS, MAX_PIXELS, ATTN_IMPLEMENTATION, DECODE_BACKEND
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL="${MODEL:-llava-vicuna}"
run_evaluation "$@"
