#!/usr/bin/env bash
# bash scripts/test.sh [--all] [PYTEST ARGS]
#
# Runs the tests in the environment of scripts/setup_env.sh with the test extras. The first two forms install what
# scripts/setup_system_tests.sh may: SLURM and a browser.
#
#   bash scripts/test.sh                  all quick tests, and the slow ones that tests/support/tour.py names
#   bash scripts/test.sh --all            everything
#   bash scripts/test.sh -m "not slow"    no processes of ranks: 80 seconds
#   bash scripts/test.sh tests/ab -x      the tests that are named, slow or not
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
selection=(-m "not slow or tour") words=() all=""
for word in "$@"; do
    case "${word}" in
        --all) all=yes ;;
        -m* | -k*) selection=() words+=("${word}") ;;
        *)
            [[ ! -e "${word%%::*}" ]] || selection=()
            words+=("${word}")
            ;;
    esac
done
bash scripts/setup_env.sh --extras test
((!${#selection[@]})) && [[ -z "${all}" ]] || bash scripts/setup_system_tests.sh
[[ -z "${all}" ]] || selection=()
export OMP_NUM_THREADS=1 # many processes on few cores
exec "${VENV:-${root}/.venv}/bin/python" -m pytest "${selection[@]}" "${words[@]}"
