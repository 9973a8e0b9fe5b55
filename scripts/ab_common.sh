# shellcheck shell=bash
# What scripts/ab_throughput.sbatch, scripts/ab_local.sh and scripts/pretrain_52b.sbatch share; sourced by them, in bash with
# `set -euo pipefail`. They set `root` and define `launch WORLD_ENV... -- WORD...` and `once WORD...`:
#   launch   runs torch.distributed.run with the words after it on every node, and returns its exit code
#   once     runs a command in the environment of the jobs (the container, if there is one), on one node
#
# Settings, from the environment:
#   OUTPUT_PATH            where everything is written; no default
#   CONFIG                 a file of configs/: the model and all that the arms have in common
#   ARMS ROUNDS STEPS      which arms, how often each, and steps per run
#   TP PP VP MBS GBS       tensor-parallel, pipeline ranks, model chunks per rank, micro batch, global batch; default: CONFIG's
#   NNODES GPUS_PER_NODE   default: the allocation's, and 8
#   MEGATRON_PATH          a checkout, whose pretrain_gpt.py is run; default: the entry point of megatron_bfpp
#   PYTHON                 default: python3
#   EXTRA_ARGS             more flags for every arm, e.g. "--bfpp-trace-steps 20-22"
#   WARMUP LOSS_TOLERANCE  of `bfpp compare`
#   WANDB_PROJECT          log to W&B, with WANDB_RUN_GROUP (default: OUTPUT_PATH's name) and WANDB_MODE as you set them

say() { printf '%s: %s\n' "${script:-ab}" "$*"; }

stop() { say "$*" >&2; exit 2; }

# read_options WORD...: --dry-run and --help.
read_options() {
    dry_run=""
    while (($#)); do
        case "$1" in
            --dry-run) dry_run=yes ;;
            -h | --help)
                sed --quiet '2,/^set /{/^set /!{/^#SBATCH/!s/^# \{0,1\}//p}}' -- "${BASH_SOURCE[-1]}"
                exit 0
                ;;
            *) stop "unknown option $1; only --dry-run and --help are options, settings come from the environment" ;;
        esac
        shift
    done
}

# require NAME MEANING: a setting without a default.
require() { [[ -n "${!1:-}" ]] || stop "$1 is not set: $2"; }

# at_least LEAST NAME...: settings that are whole numbers, where they are set.
at_least() {
    local least="$1" name
    for name in "${@:2}"; do
        [[ -z "${!name:-}" || "${!name}" =~ ^[0-9]{1,9}$ && "${!name}" -ge "${least}" ]] ||
            stop "${name}=${!name} must be a whole number, at least ${least}"
    done
}

