"""The size of the vocabulary: given, or that of the tokenizer that the flags name, or else assumed."""

import argparse

from ...schedule.model.vocabulary import words_of

__all__ = ["vocabulary_of"]


def vocabulary_of(args: argparse.Namespace) -> int:
    """Return the number of words, and say in the notes where it is from if it was not given."""
    if args.vocab_size or args.padded_vocab_size:
        return int(args.vocab_size or args.padded_vocab_size)
    size, name = words_of(args.tokenizer_type, args.tokenizer_model, args.vocab_file)
    args.vocab_size = size
    args.notes.append(f"vocabulary: {size:,} words, {name}; -- --vocab-size N behind the file gives another")
    return size
