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
stop_job() { [[ -z "${job}" ]] || kill -TERM -- "-${job}" 2>/dev/null || true; }
trap 'stop_job; exit 130' INT TERM
trap stop_job EXIT

# run_arm NAME FLAG...: one training run, with its progress.
run_arm() {
    local name="$1" done=0 shown=-1 status=0
    shift
    rm --force -- "${out}/${name}.jsonl"
    echo "quickstart: ${name} ($*)"
    set -m # a process group of its own, so that Ctrl-C can end all ranks
    BFPP_STEP_LOG="${out}/${name}.jsonl" "${python}" -m torch.distributed.run --standalone --nproc-per-node 4 \
        -m megatron_bfpp.pretrain_gpt --device cpu "${flags[@]}" --train-iters "${steps}" \
        --data-cache-path "${out}/cache" "$@" >"${out}/${name}.log" 2>&1 </dev/null &
    job=$!
    set +m
    while kill -0 "${job}" 2>/dev/null; do
        sleep 1
        done=0
        [[ ! -f "${out}/${name}.jsonl" ]] || done="$(wc --lines <"${out}/${name}.jsonl")"
        if [[ -t 1 ]]; then
            printf '\r  step %d of %d ' "${done}" "${steps}"
        elif ((done / 10 != shown / 10 || shown < 0)); then
            printf '  step %d of %d\n' "${done}" "${steps}"
            shown="${done}"
        fi
    done
    wait "${job}" || status=$?
    job=""
    [[ ! -t 1 ]] || printf '\r  step %d of %d\n' "$(wc --lines <"${out}/${name}.jsonl" 2>/dev/null || echo 0)" "${steps}"
    if ((status)); then
        tail --lines=20 -- "${out}/${name}.log" >&2
        echo "quickstart: ${name} failed with exit code ${status}; the whole log is ${out}/${name}.log" >&2
        exit 1
    fi
}

run_arm 1f1b --num-virtual-stages-per-pipeline-rank 2
run_arm 1f1b-grouped --num-virtual-stages-per-pipeline-rank 2 --microbatch-group-size-per-virtual-pipeline-stage 8
run_arm breadth-first --pipeline-schedule breadth-first

grep --no-filename "^megatron_bfpp .*breadth-first, PP" "${out}/breadth-first.log" || true
"${python}" -m megatron_bfpp.cli show --pp 4 --chunks 2 --microbatches 8 --order 1f1b --order breadth-first \
    --svg "${out}/timeline.svg" >"${out}/timeline.txt"
"${python}" scripts/quickstart_table.py --steps "${steps}" --folder "${out}" 1f1b 1f1b-grouped breadth-first
echo "planned timelines: ${out}/timeline.svg (as text: bfpp show --pp 4 --chunks 2 --microbatches 8)"
