#!/usr/bin/env bash
# Benchmarks of the paper (Tables 3 and 4) with Qwen2-VL.
#
#   bash scripts/eval/qwen.sh                                             # the miniature, offline tasks
#   MODEL=Qwen/Qwen2-VL-7B-Instruct bash scripts/eval/qwen.sh      # the real thing
#
# Finished cells are skipped and an interrupted one goes on; `sparsemm tables $OUTPUT` prints the tables.
#
# Variables:
#   MODEL          miniature, checkpoint folder or hub id            (qwen2-vl)
#   METHODS        methods, or METHOD for a single one               (the paper's eight; rate_distortion, ... by name)
#   BUDGETS        rows per kv head, or BUDGET for one value         (64 ... 2048, Table 4: 48 ... 512, miniatures: 8 ... 128)
#   TASKS          tasks of lmms-eval                                (those of Tables 3 and 4)
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

MODEL="${MODEL:-qwen2-vl}"
run_evaluation --short-tasks "$@"
