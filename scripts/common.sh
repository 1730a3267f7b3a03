# Sourced by the scripts of this folder: finds the program, prints a script's own help, collects options.

scripts_folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Prints the comment at the head of the calling script and leaves, if --help is among the arguments.
help_if_asked() {
    local argument
    for argument in "$@"; do
        if [[ "$argument" == "--help" || "$argument" == "-h" ]]; then
            sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
            exit 0
        fi
    done
}

# options+=(--name value) for every variable that is set: option_from VARIABLE --name ...
options=()
option_from() {
    while (($# >= 2)); do
        if [[ -n "${!1:-}" ]]; then
            options+=("$2" "${!1}")
        fi
        shift 2
    done
}

# The program of the checkout's virtual environment where there is one, else the one on the path.
run_sparsemm() {
    local program="$scripts_folder/../.venv/bin/sparsemm"
    if [[ ! -x "$program" ]]; then
        program="$(command -v sparsemm)" || {
            echo "sparsemm is not installed: run 'make install' first" >&2
            exit 1
        }
    fi
    "$program" "$@"
}

# run_accelerate PROCESSES command...: the same, in several processes that share the work.
run_accelerate() {
    local python="$scripts_folder/../.venv/bin/python" processes="$1"
    shift
    [[ -x "$python" ]] || python=python3
    # --multi_gpu starts the processes; without a GPU they compute on the CPU.
    "$python" -m accelerate.commands.launch --multi_gpu --num_processes "$processes" --num_machines 1 \
        --mixed_precision no --dynamo_backend no --main_process_port 0 -m sparsemm "$@"
}

# A chase with MODEL and the other variables of scripts/chase_visual_head, in one process or PROCESSES.
run_chase() {
    option_from MODEL --model DATASET --dataset NUM_IMAGES --num-images MATCH --match OUTPUT --output DEVICE --device \
        DTYPE --dtype
    if [[ "${PROCESSES:-1}" -gt 1 ]]; then
        run_accelerate "$PROCESSES" chase "${options[@]}" "$@"
    else
        run_sparsemm chase "${options[@]}" "$@"
    fi
}
