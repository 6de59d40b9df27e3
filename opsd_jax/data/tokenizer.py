"""A tokenizer that needs no files: one token a byte of UTF-8."""

from __future__ import annotations

from collections.abc import Sequence


class ByteTokenizer:
    """Ids 0 and 1 are padding and the end of a response; byte b is b + 2."""

    vocab_size = 258
    pad_id, eos_ids = 0, (1,)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without specials."""
        return [byte + 2 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without specials and ids beyond the vocabulary; bytes that are no
        UTF-8, as a model may sample, read U+FFFD.
        """
        return bytes(i - 2 for i in ids if 2 <= i < self.vocab_size).decode(errors="replace")
