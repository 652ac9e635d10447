# shellcheck shell=bash
# What the train_*.sh scripts of this folder share. Sourced by them, it does nothing by itself.
#
#   parse_options NAMES "$@"          read the options that the script has, and the flags behind --
#   train_case KIND LOG RUN FLAG...   run train.py and report; KIND is perf or mAP, LOG is ID/FILE below test/output,
#                                     RUN names the folder of the models below output/train
#   eval_case KIND LOG FLAG...        run validate.py on --pth_path and report
#
# Flags after -- come last on the command line, so they win over everything here; what they might switch off is in
# configs/ascend_*.yaml. Relative paths count from where the user stands. From the environment: PYTHON (default
# python3), ASCEND_DEVICE_ID, etp_running_flag=true (leave the NPU's environment alone).
set -euo pipefail
SECONDS=0 # of this run

TEST_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
ROOT=$(dirname "$TEST_DIR")
PYTHON=${PYTHON:-python3}

fail() {
    printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

# ---- options -------------------------------------------------------------------------------------------------------

# parse_options NAMES ARGUMENT...: set data_path, pth_path and device_id from --NAME=VALUE, extra_flags from what is
# behind --, and check them. Nothing has been changed on disk when this fails.
parse_options() {
    local names=$1 name
    shift
    data_path='' pth_path='' device_id=${ASCEND_DEVICE_ID:-0} extra_flags=()
    while (($#)); do
        name=${1%%=*} name=${name#--}
        case $1 in
            --)
                shift
                extra_flags=("$@")
                break
                ;;
            --*=*)
                [[ " $names " == *" $name "* ]] || fail "unknown option $1; $(known_options "$names")"
                printf -v "$name" '%s' "${1#*=}"
                ;;
            *) fail "cannot read '$1'; $(known_options "$names")" ;;
        esac
        shift
    done
    [[ -n $data_path ]] || fail "--data_path=DIR is missing: the folder with annotations/, train2017/ and val2017/"
    data_path=$(find_path "$data_path")
    [[ -d $data_path ]] || fail "--data_path=$data_path: there is no such folder"
    if [[ " $names " == *" pth_path "* ]]; then
        [[ -n $pth_path ]] || fail "--pth_path=FILE is missing: the checkpoint to work with"
        pth_path=$(find_path "$pth_path")
        [[ -f $pth_path ]] || fail "--pth_path=$pth_path: there is no such file"
    fi
    [[ " $names " != *" device_id "* || $device_id =~ ^(0|[1-9][0-9]*)$ ]] ||
        fail "the device is '$device_id' (--device_id=N or ASCEND_DEVICE_ID): must be a whole number such as 0"
}

known_options() {
    printf 'the options are --%s, and behind -- any flag of the Python script' "${1// /=VALUE --}=VALUE"
}

# find_path PATH: the path itself, or below the repository where it exists only there (as for the original scripts).
find_path() {
    if [[ ! -e $1 && $1 != /* && -e $ROOT/$1 ]]; then
        printf '%s' "$ROOT/$1"
    else
        printf '%s' "$1"
    fi
}

# last_value FLAG ARGUMENT...: what the arguments say last for a flag; empty where they do not have it.
last_value() {
    local flag=$1 value=''
    while shift && (($#)); do
        case $1 in
            "$flag") value=${2-} ;;
            "$flag="*) value=${1#*=} ;;
        esac
    done
    printf '%s' "$value"
}

# run_folder NAME: where the checkpoints of a run go.
run_folder() {
    local flags=(--output "$ROOT/output/train" --experiment "$1" ${extra_flags[@]+"${extra_flags[@]}"})
    printf '%s/%s' "$(last_value --output "${flags[@]}")" "$(last_value --experiment "${flags[@]}")"
}

# host_ip: the first address of this machine.
host_ip() {
    local addresses
    addresses=$(hostname -I 2>/dev/null) || addresses=''
    addresses=${addresses%% *}
    printf '%s' "${addresses:-127.0.0.1}"
}

# ---- runs ----------------------------------------------------------------------------------------------------------

train_case() {
    local kind=$1 log=$2 name=$3 folder
    shift 3
    command=("$ROOT/train.py" "$@" --root "$data_path" --addr "$(host_ip)" --output "$ROOT/output/train"
        --experiment "$name" ${extra_flags[@]+"${extra_flags[@]}"})
    folder=$(run_folder "$name")
    check_run_folder "$folder" "$(last_value --resume "${command[@]}")"
    execute "$log"
    report "$kind" "$folder/metrics.json" --losses "$folder/metrics.jsonl"
}

eval_case() {
    local kind=$1 log=$2
    shift 2
    command=("$ROOT/validate.py" "$@" --root "$data_path" --addr "$(host_ip)" --checkpoint "$pth_path"
        --output "$TEST_DIR/output/${log%%/*}" --metrics "$TEST_DIR/output/${log%%/*}/metrics.json"
        ${extra_flags[@]+"${extra_flags[@]}"})
    execute "$log"
    report "$kind" "$(last_value --metrics "${command[@]}")"
}

# check_run_folder FOLDER RESUME: a run must not write over another one's checkpoints, nor lie where the next one
# empties the folder, nor be where the report does not look.
check_run_folder() {
    local real
    [[ $1 != */ && " ${extra_flags[*]-} " != *" run.output="* && " ${extra_flags[*]-} " != *" run.experiment="* ]] ||
        fail "name the run's folder by --output DIR and --experiment NAME, so that its results are found"
    real=$(realpath -m -- "$1")
    [[ $real/ != "$(realpath -m -- "$TEST_DIR/output")"/* ]] ||
        fail "checkpoints below test/output would be deleted by the next run: give another --output than $1"
    [[ -z $2 || -f $2 ]] ||
        fail "there is no checkpoint $2 to resume: train it first, or name one with -- --resume FILE"
    [[ ! -e $1/last.pth.tar || (-n $2 && $(realpath -- "$2") == "$real"/*) ]] ||
        fail "$1 holds a run already: continue it with -- --resume '$1/last.pth.tar', or name the new one with \
-- --experiment NAME"
}

# execute LOG: run `command` with an emptied log folder; end with its exit code when it fails.
execute() {
    local device status=0
    command -v "$PYTHON" >/dev/null || fail "there is no '$PYTHON': activate the environment, or set PYTHON"
    device=$(last_value --device "${command[@]}")
    device=${device:-npu} # as in configs/ascend_*.yaml
    if [[ ${etp_running_flag:-} != true && $device =~ ^(npu|auto) ]]; then
        # shellcheck source=set_npu_env.sh
        source "$TEST_DIR/set_npu_env.sh" || [[ $device == auto ]] ||
            fail "without CANN there is no NPU to run on; for another device give -- --device cpu (or cuda)"
    fi
    empty_log_dir "$TEST_DIR/output/${1%%/*}"
    started=$(date +%s)
    "$PYTHON" -u "${command[@]}" 2>&1 | tee -- "$TEST_DIR/output/$1" || status=$?
    if ((status)); then
        printf '%s: the run failed with exit code %d; its log is %s\n' "$(basename "$0")" "$status" \
            "$TEST_DIR/output/$1" >&2
        exit "$status"
    fi
}

# empty_log_dir DIR: make it anew, unless the user has named something in it.
empty_log_dir() {
    local given
    log_dir=$1
    for given in "$data_path" "$pth_path" ${extra_flags[@]+"${extra_flags[@]#--*=}"}; do
        [[ ! -e $given || $(realpath -- "$given")/ != "$(realpath -m -- "$log_dir")"/* ]] ||
            fail "$given lies in $log_dir, which is emptied before the run: move it to another folder"
    done
    rm -rf -- "$log_dir"
    mkdir -p -- "$log_dir"
}

# report KIND METRICS ARGUMENT...: print the results and write CASE.log, from what Python wrote.
report() {
    "$PYTHON" "$TEST_DIR/report.py" --kind "$1" --metrics "$2" --since "$started" --seconds "$SECONDS" \
        --log-dir "$log_dir" "${@:3}" || fail "the run ended well, but its results are not to be had"
}
