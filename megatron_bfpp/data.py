"""Make a small Megatron dataset of real English text without a download.

    python -m megatron_bfpp.data --output .quickstart/text

writes .quickstart/text_text_document.bin and .idx, for --data-path .quickstart/text_text_document: the names and the
format of Megatron's tools/preprocess_data.py. The text is Python's language reference (pydoc_data.topics), a document
for each topic.

Tokens are the bytes of the UTF-8 text, 0..255, and 256 ends a document. Megatron's NullTokenizer agrees with these ids:
--tokenizer-type NullTokenizer --vocab-size 257 (on megatron-core 0.17: 256, there the end of document is not counted).
Its ByteLevelTokenizer cannot be chosen with --tokenizer-type in any release, and ends documents with the byte 0.
"""

import argparse
import contextlib
import os
import struct
import sys
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import numpy

from .console.errors import UserError, shown

__all__ = ["END_OF_DOCUMENT", "VOCAB_SIZE", "build"]

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
SUFFIX = "_text_document"
UINT16_CODE = 8  # megatron.core.datasets.indexed_dataset.DType.uint16


def build(output: str | os.PathLike[str], documents: dict[str, str] | None = None) -> tuple[str, int, int, bool]:
    """Write the dataset unless it is there; return its --data-path, documents, tokens, and whether it was written.

    The .idx is put in place last and names every byte of the .bin, so a dataset with an .idx is whole.
    """
    prefix = f"{output}{SUFFIX}"
    if finished := _finished(prefix):
        return prefix, *finished, False
    # Imported here: they take seconds, and a second run needs none of it.
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two builds at once apart; the later one replaces the files of the earlier with equal bytes.
    partial = {end: Path(f"{prefix}.{os.getpid()}.partial{end}") for end in (".bin", ".idx")}
    try:
        # Every token fits into 16 bits, the type that Megatron takes for vocabularies below 65500.
        builder = IndexedDatasetBuilder(str(partial[".bin"]), dtype=numpy.uint16)
        tokens = 0
        with contextlib.closing(builder.data_file):
            for _, text in sorted((topics if documents is None else documents).items()):
                ids = [*text.encode("utf-8"), END_OF_DOCUMENT]
                builder.add_item(torch.tensor(ids))
                builder.end_document()
                tokens += len(ids)
        builder.finalize(str(partial[".idx"]))
        for end in (".bin", ".idx"):
            os.replace(partial[end], prefix + end)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return prefix, len(builder.document_indices) - 1, tokens, True


def _finished(prefix: str) -> tuple[int, int] | None:
    """Return documents and tokens of a whole dataset, None where there is none. Needs no Megatron, milliseconds."""
    if not (os.path.isfile(prefix + ".idx") and os.path.isfile(prefix + ".bin")):
        return None
    index = Path(prefix + ".idx").read_bytes()
    # Magic, version, code of the token type, sequences, document ends; then 4 + 8 bytes a sequence (length and offset
    # in the .bin) and 8 bytes a document end.
    header = struct.Struct("<9sQBQQ")
    magic, version, type_code, sequences, ends = header.unpack(index.ljust(header.size, b"\0")[: header.size])
    found = magic, version, type_code, len(index)
    if found != (b"MMIDIDX\0\0", 1, UINT16_CODE, header.size + 12 * sequences + 8 * ends):
        raise UserError(f"{prefix}.idx is not a whole index of 16-bit tokens; remove it or choose another --output.")
    tokens = int(numpy.frombuffer(index, numpy.int32, sequences, header.size).sum())
    bytes_there = os.path.getsize(prefix + ".bin")
    if bytes_there != 2 * tokens:
        wrong = f"{prefix}.bin has {bytes_there} bytes and its .idx names {2 * tokens}"
        raise UserError(f"{wrong}; remove both files or choose another --output.")
    return ends - 1, tokens


def main(argv: list[str]) -> int:
    """Write the dataset that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_bfpp.data", description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, metavar="PREFIX", help=f"writes PREFIX{SUFFIX}.bin and .idx")
    output = parser.parse_args(argv).output
    started = time.monotonic()
    warnings.simplefilter("ignore")  # Megatron's import warns of everything optional that is not installed
    try:
        prefix, documents, tokens, written = build(output)
    except (UserError, OSError) as error:
        print(f"megatron_bfpp: {shown(error)}", file=sys.stderr)
        return 2
    size = f"{documents} documents, {tokens} tokens (bytes 0..255, {END_OF_DOCUMENT} ends a document)"
    how = f"written in {time.monotonic() - started:.1f} s" if written else "exists already, nothing to do"
    print(f"{prefix}: {size}; {how}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
