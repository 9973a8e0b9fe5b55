#!/usr/bin/env bash
# bash scripts/ab_local.sh [--dry-run]
#
# The A/B of schedules on this machine, without SLURM: every arm in every round, one after the other, and `bfpp compare` at the
# end. Started again, it goes on where it was stopped. Without a GPU, in 4 minutes after scripts/quickstart.sh:
#
#   OUTPUT_PATH=ab ARMS="interleaved breadth-first" ROUNDS=1 STEPS=8 bash scripts/ab_local.sh
#
# Settings are environment variables; scripts/ab_common.sh lists all. Here: CONFIG is configs/quickstart.yaml, ARMS
# "interleaved interleaved-grouped breadth-first", ROUNDS 3, STEPS 40, GPUS_PER_NODE 4 processes, DEVICE auto, cuda or cpu.
# Exit code 0: all runs finished with the same losses. 1: not so. 2: bad input.
set -euo pipefail

script=ab_local
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/ab_common.sh
source "${root}/scripts/ab_common.sh"
read_options "$@"

CONFIG="${CONFIG:-${root}/configs/quickstart.yaml}"
ROUNDS="${ROUNDS:-3}" STEPS="${STEPS:-40}" NNODES=1 GPUS_PER_NODE="${GPUS_PER_NODE:-4}"
read -r -a arms <<<"${ARMS:-interleaved interleaved-grouped breadth-first}"
device=(--device "${DEVICE:-auto}")
[[ -n "${PYTHON:-}" || ! -x "${root}/.venv/bin/python" ]] || PYTHON="${root}/.venv/bin/python"
if [[ -z "${DATA_PATH:-}" && -f "${root}/.quickstart/text_text_document.bin" ]]; then
    export DATA_PATH="${root}/.quickstart/text_text_document"
fi

once() {
    "$@"
}

launch() {
    local environment=()
    while [[ "$1" != -- ]]; do environment+=("$1") && shift; done
    shift
    local words=(env "${environment[@]}" "${PYTHON}" -m torch.distributed.run --standalone --nproc-per-node "${GPUS_PER_NODE}" "$@")
    if [[ -n "${dry_run}" ]]; then
        say "would run: $(shown "${words[@]}")"
        return
    fi
    local status=0
    in_background "${words[@]}" || status=$?
    ((status == 0)) || end_ranks "${environment[@]}"
    return "${status}"
}

# end_ranks NAME=VALUE...: a torchrun that is killed leaves its ranks, each in a session of its own. They would train on
# beside the next arm, and write into a run that has failed. They are known by the folder of the run in their environment.
end_ranks() {
    local word place
    for word in "$@"; do
        [[ "${word}" == BFPP_RUN_DIR=* ]] || continue
        for place in $(grep --files-with-matches --null-data --line-regexp --fixed-strings -- "${word}" /proc/[0-9]*/environ 2>/dev/null); do
            kill -KILL "$(basename -- "${place%/environ}")" 2>/dev/null || true
        done
    done
}

prepare
read_config
choose_chunks
set_trainer
check_arms
run_all
report
