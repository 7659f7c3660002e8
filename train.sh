#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh train.sh
# The whole pipeline: environment, phase 1 (steps 0-5000), proof that it is complete, phase 2
# (5000-5050). Interrupted, it goes on where it was; finished, it says so and does nothing.
#
#   ./train.sh
#   ./train.sh --config config.yaml training.batch_size=24
#   ./train.sh --input_file mine.txt --save_dir checkpoints-mine --log_dir logs-mine
#   ./train.sh --input_file books --input_file 'web/*.jsonl.zst'        folders and quoted globs too
#   ./train.sh --init_from HuggingFaceTB/SmolLM2-135M --input_file mine.txt   from weights: also a path
#   ./train.sh --resume checkpoints/step_003000 --save_dir longer --log_dir logs-longer   from another run's
#   DEBUG=1 ./train.sh                 with the debugging variables and tracebacks
#
# At 192 x 2048 = 393,216 tokens a step the default run sees 1.97 billion tokens.
# The exit code is Python's: 0 done, 2 configuration, 3 input or checkpoint, 4 diverged, 5 locked,
# 130 / 143 stopped by SIGINT / SIGTERM after saving.

set -uo pipefail
start_directory=$PWD
unset CDPATH # cd would go elsewhere, and print it
cd "$(dirname "$(readlink -f "$0")")" || exit 1 # also through a link to this script

config="" save_dir=checkpoints log_dir=logs
inputs=() init_from=() overrides=() resume=auto
# Paths are relative to where the command was typed; URLs are none, and Python expands ~.
absolute() { case $1 in /* | "~"* | *://*) echo "$1" ;; *) echo "$start_directory/$1" ;; esac; }
# Or owner/name of the Hub, where there is no directory `owner`: hf:// says so for certain.
is_id() { [[ $1 =~ ^[[:alnum:]_-][[:alnum:]._-]*/[[:alnum:]_-][[:alnum:]._-]*$ && ! -e $start_directory/${1%/*} ]]; }
path_or_id() { if is_id "$1"; then echo "hf://$1"; else absolute "$1"; fi; }
while [ $# -gt 0 ]; do
    case $1 in
    --config | --input_file | --save_dir | --log_dir | --init_from | --resume)
        [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
        [ -n "$2" ] || { echo "error: $1: got an empty path" >&2; exit 2; }
        if [ "$1" = --input_file ]; then
            inputs+=(--input_file "$(absolute "$2")") # without it data.input_files serves
        elif [ "$1" = --init_from ]; then
            init_from=(--init_from "$(path_or_id "$2")") # phase 1 only
        elif [ "$1" = --resume ]; then
            case $2 in auto | never) resume=$2 ;; *) resume=$(absolute "$2") ;; esac
        else
            declare "${1#--}=$(absolute "$2")"
        fi
        shift 2
        ;;
    --config=* | --input_file=* | --save_dir=* | --log_dir=* | --init_from=* | --resume=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
    training.device=cpu) export GPU_DEVICES=none; overrides+=("$1"); shift ;; # as without a GPU
    tokenizer.source=gpt2 | tokenizer.source=train) overrides+=("$1"); shift ;;
    data.validation_file=null) overrides+=("$1"); shift ;;
    tokenizer.source=*) overrides+=("${1%%=*}=$(path_or_id "${1#*=}")"); shift ;;
    data.cache_dir=* | data.validation_file=*)
        overrides+=("${1%%=*}=$(absolute "${1#*=}")")
        shift
        ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' train.sh; exit 0 ;;
    -*) echo "error: unknown flag $1 (see ./train.sh --help)" >&2; exit 2 ;;
    *) overrides+=("$1"); shift ;;
    esac
done

# Python runs in a process group of its own (set -m), and signals are passed on exactly once: a
# shell that waits for a foreground child would not act on them, and Ctrl-C would arrive twice.
child=0
pass_on() {
    stopped=$2
    [ "$child" = 0 ] || kill -s "$1" "$child" 2>/dev/null
}
stopped=0
trap '' PIPE # the reader of the output may go away; the log files have it all
trap 'pass_on INT 130' INT
trap 'pass_on TERM 143' TERM
trap 'pass_on HUP 129' HUP
trap 'pass_on USR1 138' USR1
# Ctrl-Z would stop this shell alone: the training, a process group of its own, stops with it and
# goes on with it. (No trap on CONT: a closed terminal sends it with HUP, which bash then loses.)
to_group() { [ "$child" = 0 ] || kill -s "$1" -- "-$child" 2>/dev/null; }
trap 'to_group STOP; kill -s STOP $$; to_group CONT' TSTP

run() {
    local code=0 last
    [ "$stopped" = 0 ] || exit "$stopped"
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    [ "$stopped" = 0 ] || kill -s TERM "$child" # a signal between the check and the start
    while true; do
        wait "$child"
        last=$?
        [ "$last" = 127 ] || code=$last # 127: it was waited for already
        kill -0 "$child" 2>/dev/null || break
    done
    wait "$child" 2>/dev/null
    last=$?
    [ "$last" = 127 ] || code=$last
    child=0
    return "$code"
}

source ./env.sh || exit
[ "$stopped" = 0 ] || exit "$stopped"

if [ "$GPUS" = 0 ] && [ -z "$config" ]; then
    echo "notice: no usable GPU: training the small model of config_cpu.yaml instead of the 123.6M one" \
        "(--config config.yaml would train that on the CPU, very slowly)"
    config=config_cpu.yaml
fi
config=${config:-config.yaml}

launcher=("$PYTHON")
if [ "$GPUS" -gt 1 ] || [ -n "${NNODES:-}" ]; then
    # One process per GPU. For several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.
    launcher=("$PYTHON" -m smollm.launch --nproc_per_node="${NPROC_PER_NODE:-$GPUS}")
    if [ -n "${NNODES:-}" ]; then
        launcher+=(--nnodes="$NNODES" --node_rank="${NODE_RANK:-0}"
            --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}")
    else
        launcher+=(--standalone)
    fi
    # torchrun passes only these on, and has its processes killed when they take longer to save
    # (https://docs.pytorch.org/docs/stable/elastic/run.html; read as PET_<option>).
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGUSR1}
    export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}
    EXIT_CODE_FILE=$(mktemp)
    export EXIT_CODE_FILE
    trap 'rm -f "$EXIT_CODE_FILE"' EXIT
fi

phase() {
    run "${launcher[@]}" "$@" && return 0
    local code=$?
    # torchrun has an exit code of its own; rank 0 leaves Python's in this file.
    [ -z "${EXIT_CODE_FILE:-}" ] || [ ! -s "$EXIT_CODE_FILE" ] || code=$(cat "$EXIT_CODE_FILE")
    exit "$code"
}

common=(--config "$config" ${inputs[@]+"${inputs[@]}"} --save_dir "$save_dir" --log_dir "$log_dir")
phase train.py "${common[@]}" --resume "$resume" ${init_from[@]+"${init_from[@]}"} ${overrides[@]+"${overrides[@]}"}
phase continue_training.py "${common[@]}" ${overrides[@]+"${overrides[@]}"}
echo "done: checkpoints in $save_dir, logs and plots in $log_dir;" \
    "python generate.py --checkpoint $save_dir/latest" 2>/dev/null
exit 0
