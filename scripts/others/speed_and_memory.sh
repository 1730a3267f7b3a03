#!/usr/bin/env bash
# Time to the first token, time per token and memory of whole models, by method and prompt length: tables and a figure.
#
#   bash scripts/others/speed_and_memory.sh [options of `sparsemm bench e2e`, such as --fresh or --no-graph]
#
# Random weights of the true shapes unless MODEL names a checkpoint; finished cells are kept, so a stopped run goes on.
# Variables:
#   MODEL          vicuna-7b, mistral-7b, qwen2-vl-7b, tiny; a folder or hub id   (vicuna-7b, without a GPU: tiny)
#   METHODS        methods and baselines, or METHOD for a single one
#                  (hf fullkv sparsemm snapkv pyramidkv adakv original, kvpress where it is installed)
#   BUDGETS        rows per kv head, or BUDGET for one value                      (256, without a GPU: 64)
#   PROMPTS        prompt lengths in tokens                                       (2048 … 131072, without a GPU: 256 … 2048)
#   BATCHES        batch sizes                                                    (1)
#   STEPS          decode steps timed                                             (100)
#   HEAD_SCORES    score file; by default skewed random scores
#   ATTN_IMPLEMENTATION  prefill attention: sdpa, flash_attention_2, eager        (sdpa)
#   DECODE_BACKEND auto, cuda, fa3, flash_attn, torch_varlen, cpu, reference      (auto)
#   OUTPUT         folder of the results                                          (results/speed_and_memory)
#   FRESH          1 measures again what OUTPUT holds
#   TENSOR_PARALLEL processes (GPUs) that divide every layer                      (none: one has the whole model)
#   DEVICE, DTYPE  where and how precisely to compute                             (cuda and bfloat16, or cpu and float32)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

options_from MODEL METHODS BUDGETS PROMPTS BATCHES STEPS HEAD_SCORES ATTN_IMPLEMENTATION DECODE_BACKEND OUTPUT \
    DEVICE DTYPE TENSOR_PARALLEL FRESH
run_sparsemm bench e2e ${options[@]+"${options[@]}"} "$@"