# flag NAME DEFAULT: the last value of a flag in `flags`.
flag() {
    local place value="$2"
    for ((place = 0; place < ${#flags[@]}; place++)); do
        [[ "${flags[place]}" != "$1" ]] || value="${flags[place + 1]:-}"
    done
    printf '%s' "${value}"
}

# read_config: `flags` and the environment of CONFIG, with what TP, PP, MBS and GBS change; WORLD and MICROBATCHES.
read_config() {
    local quoted replicas
    at_least 1 TP PP VP MBS GBS ROUNDS STEPS NNODES GPUS_PER_NODE
    quoted="$(once "${PYTHON}" -c '
import shlex, sys
from megatron_bfpp.console.errors import UserError
from megatron_bfpp.console.config_file import load
try:
    environment, flags = load(sys.argv[1])
except UserError as error:
    sys.exit(f"megatron_bfpp: {error}")
for name, value in environment.items():
    print(f"export {name}={shlex.quote(value)};")
print(f"flags=({shlex.join(flags)})")
' "${CONFIG}")" || stop "CONFIG=${CONFIG} cannot be used; see above"
    eval "${quoted}" # each word is quoted for the shell
    [[ -z "${TP:-}" ]] || flags+=(--tensor-model-parallel-size "${TP}")
    [[ -z "${PP:-}" ]] || flags+=(--pipeline-model-parallel-size "${PP}")
    [[ -z "${MBS:-}" ]] || flags+=(--micro-batch-size "${MBS}")
    [[ -z "${GBS:-}" ]] || flags+=(--global-batch-size "${GBS}")
    PP="$(flag --pipeline-model-parallel-size 1)" TP="$(flag --tensor-model-parallel-size 1)"
    MBS="$(flag --micro-batch-size 1)" GBS="$(flag --global-batch-size 0)"
    local ranks_of_a_replica=$((PP * TP * $(flag --context-parallel-size 1)))
    WORLD=$((NNODES * GPUS_PER_NODE))
    ((PP >= 2)) || stop "there are no pipeline ranks, and so no schedule to compare: set PP to 2 or more"
    ((WORLD % ranks_of_a_replica == 0)) ||
        stop "${NNODES} nodes x ${GPUS_PER_NODE} GPUS_PER_NODE = ${WORLD} ranks are no multiple of the ${ranks_of_a_replica} of a replica (PP ${PP} x TP ${TP} x CP)"
    replicas=$((WORLD / ranks_of_a_replica))
    ((GBS > 0 && GBS % (MBS * replicas) == 0)) ||
        stop "GBS=${GBS} is no multiple of MBS ${MBS} x ${replicas} replicas: set GBS or MBS"
    MICROBATCHES=$((GBS / (MBS * replicas)))
}

# choose_chunks: every arm must have the same chunks on the same ranks, or the placements are compared and not the schedules.
choose_chunks() {
    local given layers
    given="$(flag --num-virtual-stages-per-pipeline-rank "")"
    layers="$(flag --num-layers 0)"
    if [[ -n "${VP:-}" ]]; then
        flags+=(--num-virtual-stages-per-pipeline-rank "${VP}")
    elif [[ -n "${given}" ]]; then
        VP="${given}"
    elif [[ -z "$(flag --pipeline-model-parallel-layout "")$(flag --num-layers-per-virtual-pipeline-stage "")" ]]; then
        ((layers % PP == 0 && layers / PP >= 2)) ||
            stop "VP is not set, and ${layers} layers do not give each of ${PP} pipeline ranks 2 or more: set VP, the model chunks per rank, for all arms"
        VP=$((layers / PP))
        say "VP is not set: ${VP} chunks of one layer for every arm"
        flags+=(--num-virtual-stages-per-pipeline-rank "${VP}")
    fi
}

# without FLAG...: `arm_flags` less these flags, which have no value.
without() {
    local word kept=()
    for word in "${arm_flags[@]}"; do
        [[ " $* " == *" ${word} "* ]] || kept+=("${word}")
    done
    arm_flags=("${kept[@]}")
}

# set_arm NAME: `arm_flags` and `arm_environment` (NAME=VALUE words).
set_arm() {
    arm_flags=("${flags[@]}")
    arm_environment=("CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}")
    case "$1" in
        # Megatron's default, under its name in `bfpp bench`; also under that of its --pipeline-schedule.
        1f1b | interleaved) arm_flags+=(--pipeline-schedule 1f1b) ;;
        interleaved-grouped)
            arm_flags+=(--pipeline-schedule 1f1b --microbatch-group-size-per-virtual-pipeline-stage "${MICROBATCHES}")
            ;;
        breadth-first) arm_flags+=(--pipeline-schedule breadth-first) ;;
        breadth-first-sharded)
            # What Megatron demands with FSDP2: see docs/fully_sharded.md.
            without --use-distributed-optimizer --overlap-param-gather --overlap-param-gather-with-optimizer-step
            arm_flags+=(--pipeline-schedule breadth-first --use-torch-fsdp2 --no-gradient-accumulation-fusion --ckpt-format torch_dist)
            arm_environment=(--unset=CUDA_DEVICE_MAX_CONNECTIONS)
            ;;
        *) stop "ARMS: $1 does not exist; use interleaved interleaved-grouped breadth-first breadth-first-sharded" ;;
    esac
}

# check_arms: known, each once, before anything runs.
check_arms() {
    local arm seen=" "
    for arm in "${arms[@]}"; do
        [[ "${seen}" != *" ${arm} "* ]] || stop "ARMS names ${arm} twice; ROUNDS is how often each arm runs"
        seen+="${arm} "
        set_arm "${arm}"
    done
}

# set_trainer: the words after torch.distributed.run's own options.
set_trainer() {
    if [[ -n "${MEGATRON_PATH:-}" ]]; then
        trainer=(-m megatron_bfpp.run "${device[@]}" "${MEGATRON_PATH}/pretrain_gpt.py")
    else
        trainer=(-m megatron_bfpp.pretrain_gpt "${device[@]}")
    fi
}

