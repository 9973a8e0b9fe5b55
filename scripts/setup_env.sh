#!/usr/bin/env bash
# bash scripts/setup_env.sh [--extras test] [--megatron RELEASE] [--torch RELEASE]
#
# Makes .venv at the root of the repository with the packages and versions of constraints.txt and this package, editable.
# A second run with nothing changed does nothing. scripts/quickstart.sh and scripts/test.sh call it.
#
#   --megatron 0.17.1        that megatron-core instead of the pinned one, in .venv-0.17.1; all else stays pinned
#   --torch 2.13.0           that torch instead of the pinned one, in .venv-torch-2.13.0
#   PYTHON=/path/to/python   the interpreter to build with; default: 3.12 or newer from PATH, then from pyenv
#   VENV=/path/to/venv       where to build; default: .venv, or as above
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
pins="$(cat -- "${root}/constraints.txt")"
default_venv="${root}/.venv"
extras=""

# replace PACKAGE RELEASE SUFFIX: another release of it; the pinned one needs no second environment of 5.5 GB.
replace() {
    if [[ ! "$2" =~ ^[0-9]+(\.[0-9]+)+[a-z0-9.]*$ ]]; then
        echo "setup_env: $2 is not a release of $1; name one, as $(sed --quiet "s/^$1==//p" <<<"${pins}")" >&2
        exit 2
    fi
    grep --quiet --line-regexp --fixed-strings -- "$1==$2" <<<"${pins}" || default_venv+="$3-$2"
    pins="$(sed "s/^$1==.*/$1==$2/" <<<"${pins}")"
}

while (($#)); do
    case "$1 ${2:-}" in
        "--extras test") extras=test ;;
        "--megatron "*) replace megatron-core "${2:-}" "" ;;
        "--torch "*) replace torch "${2:-}" -torch ;;
        *)
            echo "setup_env: unknown option $1 ${2:-}; usage: bash scripts/setup_env.sh [--extras test]" \
                "[--megatron RELEASE] [--torch RELEASE]" >&2
            exit 2
            ;;
    esac
    shift 2
done
venv="${VENV:-${default_venv}}"
# The packages are those of constraints.txt, without the test extras up to the line that begins them.
mapfile -t packages < <(sed "${extras:+b;}/^# --extras test/,\$d" <<<"${pins}" | sed --quiet 's/^\([A-Za-z].*\)==.*/\1/p')

# A name on PATH is not enough: pyenv's shims are there for versions that they then refuse to run.
serves() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        serves "${PYTHON}" && command -v -- "${PYTHON}" && return
        echo "setup_env: PYTHON=${PYTHON} is not a Python >= 3.12 that can import venv and ensurepip." >&2
        return 1
    fi
    local candidate pyenv_versions="${PYENV_ROOT:-${HOME}/.pyenv}/versions"
    local candidates=(python3.12) # first choice: the version that constraints.txt was resolved with
    for candidate in "${pyenv_versions}"/3.12.*/bin/python; do candidates+=("${candidate}"); done
    candidates+=(python3.13 python3.14 python3)
    for candidate in "${pyenv_versions}"/3.1[3-9]*/bin/python; do candidates+=("${candidate}"); done
    for candidate in "${candidates[@]}"; do
        serves "${candidate}" && command -v -- "${candidate}" && return
    done
    echo "setup_env: no Python >= 3.12 with venv and ensurepip among python3.12, python3.13, python3.14, python3 on PATH" \
        "and ${pyenv_versions}/*; name one: PYTHON=/path/to/python" >&2
    return 1
}

# step "what it does" command...: one line with the time it took; the command's output only when it fails.
step() {
    local what="$1" started="${SECONDS}" log="${venv}/setup.log"
    shift
    printf 'setup_env: %s ...\n' "${what}"
    if "$@" 2>&1 | tee -- "${log}" | show_downloads; then
        printf 'setup_env: %s: done in %d s\n' "${what%% (*}" "$((SECONDS - started))"
    else
        tail --lines=20 -- "${log}" >&2
        echo "setup_env: ${what%% (*} failed; the whole output is in ${log}" >&2
        return 1
    fi
}

# What pip is at: on a terminal one line updated in place, else only the downloads of 100 MB and more.
show_downloads() {
    local line
    while IFS= read -r line; do
        if [[ -t 1 && "${line}" =~ ^\ *(Collecting|Downloading|Installing)\ (.*) ]]; then
            printf '\r\033[K  %.90s' "${BASH_REMATCH[1]} ${BASH_REMATCH[2]}"
        elif [[ "${line}" =~ ^\ *Downloading\ .*\([0-9]{3,}\.[0-9]\ MB\) ]]; then
            printf '%s\n' "${line}"
        fi
    done
    [[ ! -t 1 ]] || printf '\r\033[K'
}

python="$(find_python)"
version="$("${python}" -c 'import platform; print(platform.python_version())')"
stamp="${venv}/.setup_env"

# The stamp is the last thing written, so an interrupted set-up has none. The smaller package list is a part of the
# larger one: an environment with extras serves a run without.
stamp_of() {
    printf '%s\n' "${version}" "${root}" "$1" "${pins}" | cat - "${root}/pyproject.toml" | sha256sum | cut --delimiter=' ' --fields=1
}
if [[ -f "${stamp}" && -x "${venv}/bin/python" ]]; then
    recorded="$(cat -- "${stamp}")"
    if [[ "${recorded}" == "$(stamp_of "${extras}")" || "${recorded}" == "$(stamp_of test)" ]]; then
        echo "setup_env: ${venv} is ready (Python ${version}, $(grep "^megatron-core==" <<<"${pins}"))"
        exit 0
    fi
fi

pip_install() {
    # --upgrade-strategy is left at its default: what is installed at the pinned version already is not touched.
    "${venv}/bin/python" -m pip install --disable-pip-version-check --no-input --constraint "${venv}/constraints.txt" "$@"
}

# An environment is updated in place only after a finished set-up with the same Python. One without a stamp may lack parts
# of a package that pip takes for installed: it is made new. An environment made otherwise is not touched.
finished="$(cat -- "${stamp}" 2>/dev/null || true)"
rm --force -- "${stamp}"
if [[ -z "${finished}" || "$("${venv}/bin/python" -c 'import pip, platform; print(platform.python_version())' 2>/dev/null)" != "${version}" ]]; then
    if [[ -d "${venv}" && ! -f "${venv}/setup.log" && -n "$(ls --almost-all -- "${venv}")" ]]; then
        echo "setup_env: ${venv} was not made by this script; remove it, or name another place: VENV=/path" >&2
        exit 1
    fi
    rm --recursive --force -- "${venv}"
    mkdir --parents -- "${venv}"
    step "new environment ${venv} with Python ${version}" "${python}" -m venv "${venv}"
fi
printf '%s\n' "${pins}" >"${venv}/constraints.txt"
step "installing ${#packages[@]} packages with $(grep "^megatron-core==" <<<"${pins}") (torch brings CUDA libraries: about 5.5 GB)" pip_install "${packages[@]}"
# No build isolation: it would download setuptools once more, in a version nobody pinned.
step "installing megatron_bfpp, editable" pip_install --no-deps --no-build-isolation --editable "${root}"
stamp_of "${extras}" >"${stamp}.new"
mv -- "${stamp}.new" "${stamp}"
