# shellcheck shell=bash
# How the sbatch scripts start jobs: one task per node, torch.distributed.run in each. Sourced by them.
# shellcheck source=scripts/ab_common.sh
source "${root}/scripts/ab_common.sh"

# prepare_slurm: nodes, the container's flags, the address of the first node.
prepare_slurm() {
    NNODES="${SLURM_JOB_NUM_NODES:-${NNODES:-1}}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
    device=(--device "${DEVICE:-auto}")
    container=()
    if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
        local mounts="${root}:${root},${OUTPUT_PATH}:${OUTPUT_PATH}${MEGATRON_PATH:+,${MEGATRON_PATH}:${MEGATRON_PATH}}"
        container=(--container-image "${CONTAINER_IMAGE}" --container-mounts "${CONTAINER_MOUNTS:-${mounts}}" --container-workdir "${root}")
    fi
    address="${MASTER_ADDR:-localhost}"
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        local hosts
        hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST}")"
        # not by `head`: it would end scontrol with SIGPIPE, and so, under pipefail, this script
        address="${MASTER_ADDR:-${hosts%%$'\n'*}}"
    elif [[ -z "${dry_run}" ]]; then
        stop "there is no allocation: submit this with sbatch, or look with --dry-run"
    fi
}

once() {
    if [[ -n "${SLURM_JOB_ID:-}" && -z "${dry_run}" ]]; then
        srun --nodes=1 --ntasks=1 "${container[@]}" "$@"
    else
        "$@"
    fi
}

launch() {
    local environment=()
    while [[ "$1" != -- ]]; do environment+=("$1") && shift; done
    shift
    # The node's rank is SLURM's: the ranks then lie on the same nodes in every run, which a rendezvous does not promise.
    # shellcheck disable=SC2016 # expanded on each node
    local words=(
        srun --nodes="${NNODES}" --ntasks="${NNODES}" --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}"
        env "${environment[@]}" bash -c 'exec "$0" -m torch.distributed.run --node-rank "${SLURM_NODEID:-0}" "$@"' "${PYTHON}"
        --nnodes "${NNODES}" --nproc-per-node "${GPUS_PER_NODE}" --master-addr "${address}" --master-port "${MASTER_PORT:-29500}" "$@"
    )
    if [[ -n "${dry_run}" ]]; then
        say "would run: $(shown "${words[@]}")"
    else
        in_background "${words[@]}"
    fi
}