# set_logging NAME DIR: `log_flags`, TensorBoard for all runs (Megatron logs to W&B only with it), W&B where it is asked for.
set_logging() {
    log_flags=(--tensorboard-dir "$2/tensorboard")
    [[ -z "${WANDB_PROJECT:-}" ]] ||
        log_flags+=(--wandb-project "${WANDB_PROJECT}" --wandb-exp-name "$1" --wandb-save-dir "${OUTPUT_PATH}/wandb")
}

# status_of DIR: finished, failed, or nothing.
status_of() {
    sed --quiet 's/.*"status": *"\([a-z]*\)".*/\1/p' -- "$1/end.json" 2>/dev/null | head --lines=1 || true
}

# reason_in LOG CODE: the first error of a log that names one; torchrun's own summary at the end names none.
reason_in() {
    local line=""
    line="$(grep --text --extended-regexp --max-count=1 'out of memory|OutOfMemoryError' -- "$1" 2>/dev/null ||
        grep --text --extended-regexp '^(\[?[a-z]*[0-9]+\]?: *)*([A-Za-z_.]*(Error|Exception)|megatron_bfpp: error)\b' -- "$1" 2>/dev/null |
        grep --invert-match --max-count=1 ChildFailedError || true)"
    (($2 <= 128)) || line="killed by signal $(($2 - 128))${line:+: ${line}}"
    printf '%s' "${line:-no error in ${1##*/}} (exit code $2)"
}

# record_end DIR REASON: end.json of a run that could not write it. Written whole.
record_end() {
    local line
    line="$(printf '%.500s' "$2" | LC_ALL=C tr --delete '\000-\037\177-\377')" # one line of ASCII
    line="${line//\\/\\\\}"
    { printf '{"status": "failed", "reason": "%s", "ended": "%s"}\n' "${line//\"/\\\"}" "$(date --utc +%Y-%m-%dT%H:%M:%SZ)" >"$1/.end" &&
        mv -- "$1/.end" "$1/end.json"; } || say "WARNING: $1/end.json cannot be written" >&2
}

# run_one ARM ROUND: one run with a directory of its own. A run that fails is recorded and does not stop the others.
run_one() {
    local arm="$1" round="$2" name="$1.$2" status=0
    local dir="${OUTPUT_PATH}/${name}" log="${OUTPUT_PATH}/logs/${name}.log" attempt=1
    [[ "$(status_of "${dir}")" != finished ]] || { say "${name} has finished before: skipped" && return; }
    set_arm "${arm}"
    set_logging "${name}" "${dir}"
    # shellcheck disable=SC2206 # EXTRA_ARGS is a list of words
    local words=("${trainer[@]}" "${arm_flags[@]}" --train-iters "${STEPS}" --bfpp-run-dir "${dir}" "${log_flags[@]}" ${EXTRA_ARGS:-})
    local environment=("${arm_environment[@]}" "BFPP_ARM=${arm}" "BFPP_ROUND=${round}" "BFPP_RUN_DIR=${dir}")
    if [[ -n "${dry_run}" ]]; then
        launch "${environment[@]}" -- "${words[@]}"
        return
    fi
    if [[ -e "${dir}" ]]; then # broken off, or failed: it starts anew, and what it left is kept
        while [[ -e "${OUTPUT_PATH}/unfinished/${name}-${attempt}" ]]; do attempt=$((attempt + 1)); done
        { mkdir --parents -- "${OUTPUT_PATH}/unfinished" && mv -- "${dir}" "${OUTPUT_PATH}/unfinished/${name}-${attempt}"; } || return 0
    fi
    # Where there is no room even for these, the others may still run, and the report says that this one is missing.
    mkdir --parents -- "${dir}" "${OUTPUT_PATH}/logs" || return 0
    say "${name}: ${STEPS} steps, log in ${log}"
    launch "${environment[@]}" -- "${words[@]}" >"${log}" 2>&1 </dev/null || status=$?
    [[ -z "${stopped}" ]] || exit "${stopped}" # without an end.json: the next start runs it again
    if ((status)) && [[ "$(status_of "${dir}")" != failed ]]; then
        record_end "${dir}" "$(reason_in "${log}" "${status}")"
    elif [[ -z "$(status_of "${dir}")" ]]; then
        record_end "${dir}" "ended with exit code 0 without an end.json"
    fi
    [[ "$(status_of "${dir}")" == finished ]] || say "${name} FAILED: $(reason_in "${log}" "${status}")" >&2
}

