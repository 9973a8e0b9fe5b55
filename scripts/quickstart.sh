#!/usr/bin/env bash
# bash scripts/quickstart.sh
#
# Trains the GPT of configs/quickstart.yaml on real text with 4 pipeline ranks, without a GPU, in three arms:
#   1f1b           Megatron's default interleaved 1F1B
#   1f1b-grouped   the same, its micro-batch group size set to the number of micro-batches
#   breadth-first  the plugin's schedule, switched on with its one flag
# and compares the losses bit for bit. Set-up is made once; logs and losses are in .quickstart/.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "${root}"
python="${VENV:-${root}/.venv}/bin/python"
out="${root}/.quickstart"
steps=40
export OMP_NUM_THREADS=1 # 4 processes on few cores

bash scripts/setup_env.sh
mkdir --parents -- "${out}"
"${python}" -m megatron_bfpp.data --output "${out}/text"
export DATA_PATH="${out}/text_text_document"
quoted="$("${python}" -m megatron_bfpp.config_file configs/quickstart.yaml)"
eval "flags=(${quoted})" # config_file quotes each word for the shell

job="" # the process group of the arm that runs
# torchrun's ranks are in sessions of their own: only torchrun can end them, so it is asked to and waited for. It passes
# SIGTERM on and kills, 30 s later, what is left.
stop_job() {
    local running="${job}"
    job=""
    [[ -n "${running}" ]] || return 0
    kill -TERM -- "-${running}" 2>/dev/null || true
    wait "${running}" 2>/dev/null || true
}
trap 'stop_job; exit 130' INT
trap 'stop_job; exit 143' TERM
trap stop_job EXIT

# progress FILE: "step 12 of 40, lm loss 3.21", from the last line of a step log.
progress() {
    local last="" step=0 loss=""
    [[ ! -s "$1" ]] || last="$(tail --lines=1 -- "$1")"
    if [[ "${last}" =~ \"step\":\ ([0-9]+),\ \"lm\ loss\":\ ([0-9.]+) ]]; then
        step="${BASH_REMATCH[1]}" loss="$(printf ', lm loss %.4f' "${BASH_REMATCH[2]}")"
    fi
    printf 'step %d of %d%s' "${step}" "${steps}" "${loss}"
}

# run_arm NAME FLAG...: one training run, with its progress on one line of a terminal, else a line every 10 steps.
run_arm() {
    local name="$1" log="${out}/$1.log" losses="${out}/$1.jsonl" line="" shown=-1 status=0
    shift
    rm --force -- "${losses}"
    echo "quickstart: ${name} ($*)"
    set -m # a process group of its own: Ctrl-C reaches this script alone, which then ends torchrun
    BFPP_STEP_LOG="${losses}" "${python}" -m torch.distributed.run --standalone --nproc-per-node 4 \
        -m megatron_bfpp.pretrain_gpt --device cpu "${flags[@]}" --train-iters "${steps}" \
        --data-cache-path "${out}/cache" "$@" >"${log}" 2>&1 </dev/null &
    job=$!
    set +m
    while kill -0 "${job}" 2>/dev/null; do
        line="$(progress "${losses}")"
        if [[ -t 1 ]]; then
            printf '\r  %s ' "${line}"
        elif [[ "${line}" =~ ^step\ ([0-9]+) ]] && ((BASH_REMATCH[1] / 10 != shown / 10 || shown < 0)); then
            printf '  %s\n' "${line}"
            shown="${BASH_REMATCH[1]}"
        fi
        sleep 1
    done
    wait "${job}" || status=$?
    job=""
    line="$(progress "${losses}")"
    if [[ -t 1 ]]; then
        printf '\r  %s\n' "${line}"
    elif ((shown / 10 != steps / 10)); then
        printf '  %s\n' "${line}"
    fi
    if ((status)); then
        tail --lines=20 -- "${log}" >&2
        # torchrun ends with a summary that names no error; the ranks' own last words stand above it.
        grep --extended-regexp '^(\[rank[0-9]+\]: )?([A-Za-z_.]*(Error|Exception)|megatron_bfpp: error)\b' -- "${log}" |
            grep --invert-match ChildFailedError | head --lines=4 >&2 || true
        echo "quickstart: ${name} failed with exit code ${status}; the whole log is ${log}" >&2
        exit 1
    fi
}

run_arm 1f1b --num-virtual-stages-per-pipeline-rank 2
run_arm 1f1b-grouped --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 8
run_arm breadth-first --pipeline-schedule breadth-first

grep --no-filename "^megatron_bfpp .*breadth-first, PP" "${out}/breadth-first.log" || true
"${python}" -m megatron_bfpp.cli show --pp 4 --chunks 2 --microbatches 8 --order interleaved --order breadth-first \
    --svg "${out}/timeline.svg" >"${out}/timeline.txt"
"${python}" scripts/quickstart_table.py --steps "${steps}" --folder "${out}" 1f1b 1f1b-grouped breadth-first
echo "planned timelines: ${out}/timeline.svg (as text: bfpp show --pp 4 --chunks 2 --microbatches 8)"
