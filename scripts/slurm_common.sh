# shellcheck shell=bash
# start MODULE WORD...: run a module of megatron_bfpp in the batch script, in place of bash. Sourced by the sbatch scripts,
# which set `root`. It runs on the first node and outside the container, where srun is: BFPP_PYTHON, a Python 3.12 or newer
# with PyYAML, is PYTHON unless there is a container, else python3.
start() {
    [[ -n "${CONTAINER_IMAGE:-}" ]] || BFPP_PYTHON="${BFPP_PYTHON:-${PYTHON:-python3}}"
    BFPP_PYTHON="${BFPP_PYTHON:-python3}"
    "${BFPP_PYTHON}" -c 'import sys, yaml; sys.exit(sys.version_info < (3, 12))' || {
        echo "BFPP_PYTHON=${BFPP_PYTHON} must be a Python 3.12 or newer with PyYAML on this node" >&2
        exit 2
    }
    export CONFIG="${CONFIG:-${root}/configs/gpt_52b_512_h100.yaml}"
    export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}" # megatron_bfpp need not be installed
    exec "${BFPP_PYTHON}" -m "$@"
}
