"""A tokenizer without a file: every byte of the text is a token. For models with random weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

_OFFSET = 4  # pad, begin, end, separator


class ByteTokenizer(NamedTuple):
    """Callable as the tokenizers of Hugging Face are: lists of texts in, lists of token ids out."""

    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    sep_token_id: int = 3

    @property
    def vocab_size(self) -> int:
        """V: the bytes and the special tokens."""
        return 256 + _OFFSET

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, list[list[int]]]:
        """Return `input_ids` and `token_type_ids`; special tokens are one at the begin and separators."""
        ids, types = [], []
        for i, text in enumerate(texts):
            first = [self.bos_token_id] * add_special_tokens + _encode(text)
            second = [] if pairs is None else [self.sep_token_id, *_encode(pairs[i])]
            cut = max_length if truncation else None
            ids.append([*first, *second][:cut])
            types.append(([0] * len(first) + [1] * len(second))[:cut])
        return {"input_ids": ids, "token_type_ids": types}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, **_: Any) -> str:
        """Turn tokens into text; broken UTF-8 becomes replacement characters."""
        marks = {0: "<pad>", 1: "<begin>", 2: "<end>", 3: "<sep>"}
        parts, run = [], bytearray()
        for token in map(int, ids):
            if token >= _OFFSET:
                run.append((token - _OFFSET) % 256)
            elif not skip_special_tokens:
                parts += [run.decode(errors="replace"), marks[token]]
                run = bytearray()
        return "".join([*parts, run.decode(errors="replace")])


def _encode(text: str) -> list[int]:
    return [byte + _OFFSET for byte in text.encode()]
