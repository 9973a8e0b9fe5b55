#!/usr/bin/env bash
# bash scripts/test.sh [PYTEST ARGS]
#
# The tests, in the environment of scripts/setup_env.sh with the test extras.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
bash scripts/setup_env.sh --extras test
export OMP_NUM_THREADS=1 # many processes on few cores
exec "${VENV:-${root}/.venv}/bin/python" -m pytest "$@"
