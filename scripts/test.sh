#!/usr/bin/env bash
# bash scripts/test.sh [--all] [PYTEST ARGS]
#
# The tests, in the environment of scripts/setup_env.sh with the test extras, and with what
# scripts/setup_system_tests.sh may install.
#
#   bash scripts/test.sh                  all that is quick, and of the slow tests those of tests/support/tour.py
#   bash scripts/test.sh -m "not slow"    no processes of ranks: less than a minute
#   bash scripts/test.sh --all            everything
#   bash scripts/test.sh tests/ab -x      what is named, slow or not
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
selection=(-m "not slow or tour")
words=()
for word in "$@"; do
    case "${word}" in
        --all) selection=() ;;
        -m* | -k*) selection=() words+=("${word}") ;;
        *)
            [[ ! -e "${word%%::*}" ]] || selection=()
            words+=("${word}")
            ;;
    esac
done
bash scripts/setup_env.sh --extras test
bash scripts/setup_system_tests.sh
export OMP_NUM_THREADS=1 # many processes on few cores
exec "${VENV:-${root}/.venv}/bin/python" -m pytest "${selection[@]}" "${words[@]}"
