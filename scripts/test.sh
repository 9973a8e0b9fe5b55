#!/usr/bin/env bash
# bash scripts/test.sh [--all] [PYTEST ARGS]
#
# Runs the tests in the environment of scripts/setup_env.sh with the test extras. The first two forms install what
# scripts/setup_system_tests.sh may: SLURM and a browser.
#
#   bash scripts/test.sh                  all quick tests, then the slow ones that tests/support/tour.py names
#   bash scripts/test.sh --all            everything, two tests at a time, some with an older torch and with Ray too
#   bash scripts/test.sh -m "not slow"    no processes of ranks, several tests at a time: two minutes
#   bash scripts/test.sh tests/ab -x      the tests that are named, slow or not
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
tour=yes words=() all=""
parallel=(--numprocesses auto --maxprocesses 4 --dist loadfile)
for word in "$@"; do
    case "${word}" in
        --all) all=yes ;;
        -m* | -k*) tour="" words+=("${word}") ;;
        "not slow") words+=("${word}" "${parallel[@]}") ;;
        *)
            [[ ! -e "${word%%::*}" ]] || tour=""
            words+=("${word}")
            ;;
    esac
done
bash scripts/setup_env.sh --extras test
[[ -z "${tour}${all}" ]] || bash scripts/setup_system_tests.sh
venv="${VENV:-${root}/.venv}"
# put_beside NAME==RELEASE [NEEDED...]: packages that share all else with the environment, in a folder for their tests.
put_beside() {
    local beside="${venv}/beside-${1/==/-}" started="${SECONDS}"
    [[ ! -d "${beside}" ]] || return 0
    if "${venv}/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
        --target "${beside}.new" "$@" && mv -- "${beside}.new" "${beside}"; then
        echo "test: $1 beside ${venv}: done in $((SECONDS - started)) s"
    else
        echo "test: $1 was not installed; its test will skip" >&2
    fi
}
if [[ -n "${all}" ]]; then
    put_beside torch==2.13.0 # that of today's containers: 1.1 GB in place of 5.5 GB
    put_beside ray==2.60.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 msgpack==1.2.4 \
        referencing==0.37.0 rpds-py==2026.9.1 # 0.25 GB
    # 0.1 GB: tests/support/trainers/bridge_ranks.py stands in for what Bridge only imports.
    put_beside megatron-bridge==0.6.2 antlr4-python3-runtime==4.9.3 httpx==0.28.1 huggingface_hub==1.5.0 \
        hydra-core==1.3.4 nvidia-modelopt==0.47.0 omegaconf==2.3.0 regex==2026.11.19 rich==15.0.0 \
        safetensors==0.8.0 tokenizers==0.22.2 tqdm==4.70.1 transformers==5.12.1
fi
export OMP_NUM_THREADS=1 # many processes on few cores
# Slow tests wait as much as they compute; most start 2 to 8 ranks themselves, so that two at a time fill 2 cores.
[[ -z "${all}" ]] || words=(--numprocesses auto --maxprocesses 2 --dist loadfile "${words[@]}")
if [[ -n "${all}" || -z "${tour}" ]]; then
    exec "${venv}/bin/python" -m pytest "${words[@]}"
fi
quick=0 toured=0
"${venv}/bin/python" -m pytest -m "not slow" "${parallel[@]}" "${words[@]}" || quick=$?
"${venv}/bin/python" -m pytest -m tour "${words[@]}" || toured=$?
exit $((quick ? quick : toured))
