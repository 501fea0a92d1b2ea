"""Tokenizers of GGUF files: byte-level BPE, as the Llama family has it.

`transformers` reads these too, but only where torch is installed.
"""

from pathlib import Path
from typing import Any

from h2tune_jax.types import FederationError, near_match

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS.replace("{DIGITS}", "{1,3}"),
    "qwen2": _WORDS.replace("{DIGITS}", ""),
}
_CONTROL = 3  # the token type of tokens that no text contains


def load_gguf_tokenizer(file: str | Path) -> Any:
    """Return the tokenizer of a GGUF file as a `transformers` fast tokenizer, padding on the left."""
    import gguf

    file = Path(file)
    if not file.is_file():
        raise FederationError(f"{file}: no such file")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader raises whatever it trips over
        raise FederationError(f"{file}: truncated or not a GGUF file: {error}") from error

    def field(name: str, default: Any = ...) -> Any:
        entry = reader.get_field(f"tokenizer.{name}")
        if entry is None and default is ...:
            raise FederationError(f"{file}: field 'tokenizer.{name}' is missing")
        return default if entry is None else entry.contents()

    model, pre = field("ggml.model"), field("ggml.pre", "gpt-2")
    if model != "gpt2":
        raise FederationError(
            f"{file}: tokenizer model {model!r} is unsupported; {near_match(model, ['gpt2'])}"
        )
    if pre not in _PATTERNS:
        raise FederationError(
            f"{file}: pre-tokenizer {pre!r} is unsupported; {near_match(pre, _PATTERNS)}"
        )
    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in field("ggml.merges"))]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    named = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = field(f"ggml.{theirs}_token_id", None)
        if number is not None:
            named[f"{ours}_token"] = tokens[number]
    first = named.get("bos_token") if field("ggml.add_bos_token", False) else None
    return _wrap(
        _byte_level_bpe(tokens, merges, special, pre, first),
        chat_template=field("chat_template", None),
        **named,
    )


def _byte_level_bpe(
    tokens: list[str],
    merges: list[tuple[str, str]],
    special: list[str],
    pre: str,
    first: str | None,
) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    pattern = _PATTERNS[pre]
    steps: list[Any] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in special]
    )
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, vocab[first])],
        )
    return tokenizer


def _wrap(tokenizer: Any, *, chat_template: str | None, **named: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)
    if chat_template is not None:
        wrapped.chat_template = chat_template
    return wrapped
