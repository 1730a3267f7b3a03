# Sourced by the scripts of this folder: options from variables, and the runner of the lmms-eval plug-in.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

evaluation_options() {
    METHODS="${METHODS:-${METHOD:-}}"
    BUDGETS="${BUDGETS:-${BUDGET:-}}"
    option_from MODEL --model METHODS --methods BUDGETS --budgets TASKS --tasks RATIO --ratio ROUNDING --rounding \
        MASK_RATIO --mask-ratio MASK_MODE --mask-mode HEAD_SCORES --head-scores WINDOW_SIZE --window-size SEED --seed \
        LIMIT --limit NUM_PROCESSES --num-processes BATCH_SIZE --batch-size OUTPUT --output DEVICE --device \
        DTYPE --dtype MIN_PIXELS --min-pixels MAX_PIXELS --max-pixels ATTN_IMPLEMENTATION --attn-implementation \
        DECODE_BACKEND --decode-backend
}

# The python of the checkout's virtual environment where there is one, else the one on the path.
run_evaluation() {
    local python="$scripts_folder/../.venv/bin/python"
    [[ -x "$python" ]] || python=python
    "$python" -c 'import lmms_eval, sparsemm_lmms_eval' 2>/dev/null || {
        echo "lmms-eval and its plug-in are not installed: see lmms-eval/README.md" >&2
        exit 1
    }
    "$python" -m sparsemm_lmms_eval run "$@"
}
