#!/usr/bin/env bash
# The ablations of the paper: how much of the budget all heads share alike (Table 1), which cache parts count (Table 2).
#
#   bash scripts/eval/ablation.sh                                          # the miniature, offline tasks
#   MODEL=Qwen/Qwen2-VL-7B-Instruct bash scripts/eval/ablation.sh          # the real thing
#
# Variables, besides those of scripts/eval/qwen.sh:
#   MODEL          miniature, checkpoint folder or hub id      (qwen2-vl)
#   ABLATION       ratio (Table 1), parts (Table 2), or both   (both)
#   RATIO_BUDGETS  budget of Table 1, one value                (256, miniatures: 12)
#   RATIO_TASKS    tasks of Table 1                            (ocrbench, miniatures: both offline tasks)
#   PARTS_BUDGETS  budgets of Table 2                          (48 ... 512, miniatures: 8 ... 128)
#   PARTS_TASKS    tasks of Table 2                            (mmbench_en_dev_static, miniatures: both offline tasks)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MODEL="${MODEL:-qwen2-vl}"
ABLATION="${ABLATION:-both}"
METHODS=""
status=0
for table in ratio parts; do
    if [[ "$ABLATION" == "$table" || "$ABLATION" == both ]]; then
        prefix="$(tr a-z A-Z <<<"$table")"
        budgets="${prefix}_BUDGETS" tasks="${prefix}_TASKS"
        options=()
        BUDGETS="${!budgets:-}" TASKS="${!tasks:-}" run_evaluation --ablation "$table" "$@" || status=$?
    fi
done
exit "$status"