# run_all: the arms of a round one after the other, each round beginning with another arm, so that none always runs first.
run_all() {
    local round place
    for ((round = 1; round <= ROUNDS; round++)); do
        for ((place = 0; place < ${#arms[@]}; place++)); do
            run_one "${arms[(place + round - 1) % ${#arms[@]}]}" "${round}"
        done
    done
}

# report: compares all runs; its exit code.
report() {
    local arm round status=0 words=()
    for arm in "${arms[@]}"; do # the first arm is the reference
        for ((round = 1; round <= ROUNDS; round++)); do words+=("${OUTPUT_PATH}/${arm}.${round}"); done
    done
    words+=(--html "${OUTPUT_PATH}/report.html" --markdown "${OUTPUT_PATH}/report.md" --json "${OUTPUT_PATH}/report.json")
    [[ -z "${WARMUP:-}" ]] || words+=(--warmup "${WARMUP}")
    [[ -z "${LOSS_TOLERANCE:-}" ]] || words+=(--loss-tolerance "${LOSS_TOLERANCE}")
    [[ -z "${WANDB_PROJECT:-}" ]] || words+=(--wandb-project "${WANDB_PROJECT}")
    if [[ -n "${dry_run}" ]]; then
        say "would run: $(shown "${PYTHON}" -m megatron_bfpp.cli compare "${words[@]}")"
        return
    fi
    [[ -z "${WANDB_PROJECT:-}" ]] || export WANDB_DIR="${OUTPUT_PATH}"
    once "${PYTHON}" -m megatron_bfpp.cli compare "${words[@]}" || status=$?
    [[ "${WANDB_PROJECT:+${WANDB_MODE:-}}" != offline ]] || say "upload with: wandb sync ${OUTPUT_PATH}/wandb/wandb/offline-run-* ${OUTPUT_PATH}/wandb/offline-run-*"
    return "${status}"
}

# shown WORD...: the words as one can paste them.
shown() {
    local word
    for word in "$@"; do
        if [[ "${word}" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s ' "${word}"; else printf '%q ' "${word}"; fi
    done
}

# The job that runs, as a process group of its own: a signal to the script reaches it through here, and is waited for.
job=""
stopped=""
end_job() {
    stopped="$1"
    say "stopped by a signal; start it again to go on" >&2
    [[ -z "${job}" ]] || kill -TERM -- "-${job}" 2>/dev/null || true
}

# in_background WORD...: runs the words as the job, waits for it, returns its exit code.
in_background() {
    local status=0
    set -m
    "$@" &
    job=$!
    set +m
    while true; do # a trapped signal ends `wait` before the job has ended
        status=0
        wait "${job}" || status=$?
        kill -0 "${job}" 2>/dev/null || break
    done
    job=""
    return "${status}"
}

# prepare: defaults and checks that do not need CONFIG.
prepare() {
    require OUTPUT_PATH "the directory that this writes to, on a file system that every node sees"
    PYTHON="${PYTHON:-python3}"
    [[ -f "${CONFIG}" ]] || stop "CONFIG=${CONFIG} does not exist; name a file of ${root}/configs"
    [[ -z "${MEGATRON_PATH:-}" || -f "${MEGATRON_PATH}/pretrain_gpt.py" ]] ||
        stop "MEGATRON_PATH=${MEGATRON_PATH} has no pretrain_gpt.py; name a checkout of Megatron-LM"
    if [[ -z "${dry_run}" ]]; then
        mkdir --parents -- "${OUTPUT_PATH}" || stop "OUTPUT_PATH=${OUTPUT_PATH} cannot be made"
        OUTPUT_PATH="$(cd -- "${OUTPUT_PATH}" && pwd)"
    fi
    export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}" # megatron_bfpp need not be installed
    export WANDB_RUN_GROUP="${WANDB_RUN_GROUP:-$(basename -- "${OUTPUT_PATH}")}" WANDB_JOB_TYPE="${WANDB_JOB_TYPE:-ab}"
    trap 'end_job 143' TERM
    trap 'end_job 130' INT
}
