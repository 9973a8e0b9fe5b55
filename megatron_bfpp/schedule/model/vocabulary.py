"""The words of known tokenizers, where a command line names the tokenizer and not their number."""

ASSUMED, ASSUMED_NAME = 128_256, "Llama 3"
# A part of the names of a tokenizer's files or of its model: its words, and whose they are. First match wins.
_BY_NAME = (
    ("gpt4o", 131_072, "Megatron's TikTokenizer"), ("nemotron_2_256k", 256_000, "Nemotron"),
    ("nemotron", 131_072, "Nemotron"), ("gpt-oss", 201_088, "gpt-oss"), ("llama-3", 128_256, "Llama 3"),
    ("llama3", 128_256, "Llama 3"), ("llama-2", 32_000, "Llama 2"), ("llava-1.5", 32_064, "LLaVA"),
    ("mixtral", 32_000, "Mixtral"), ("mistral", 32_000, "Mistral"), ("deepseek-v3", 129_280, "DeepSeek-V3"),
    ("deepseek-v2", 102_400, "DeepSeek-V2"), ("qwen", 151_936, "Qwen"), ("gpt2", 50_257, "GPT-2"),
    ("vocab.json", 50_257, "GPT-2"), ("vocab_file", 50_257, "GPT-2"),
)  # fmt: skip
_BY_TYPE = {
    "GPT2BPETokenizer": (50_257, "GPT-2"),
    "TikTokenizer": (131_072, "Megatron's TikTokenizer"),
    "Llama2Tokenizer": (32_000, "Llama 2"),
    "BertWordPieceCase": (28_996, "BERT, cased"),
    "BertWordPieceLowerCase": (30_522, "BERT"),
}


def words_of(tokenizer_type: str | None, *files: str | None) -> tuple[int, str]:
    """Return the number of words of a tokenizer, and in words whose they are. files: its model or its files."""
    if tokenizer_type == "TikTokenizer":
        return _BY_TYPE["TikTokenizer"][0], "as of Megatron's TikTokenizer"
    named = " ".join(each or "" for each in files).lower()
    for part, size, name in _BY_NAME:
        if part in named:
            return size, f"as of {name}"
    if tokenizer_type in _BY_TYPE:
        size, name = _BY_TYPE[tokenizer_type]
        return size, f"as of {name}"
    return ASSUMED, f"assumed, as of {ASSUMED_NAME}: the tokenizer is not known"
