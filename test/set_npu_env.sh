# shellcheck shell=bash
# Find CANN and bring its environment into this shell:  source test/set_npu_env.sh
# Returns 1, with the places it looked at, when there is no CANN. What is set already stays.
#
# Of what the original port set, only the way to CANN and to the driver is still needed:
#   TASK_QUEUE_ENABLE=1, HCCL_WHITELIST_DISABLE=1, ASCEND_GLOBAL_LOG_LEVEL=3, ASCEND_SLOG_PRINT_TO_STDOUT=0 and
#       ASCEND_GLOBAL_EVENT_ENABLE=0 are the defaults by now.
#   COMBINED_ENABLE=0: also the default by now. torch_npu reads it still (1 joins two operators on non-contiguous
#       tensors); export it yourself if you want to try it.
#   PTCOPY_ENABLE, DYNAMIC_OP belong to torch 1.5's adapter; nothing reads them any more.
#   HCCL_IF_IP: HCCL finds its network card by itself; several machines may need it, and then each its own.
#   HCCL_CONNECT_TIMEOUT, HCCL_EXEC_TIMEOUT, HCCL_EVENT_TIMEOUT: effdet/runtime/device.py sets longer ones, for every way to
#       start a run.
#   ASCEND_RT_VISIBLE_DEVICES: follows from --device-list, in effdet/runtime/device.py.
#   ulimit -n: raise it yourself if the loader says "Too many open files".

# Candidates in order: the installation that the user points at, those on record with CANN's installer, the usual
# places; in each the layout since CANN 8.5, the one before, and the script of the oldest versions.
_cann_candidates() {
    local home base info
    for home in "${ASCEND_HOME_PATH:-}" "${ASCEND_TOOLKIT_HOME:-}"; do
        if [ -n "$home" ]; then
            printf '%s\n' "$home/set_env.sh" "$(dirname "$home")/set_env.sh" "$home/bin/setenv.bash"
        fi
    done
    {
        for info in "${HOME:-}/Ascend/ascend_cann_install.info" /etc/Ascend/ascend_cann_install.info; do
            if [ -r "$info" ]; then sed -n 's/^.*Install_Path[^=]*=//p' "$info"; fi
        done
        printf '%s\n' "${HOME:-}/Ascend" /usr/local/Ascend
    } | while IFS= read -r base; do
        printf '%s\n' "$base/set_env.sh" "$base/cann/set_env.sh"
        printf '%s\n' "$base"/cann-*/set_env.sh | sort -rV # the newest first
        printf '%s\n' "$base/ascend-toolkit/set_env.sh" "$base/nnae/set_env.sh" \
            "$base/ascend-toolkit/latest/bin/setenv.bash" "$base/nnae/latest/bin/setenv.bash"
    done
}

# CANN's scripts read variables that are not set and end with whatever their last test gave; they also read $1.
_cann_source() {
    local _cann_script=$1 _cann_options=$- _cann_pipefail=''
    if shopt -qo pipefail; then _cann_pipefail=1; fi
    set --
    set +eu +o pipefail
    # shellcheck disable=SC1090
    . "$_cann_script" || true
    if [[ $_cann_options == *e* ]]; then set -e; fi
    if [[ $_cann_options == *u* ]]; then set -u; fi
    if [ -n "$_cann_pipefail" ]; then set -o pipefail; fi
}

_cann_setup() {
    local script candidates folder
    if [ -d "${ASCEND_OPP_PATH:-}" ]; then
        return 0 # CANN's environment is in this shell already, perhaps another version's than we would find
    fi
    candidates=$(_cann_candidates)
    while IFS= read -r script; do
        if [ -f "$script" ]; then
            printf 'CANN: %s\n' "$script"
            _cann_source "$script"
            break
        fi
        script=''
    done <<<"$candidates"
    if [ -z "$script" ]; then
        printf '%s\n' "set_npu_env.sh: no CANN found. Install it, source its set_env.sh yourself, or set" \
            "ASCEND_TOOLKIT_HOME to its folder. Looked for:" "$candidates" >&2
        return 1
    fi
    # In a container nothing else leads to the driver's libascend_hal.so.
    for folder in /usr/local/Ascend/driver/lib64{,/common,/driver}; do
        if [ -d "$folder" ] && [[ ":${LD_LIBRARY_PATH:-}:" != *":$folder:"* ]]; then
            export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
        fi
    done
}

_cann_status=0
_cann_setup || _cann_status=$?
unset -f _cann_candidates _cann_source _cann_setup
return "$_cann_status"
