"""The files of configs/ become Megatron's flags; a mistake in one is named in at most three lines."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bfpp.console.config_file import Cluster, cluster, load
from megatron_bfpp.console.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_become_words_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "ENV_VARS:\n  OMP_NUM_THREADS: 1\n"
        "MODEL_ARGS:\n  --num-layers: 8\n  --bf16: true\n  --fp16: false\n  --lr: 1.0e-3\n  --split: 99,1,0\n"
        "  --data-path: [0.3, first, 0.7, second one]\n",
    )
    assert load(path) == (
        {"OMP_NUM_THREADS": "1"},
        [
            "--num-layers",
            "8",
            "--bf16",
            "--lr",
            "0.001",
            "--split",
            "99,1,0",
            "--data-path",
            "0.3",
            "first",
            "0.7",
            "second one",
        ],
    )


def test_variables_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BFPP_TEST_DATA", "/a place/with spaces")
    path = write(tmp_path, "MODEL_ARGS: {--data-path: '${BFPP_TEST_DATA}/text', --save: 'cost $5'}")
    assert load(path) == ({}, ["--data-path", "/a place/with spaces/text", "--save", "cost $5"])


def test_variables_may_be_left_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path, "MODEL_ARGS: {--data-path: '${BFPP_NOT_SET}/text', --num-layers: 8}")
    assert load(path, expand=False) == ({}, ["--data-path", "${BFPP_NOT_SET}/text", "--num-layers", "8"])


def test_a_base_is_completed_and_overruled(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "large.yaml").write_text(
        "cluster: {gpu: h200, gpus: 8}\nENV_VARS: {A: 1, B: 2}\n"
        "MODEL_ARGS: {--num-layers: 8, --bf16: true, --data-path: [a, b], --lr: 1}\n"
    )
    (tmp_path / "folder" / "more.yaml").write_text(
        "base: large.yaml\ncluster: {gpus: 64}\nMODEL_ARGS: {--seed: 3, --lr: 2}\n"
    )
    path = write(
        tmp_path,
        "base: folder/more.yaml\nENV_VARS: {B: 3}\n"
        "MODEL_ARGS: {--bf16: false, --data-path: c, --num-layers: 16, --fp16: true}\n",
    )
    assert load(path) == (
        {"A": "1", "B": "3"},
        ["--num-layers", "16", "--data-path", "c", "--lr", "2", "--seed", "3", "--fp16"],
    )
    assert cluster(path) == Cluster("h200", 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[moe_act layernorm]", ["moe_act", "layernorm"]), ("[moe_act]", ["moe_act"]), ("[2 2]", ["2", "2"]),
        ("[a.b c_d]", ["a.b", "c_d"]), ("[0,1,1]", ["[0,1,1]"]), ("[1]", ["[1]"]), ("([0]*1+[1]*3)", ["([0]*1+[1]*3)"]),
        ("[]", ["[]"]), ("[ ]", ["[ ]"]),
    ],
)  # fmt: skip
def test_words_in_brackets_are_a_list_and_a_list_of_python_is_one_word(tmp_path: Path, text: str, words: list[str]):
    assert load(write(tmp_path, f"MODEL_ARGS: {{--flag: '{text}'}}\n"))[1] == ["--flag", *words]


def test_a_profile_of_a_cluster_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("cluster: {gpu: mine.yaml}\n")
    path = write(tmp_path, "base: folder/base.yaml\n")
    assert cluster(path) == Cluster(str(tmp_path / "folder" / "mine.yaml"), None)
    assert cluster(write(tmp_path, "MODEL_ARGS: {}\n")) == Cluster(None, None)


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    for name, base in (("one", "two"), ("two", "three"), ("three", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\nMODEL_ARGS: {{}}\n")
    with pytest.raises(UserError, match=r"three\.yaml: base one\.yaml leads in a circle") as raised:
        load(tmp_path / "one.yaml")
    assert len(str(raised.value).splitlines()) <= 3
    alone = write(tmp_path, "base: 'config file.yaml'\n")
    with pytest.raises(UserError, match="leads in a circle"):
        cluster(alone)


def test_a_mistake_in_a_base_is_named_with_the_path_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("MODEL_ARGS: {num-layers: 8}\n")
    with pytest.raises(UserError, match=r"base\.yaml: MODEL_ARGS: 'num-layers' is not a flag"):
        load(write(tmp_path, "base: base.yaml\n"))


def test_files_of_megatrons_functional_tests_load(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "ENV_VARS:\n  CUDA_DEVICE_MAX_CONNECTIONS: 1\nTEST_TYPE: regular\nMETRICS: [lm loss]\n"
        "MODEL_ARGS:\n  --num-layers: 12\n  --bf16: true\n",
    )
    assert load(path) == ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["--num-layers", "12", "--bf16"])


def test_an_empty_map_gives_nothing(tmp_path: Path) -> None:
    assert load(write(tmp_path, "ENV_VARS:\nMODEL_ARGS:\n")) == ({}, [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("MODEL_ARG: {--bf16: true}", "MODEL_ARG"),
        ("MODEL_ARGS: [--bf16]", "MODEL_ARGS is a list"),
        ("MODEL_ARGS: {num-layers: 8}", "num-layers"),
        ("MODEL_ARGS: {--num-layers: {a: 1}}", "--num-layers is a map"),
        ("MODEL_ARGS: {--num-layers: }", "--num-layers is a missing value"),
        ("MODEL_ARGS: {--split: [1, [2]]}", "--split is a list"),
        ("MODEL_ARGS: {--data-path: '${BFPP_NOT_SET}'}", "BFPP_NOT_SET"),
        ("ENV_VARS: {NAME: [1]}", "NAME is a list"),
        ("base: [a.yaml]", "base is a list"),
        ("base: ''", "base is a text"),
        ('base: "a\\0b"', "null"),
        ("cluster: 8", "cluster is a number"),
        ("cluster: {gpu: [1]}", "cluster: gpu is a list"),
        ("cluster: {gpus: 0}", "cluster: gpus is 0; it must be a number of at least 1"),
        ("cluster: {gpus: true}", "cluster: gpus is True"),
        ("cluster: {nodes: 8}", "cluster: unknown key 'nodes'. Known are gpu and gpus"),
        ("ENV_VARS: {'NO SPACE': 1}", "NO SPACE"),
        ("- a\n- b\n", "holds a list"),
        ("", "is empty; it must hold a map"),
        ("MODEL_ARGS:\n  --a: 1\n --b: 2\n", "line 3"),
    ],
)
def test_a_mistake_is_named_with_the_path_in_at_most_three_lines(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        load(path)
        cluster(path)
    message = str(raised.value)
    assert str(tmp_path) in message and named in message
    assert len(message.splitlines()) <= 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml")


def test_as_a_program_it_prints_quoted_words_and_short_errors(tmp_path: Path) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_bfpp.config_file", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run(write(tmp_path, "MODEL_ARGS: {--data-path: 'a b', --bf16: true}"))
    assert (good.returncode, good.stdout) == (0, "--data-path\n'a b'\n--bf16\n")
    bad = run(tmp_path / "nowhere.yaml")
    assert bad.returncode == 2 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1


def test_the_shipped_configs_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DATA_PATH", "VOCAB_FILE", "MERGE_FILE", "TOKENIZER_MODEL"):
        monkeypatch.setenv(variable, "somewhere")
    shipped = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert load(path)[1]


def test_an_integer_too_long_to_print_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, f"MODEL_ARGS: {{--num-layers: 0x{'f' * 5000}}}")
    with pytest.raises(UserError, match="--num-layers has more than 4300 digits"):
        load(path)
