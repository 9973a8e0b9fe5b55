#!/usr/bin/env bash
# bash scripts/quickstart.sh
#
# Trains the GPT of configs/quickstart.yaml on real text with 4 pipeline ranks, without a GPU, under three schedules:
#   interleaved          Megatron's default interleaved 1F1B
#   interleaved-grouped  the same, its micro-batch group size set to the number of micro-batches
#   breadth-first        the plugin's schedule, switched on with its one flag
# compares every bit of their losses, and runs the same three on an emulated network. Set-up is made once; all that is
# written is in .quickstart/.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
out="${root}/.quickstart"

section() { printf '\n== %s ==\n' "$*"; }
bfpp() { "${PYTHON}" -m megatron_bfpp.cli "$@"; }

bash scripts/setup_env.sh # reads PYTHON, the interpreter to build with; from here on it is the one of the environment
export PYTHON="${VENV:-${root}/.venv}/bin/python" OMP_NUM_THREADS=1 # 4 processes on few cores
mkdir --parents -- "${out}"
"${PYTHON}" -m megatron_bfpp.data --output "${out}/text"
export DATA_PATH="${out}/text_text_document"
unset TP PP VP MBS GBS GPUS_PER_NODE MEGATRON_PATH WARMUP LOSS_TOLERANCE WANDB_PROJECT # settings of other A/Bs

section "1 of 3: three trainings on this CPU, 40 steps each, about 40 s each on 2 cores"
rm --recursive --force -- "${out}/ab" # each call trains anew
bfpp ab --launcher local --config configs/quickstart.yaml --output-path "${out}/ab" --device cpu --rounds 1 --steps 40 \
    --arms "interleaved interleaved-grouped breadth-first" --extra-args "--data-cache-path '${out}/cache'"
grep --no-filename "^megatron_bfpp .*breadth-first, PP" "${out}/ab/logs/breadth-first.1.log"
echo "This table shows that the three schedules compute the same bits; its step times do not predict a cluster, since here"
echo "no network and no GPU works beside the CPU."

section "2 of 3: the same schedules on an emulated network, under a minute"
bfpp bench --shape 4,2,8 --hop 0.25 --transfer 0.25 --reduction 1 --repeat 2 --json "${out}/bench.json" \
    --arm interleaved --arm interleaved-grouped --arm breadth-first
echo "This table shows what the schedule alone changes where a message takes half a forward, half of it at the network"
echo "card, and a reduction of gradients as long as its chunk's backwards; both are chosen, and no tensor is computed."

section "3 of 3: the plan of that step"
bfpp show --pp 4 --chunks 2 --microbatches 8 --hop 0.5 --reduction 16 --order interleaved --order breadth-first \
    --svg "${out}/timeline.svg" >"${out}/timeline.txt"
echo "timelines: ${out}/timeline.svg"
echo "report:    ${out}/ab/report.html"
