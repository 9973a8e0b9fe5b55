#!/usr/bin/env bash
# bash scripts/setup_system_tests.sh
#
# Installs what some tests need beyond Python, by apt-get on Debian and Ubuntu as root: slurm-wlm and munge (tests/slurm) and
# chromium (the HTML report). Does nothing where all are there. Where it may not install or cannot, it says so and ends with
# exit code 0: those tests then skip, with a reason. No service is needed: the tests start their own SLURM.
set -euo pipefail

# A program of each package; Debian keeps daemons where only root's PATH looks.
declare -A programs=([slurm-wlm]="slurmctld slurmd sbatch" [munge]=munged [chromium]=chromium)
PATH="${PATH}:/usr/sbin:/sbin"

say() { printf 'setup_system_tests: %s\n' "$*"; }

# set_missing: `missing`, the packages whose programs are not all there.
set_missing() {
    local package program
    missing=()
    for package in slurm-wlm munge chromium; do
        for program in ${programs["${package}"]}; do
            command -v -- "${program}" >/dev/null || { missing+=("${package}") && break; }
        done
    done
}

# without_them REASON: nothing more can be done.
without_them() {
    say "$1; the tests that need ${missing[*]} will skip"
    exit 0
}

set_missing
if ((${#missing[@]} == 0)); then
    say "slurm-wlm, munge and chromium are installed"
    exit 0
fi
command -v apt-get >/dev/null || without_them "there is no apt-get here"
((EUID == 0)) || without_them "not root: sudo bash scripts/setup_system_tests.sh installs ${missing[*]}"

log="$(mktemp)"
trap 'rm --force -- "${log}"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt=(apt-get --quiet --yes --option Acquire::Retries=2 --option Acquire::http::Timeout=30 --option DPkg::Lock::Timeout=120)
say "apt-get update ..."
# apt-get update ends with 0 when a list could not be fetched; an install with the lists of before may still do.
"${apt[@]}" update >"${log}" 2>&1 || say "apt-get update failed: $(grep --max-count=1 '^E: ' -- "${log}" || echo "see apt-get update")"
for package in "${missing[@]}"; do # one by one: a distribution without one of them still has the others
    started="${SECONDS}"
    if "${apt[@]}" install --no-install-recommends "${package}" >"${log}" 2>&1; then
        say "${package}: installed in $((SECONDS - started)) s"
    else
        say "${package}: not installed: $(grep --max-count=1 '^E: ' -- "${log}" || tail --lines=1 -- "${log}")"
    fi
done
set_missing
((${#missing[@]} == 0)) || without_them "apt-get could not install all"
