#!/usr/bin/env bash
# bash scripts/ab_local.sh [--dry-run | --help]
#
# The A/B of schedules on this machine, without SLURM: `bfpp ab` with the quickstart's model. Settings are environment
# variables or flags, --help lists them. Without a GPU, in 4 minutes after scripts/quickstart.sh:
#
#   OUTPUT_PATH=ab ARMS="interleaved breadth-first" ROUNDS=1 STEPS=8 bash scripts/ab_local.sh
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
export CONFIG="${CONFIG:-${root}/configs/quickstart.yaml}"
[[ -n "${PYTHON:-}" || ! -x "${root}/.venv/bin/python" ]] || PYTHON="${root}/.venv/bin/python"
export PYTHON="${PYTHON:-python3}"
if [[ -z "${DATA_PATH:-}" && -f "${root}/.quickstart/text_text_document.bin" ]]; then
    export DATA_PATH="${root}/.quickstart/text_text_document"
fi
export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}" # megatron_bfpp need not be installed
exec "${PYTHON}" -m megatron_bfpp.cli ab --launcher local "$@"
