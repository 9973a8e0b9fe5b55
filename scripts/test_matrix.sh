#!/usr/bin/env bash
# bash scripts/test_matrix.sh [--dry-run] [RELEASE...] [-- PYTEST ARGS]
#
# The tests against several releases of megatron-core, one after the other, each in an environment of its own that
# scripts/setup_env.sh makes (.venv-RELEASE, about 5.5 GB; .venv for the pinned release). All tests run on each release.
#
#   bash scripts/test_matrix.sh                          0.17.1, 0.18.2 and 0.19.2
#   bash scripts/test_matrix.sh 0.18.2 -- -x -k equality one release, some tests
#   --dry-run                                            prints the commands and runs nothing
#   PYTHON=/path/to/python                               as for scripts/setup_env.sh
#
# Exit code 0: all passed. 1: a test failed, or a release could not be tested. 2: bad input.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
usage="usage: bash scripts/test_matrix.sh [--dry-run] [RELEASE...] [-- PYTEST ARGS]"
dry_run=""
releases=()
while (($#)) && [[ "$1" != "--" ]]; do
    case "$1" in
        --dry-run) dry_run=yes ;;
        -h | --help)
            sed --quiet '2,/^set /s/^# \{0,1\}//p' -- "${BASH_SOURCE[0]}"
            exit 0
            ;;
        [0-9]*.[0-9]*) releases+=("$1") ;;
        *)
            echo "test_matrix: $1 is neither an option nor a release such as 0.19.2; pytest's arguments come after --" >&2
            echo "${usage}" >&2
            exit 2
            ;;
    esac
    shift
done
(($# == 0)) || shift # the --
((${#releases[@]})) || releases=(0.17.1 0.18.2 0.19.2)
[[ -z "${VENV:-}" ]] || {
    echo "test_matrix: VENV=${VENV} is one environment for ${#releases[@]} releases; unset it" >&2
    exit 2
}
export OMP_NUM_THREADS=1 # many processes on few cores
pinned="$(sed --quiet 's/^megatron-core==//p' -- constraints.txt)"

# counts FILE: "passed failed skipped" of a JUnit report; an error outside a test's body is a failure too.
counts() {
    python3 - "$1" <<'PYTHON'
import sys
from xml.etree import ElementTree

suites = list(ElementTree.parse(sys.argv[1]).getroot().iter("testsuite"))
total, failures, errors, skipped = (sum(int(s.get(n)) for s in suites) for n in ("tests", "failures", "errors", "skipped"))
print(total - failures - errors - skipped, failures + errors, skipped)
PYTHON
}

row() {
    printf '%-10s %8s %8s %8s %8s\n' "$@"
}

run() {
    printf 'test_matrix: %s: %s\n' "${release}" "$*"
    [[ -n "${dry_run}" ]] || "$@"
}

stopped=""
trap 'stopped=yes' INT # pytest gets Ctrl-C too, ends, and the table of what has run is printed
exit_code=0
rows=()
for release in "${releases[@]}"; do
    venv="${root}/.venv-${release}"
    [[ "${release}" != "${pinned}" ]] || venv="${root}/.venv"
    report="${venv}/test_matrix.xml"
    if ! run bash scripts/setup_env.sh --extras test --megatron "${release}"; then
        rows+=("${release} - - - no environment")
        exit_code=1
    else
        rm --force -- "${report}"
        started="${SECONDS}" status=0
        # From the environment's interpreter: this tree's package is the one that it has installed.
        run "${venv}/bin/python" -m pytest --junitxml="${report}" "$@" || status=$?
        ((status == 0)) || exit_code=1
        if [[ -f "${report}" ]]; then
            rows+=("${release} $(counts "${report}") $((SECONDS - started))")
        elif [[ -z "${dry_run}" ]]; then
            rows+=("${release} - - - pytest ended with ${status}")
        fi
    fi
    [[ -z "${stopped}" ]] || break
done
[[ -z "${dry_run}" ]] || exit 0

echo
row release passed failed skipped seconds
for line in "${rows[@]}"; do
    read -r release passed failed skipped seconds <<<"${line}"
    row "${release}" "${passed}" "${failed}" "${skipped}" "${seconds}"
done
[[ -z "${stopped}" ]] || {
    echo "test_matrix: stopped; the last row, and the releases after it, are not complete" >&2
    exit 130
}
exit "${exit_code}"
