"""The quickstart's dataset is the text, byte for byte, and is there whole or not at all."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_bfpp import data
from megatron_bfpp.console.errors import UserError

indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")

DOCUMENTS = {"b": "zweites Stück", "a": "first", "c": ""}


def test_the_text_of_python_reads_back_byte_for_byte(tmp_path: Path) -> None:
    prefix, documents, tokens, written = data.build(tmp_path / "with space" / "text")
    assert prefix == str(tmp_path / "with space" / "text_text_document") and written
    dataset = indexed_dataset.IndexedDataset(prefix)
    read_back = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(ids[-1] == data.END_OF_DOCUMENT for ids in read_back)
    assert [bytes(ids[:-1]).decode() for ids in read_back] == [topics[name] for name in sorted(topics)]
    assert (documents, tokens) == (len(topics), sum(map(len, read_back)))
    assert list(dataset.document_indices) == list(range(len(topics) + 1))


def test_documents_are_sorted_by_name_and_may_be_empty(tmp_path: Path) -> None:
    prefix, documents, tokens, _ = data.build(tmp_path / "text", DOCUMENTS)
    dataset = indexed_dataset.IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(documents)] == [
        [*b"first", 256],
        [*"zweites Stück".encode(), 256],
        [256],
    ]
    assert tokens == sum(len(dataset[i]) for i in range(documents))


def test_a_second_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = data.build(tmp_path / "text", DOCUMENTS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert data.build(tmp_path / "text", DOCUMENTS) == (*first[:3], False)
    assert data.main(["--output", str(tmp_path / "text")]) == 0
    assert "3 documents" in (output := capsys.readouterr().out) and "nothing to do" in output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


class Interrupted(dict[str, str]):
    """Documents whose second one never comes: the user pressed Ctrl-C."""

    def items(self):  # type: ignore[no-untyped-def, override]
        yield "a", "first"
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        data.build(tmp_path / "text", Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_a_write_interrupted_before_its_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_at_the_index(source: Path, destination: str, replace=data.os.replace) -> None:  # type: ignore[no-untyped-def]
        if str(destination).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(data.os, "replace", killed_at_the_index)
        with pytest.raises(KeyboardInterrupt):
            data.build(tmp_path / "text", DOCUMENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["text_text_document.bin"]
    assert data.build(tmp_path / "text", DOCUMENTS)[3]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx"]


@pytest.mark.parametrize("damaged", [".bin", ".idx"])
def test_a_damaged_dataset_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    prefix = data.build(tmp_path / "text", DOCUMENTS)[0]
    file = Path(prefix + damaged)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError):
        data.build(tmp_path / "text", DOCUMENTS)
    assert data.main(["--output", str(tmp_path / "text")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_megatrons_tokenizer_agrees_with_the_ids() -> None:
    libraries = pytest.importorskip("megatron.core.tokenizers.text.libraries.null_tokenizer")
    from megatron.core import __version__

    tokenizer = libraries.NullTokenizer(data.VOCAB_SIZE - 1 if __version__.startswith("0.17.") else data.VOCAB_SIZE)
    assert (tokenizer.eod, tokenizer.vocab_size) == (data.END_OF_DOCUMENT, data.VOCAB_SIZE)
