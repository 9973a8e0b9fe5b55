"""Every file of configs/ is a command line that Megatron and this plugin accept, and that fits on its cluster."""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
import jobs

from megatron_bfpp.console.config_file import cluster, load
from megatron_bfpp.planner.flags import gpt_of, parse, precision_of, strategy_of
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.search import Request, estimate

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# A model alone, for any cluster, and the quickstart's on CPUs name no cluster.
GPUS = {path.stem: (found.gpus, found.gpu) for path in CONFIGS if (found := cluster(path)).gpus}
BILLIONS = {"gpt_52b": 52.4, "gpt_52b_4k": 52.4, "gpt_6p6b": 6.65, "gpt_175b": 175.2, "llama3_70b": 70.55}


def _parse_all(paths: list[str], data: str) -> None:
    """In a rank: Megatron's parser and checks, with the plugin's."""
    from megatron.training import arguments

    import megatron_bfpp

    for variable in ("DATA_PATH", "VOCAB_FILE", "MERGE_FILE", "TOKENIZER_MODEL"):
        os.environ[variable] = data
    megatron_bfpp.enable(device="cpu")
    found = {}
    for path in paths:
        words = load(path)[1]
        tp, pp = (int(words[words.index(flag) + 1]) if flag in words else 1
                  for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"))  # fmt: skip
        os.environ["WORLD_SIZE"] = str(GPUS.get(Path(path).stem, (tp * pp, ""))[0])
        sys.argv = ["pretrain_gpt.py", *words]
        args = arguments.parse_args()
        arguments.validate_args(args, {})
        names = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size",
                 "data_parallel_size", "virtual_pipeline_model_parallel_size", "global_batch_size",
                 "pipeline_schedule", "num_query_groups")  # fmt: skip
        found[path] = {name: getattr(args, name) for name in names}
    print("\nPARSED " + json.dumps(found), flush=True)


@pytest.mark.slow
def test_megatron_accepts_every_file_and_understands_it_as_the_planner_does(tmp_path):
    for ending in ("", ".idx", ".bin"):
        (tmp_path / f"data{ending}").touch()
    (output,) = jobs.run_job(_parse_all, 1, tmp_path, [str(path) for path in CONFIGS], str(tmp_path / "data"))
    (line,) = [line for line in output.splitlines() if line.startswith("PARSED ")]
    for path, args in json.loads(line.removeprefix("PARSED ")).items():
        flags = parse(load(path, expand=False)[1])
        gpt = gpt_of(flags)
        assert (gpt.num_layers, gpt.hidden_size, gpt.num_attention_heads, gpt.seq_length, gpt.ffn, gpt.groups) == (
            *(
                args[name]
                for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "ffn_hidden_size")
            ),
            args["num_query_groups"] if flags.group_query_attention else args["num_attention_heads"],
        )
        if Path(path).stem in GPUS:
            strategy = strategy_of(flags, GPUS[Path(path).stem][0])
            assert (strategy.dp, strategy.chunks, strategy.global_batch) == (
                args["data_parallel_size"],
                args["virtual_pipeline_model_parallel_size"],
                args["global_batch_size"],
            )
            assert args["pipeline_schedule"] == strategy.schedule == "breadth-first"


@pytest.mark.parametrize(("name", "billions"), BILLIONS.items())
def test_the_model_has_the_size_in_its_name(name, billions):
    (path,) = [path for path in CONFIGS if path.stem == name]
    assert gpt_of(parse(load(path, expand=False)[1])).parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", GPUS)
def test_the_configuration_fits_into_its_gpus(name):
    (path,) = [path for path in CONFIGS if path.stem == name]
    flags, (num_gpus, kind) = parse(load(path, expand=False)[1]), GPUS[name]
    gpu = load_gpu(kind)
    strategy = strategy_of(flags, num_gpus)
    request = Request(gpt_of(flags), gpu, num_gpus, strategy.global_batch, precision_of(flags) or gpu.precision)
    found = estimate(request, strategy, exact=True)
    assert found.memory.total < gpu.memory - request.reserve
    assert 0.2 < found.tflops_per_gpu * 1e12 / gpu.peak_flops[gpu.precision] < 0.7


# The flags of a job with gpt_52b.yaml or one of its variants: those of the model, and those of the variant.
MODEL = (
    "--num-layers 64 --hidden-size 8192 --num-attention-heads 64 --seq-length 1024 --max-position-embeddings 1024 "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --vocab-size 50257 "
    "--tokenizer-type GPT2BPETokenizer --vocab-file ${VOCAB_FILE} --merge-file ${MERGE_FILE} --data-path ${DATA_PATH} "
    "--split 99,1,0 --train-iters 100 --lr 0.0001 --min-lr 1e-05 --lr-decay-style cosine --lr-warmup-iters 10 "
    "--clip-grad 1.0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --micro-batch-size 1"
)
BF16, FP16 = "--bf16 ", "--fp16 --initial-loss-scale 65536 --transformer-impl local "
ZERO1 = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
PARALLEL = (
    "--tensor-model-parallel-size {} --sequence-parallel --pipeline-model-parallel-size {} "
    "--num-virtual-stages-per-pipeline-rank 8 --pipeline-schedule breadth-first --global-batch-size {} "
)
VARIANTS = {
    "gpt_52b": "--global-batch-size 64",
    "gpt_52b_4k": "--seq-length 4096 --max-position-embeddings 4096 --global-batch-size 64",
    "gpt_52b_64_v100": PARALLEL.format(8, 8, 16) + FP16,
    "gpt_52b_4096_v100": PARALLEL.format(8, 8, 1024) + FP16 + ZERO1,
    "gpt_52b_512_h100": PARALLEL.format(4, 8, 256) + BF16 + ZERO1,
    "gpt_52b_64_a100_h100": PARALLEL.format(8, 4, 32) + BF16 + ZERO1,
}


def _by_flag(words: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            found[word] = values = []
        else:
            values.append(word)
    return found


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.startswith("gpt_52b")], ids=lambda path: path.stem
)
def test_a_variant_of_the_52b_model_has_the_flags_of_its_base_and_its_own(path):
    words = load(path, expand=False)[1]
    assert _by_flag(words) == _by_flag(MODEL.split()) | _by_flag(VARIANTS[path.stem].split())


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_the_variables_are_those_that_megatron_and_the_schedule_need_on_gpus_before_blackwell(path):
    environment, words = load(path, expand=False)
    divided = {"--tensor-model-parallel-size", "--context-parallel-size"} & {*words}
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "1" if divided else "32"} if path.stem in GPUS else {}
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | connections


def test_the_clusters_are_those_that_the_configurations_were_made_for():
    assert GPUS == {
        "gpt_52b_64_v100": (64, "v100-32"),
        "gpt_52b_64_a100_h100": (64, "a100-80"),
        "gpt_52b_512_h100": (512, "h100-80"),
        "gpt_52b_4096_v100": (4096, "v100-32"),
        "gpt_6p6b": (16, "a100-80"),
        "gpt_175b": (128, "h100-80"),
        "llama3_70b": (64, "h100-80"),
    }
