#!/usr/bin/env bash
# bash scripts/test.sh [--all] [PYTEST ARGS]
#
# Runs the tests in the environment of scripts/setup_env.sh with the test extras. The first two forms install what
# scripts/setup_system_tests.sh may: SLURM and a browser.
#
#   bash scripts/test.sh                  all quick tests, and the slow ones that tests/support/tour.py names
#   bash scripts/test.sh --all            everything, some of it with an older torch too
#   bash scripts/test.sh -m "not slow"    no processes of ranks, several tests at a time: two minutes
#   bash scripts/test.sh tests/ab -x      the tests that are named, slow or not
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
selection=(-m "not slow or tour") words=() all=""
for word in "$@"; do
    case "${word}" in
        --all) all=yes ;;
        -m* | -k*) selection=() words+=("${word}") ;;
        "not slow") words+=("${word}" --numprocesses auto --maxprocesses 4 --dist loadfile) ;;
        *)
            [[ ! -e "${word%%::*}" ]] || selection=()
            words+=("${word}")
            ;;
    esac
done
bash scripts/setup_env.sh --extras test
((!${#selection[@]})) && [[ -z "${all}" ]] || bash scripts/setup_system_tests.sh
[[ -z "${all}" ]] || selection=()
venv="${VENV:-${root}/.venv}"
# The torch of today's containers, which shares all else with the environment: 1.1 GB in place of 5.5 GB.
beside="${venv}/beside-torch-2.13.0"
if [[ -n "${all}" && ! -d "${beside}" ]]; then
    started="${SECONDS}"
    if "${venv}/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
        --target "${beside}.new" "torch==${beside##*-}" && mv -- "${beside}.new" "${beside}"; then
        echo "test: torch ${beside##*-} beside ${venv}: done in $((SECONDS - started)) s"
    else
        echo "test: torch ${beside##*-} was not installed; its test will skip" >&2
    fi
fi
export OMP_NUM_THREADS=1 # many processes on few cores
exec "${venv}/bin/python" -m pytest "${selection[@]}" "${words[@]}"
