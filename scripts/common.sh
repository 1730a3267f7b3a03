# Sourced by the scripts of this folder: prints a script's own help, finds the program, collects options.

scripts_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The comment at the head of the calling script, if --help is among its arguments.
for argument in "$@"; do
    if [[ "$argument" == "--help" || "$argument" == "-h" ]]; then
        sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
        exit 0
    fi
done

# options+=(--some-name value) for each named variable that is set: options_from SOME_NAME ... FRESH=1 is a bare --fresh.
options=()
options_from() {
    local name
    for name in "$@"; do
        [[ -n "${!name:-}" ]] || continue
        if [[ "$name" == FRESH ]]; then
            options+=(--fresh)
        else
            options+=("--$(tr A-Z_ a-z- <<<"$name")" "${!name}")
        fi
    done
}

# A single method or budget may be given as METHOD or BUDGET.
METHODS="${METHODS:-${METHOD:-}}"
BUDGETS="${BUDGETS:-${BUDGET:-}}"

# run_tool NAME arguments...: that of the checkout's virtual environment where there is one, else the one on the path.
run_tool() {
    local tool="$scripts_folder/../.venv/bin/$1"
    if [[ ! -x "$tool" ]]; then
        tool="$(command -v "$1")" || {
            echo "$1 is not installed: run 'make install' first" >&2
            exit 1
        }
    fi
    "$tool" "${@:2}"
}

# run_sparsemm command...: the program, in one process or PROCESSES that share the work.
run_sparsemm() {
    if [[ "${PROCESSES:-1}" -gt 1 ]]; then
        # --multi_gpu starts the processes; without a GPU they compute on the CPU. TENSOR_PARALLEL of them hold a model.
        run_tool python -m accelerate.commands.launch --multi_gpu \
            --num_processes "$((PROCESSES * ${TENSOR_PARALLEL:-1}))" --num_machines 1 \
            --mixed_precision no --dynamo_backend no --main_process_port 0 -m sparsemm "$@"
    else
        run_tool sparsemm "$@"
    fi
}

# The lmms-eval plug-in, with the variables of scripts/eval.
run_evaluation() {
    options_from MODEL METHODS BUDGETS TASKS RATIO ROUNDING MASK_RATIO MASK_MODE HEAD_SCORES WINDOW_SIZE SEED LIMIT \
        NUM_PROCESSES TENSOR_PARALLEL BATCH_SIZE OUTPUT DEVICE DTYPE MIN_PIXELS MAX_PIXELS ATTN_IMPLEMENTATION \
        DECODE_BACKEND
    run_tool python -c 'import lmms_eval, sparsemm_lmms_eval' 2>/dev/null || {
        echo "lmms-eval and its plug-in are not installed: see lmms-eval/README.md" >&2
        exit 1
    }
    run_tool python -m sparsemm_lmms_eval run "${options[@]}" "$@"
}
