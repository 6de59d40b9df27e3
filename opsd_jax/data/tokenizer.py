"""Tokenizers: one that needs no files, and those of Hugging Face's model directories."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from opsd_jax.data.chat import ChatTemplate


class ByteTokenizer:
    """One token a byte of UTF-8. Ids 0 and 1 are padding and the end of a response; byte b is
    b + 2.
    """

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


class PretrainedTokenizer:
    """The tokenizer of a directory with a `tokenizer.json`, as Hugging Face's models come.

    Attributes:
      vocab_size: one more than its highest id. The model's may be larger.
      pad_id: of its padding token; where there is none, of its first end-of-sequence token.
      eos_ids: its `eos_token`, then what `generation_config.json` or `config.json` adds.
      special_tokens: name -> text of its special tokens, as chat templates see them.
      control_tokens: the texts that stand for special tokens wherever they occur.
      chat_template: its own, or None.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Raises ValueError that names the file and what is wrong with it."""
        directory = pathlib.Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"there is no {path}; expected a Hugging Face model's directory. Where a model has "
                "only vocab and merges files, transformers' AutoTokenizer.from_pretrained(…)"
                ".save_pretrained(…) writes one."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{path} cannot be read: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _json(directory / "tokenizer_config.json")
        _add_missing(self._tokenizer, settings.get("added_tokens_decoder", {}))
        named = _json(directory / "special_tokens_map.json") | settings
        if isinstance(extra := named.get("extra_special_tokens"), dict):
            named = extra | named
        self.special_tokens = {
            name: _text(value)
            for name, value in named.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.control_tokens = tuple(token.content for token in added if token.special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        first = vocabulary.get(self.special_tokens.get("eos_token", ""))
        ends = [] if first is None else [first]
        for file in ("generation_config.json", "config.json"):
            more = _json(directory / file).get("eos_token_id")
            if more is not None:
                more = more if isinstance(more, list) else [more]
                if not all(type(i) is int for i in more):
                    raise ValueError(
                        f"{directory / file}: eos_token_id is {more}; expected an id, or a list."
                    )
                ends += more
                break
        if not ends:
            raise ValueError(
                f"{directory} names no end-of-sequence token; expected eos_token in "
                "tokenizer_config.json, or eos_token_id in generation_config.json."
            )
        self.eos_ids = tuple(dict.fromkeys(ends))
        self.pad_id = vocabulary.get(self.special_tokens.get("pad_token", ""), self.eos_ids[0])
        self._ends = frozenset(self.eos_ids)
        source = _chat_template(directory, settings)
        self.chat_template = ChatTemplate(source, self.special_tokens) if source else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens may be spelled; none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a text with what its beginning and end get, such as <|begin_of_text|>; never
        with an end-of-sequence token.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids[:-1] if ids and ids[-1] in self._ends else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and ids beyond the vocabulary."""
        known = [i for i in ids if i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)


def _json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected a JSON object.")
    return value


def _text(token: Any) -> str:
    """A token's text, of itself or as an object with its properties."""
    return token if isinstance(token, str) else str(token.get("content", ""))


def _add_missing(tokenizer: tokenizers.Tokenizer, listed: dict[str, Any]) -> None:
    """Adds the tokens of `added_tokens_decoder` (id -> token) that `tokenizer.json` has not."""
    properties = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(_text(token)) is None:
            known = {name: token[name] for name in properties if name in token}
            added = tokenizers.AddedToken(_text(token), **known)
            add = tokenizer.add_special_tokens if added.special else tokenizer.add_tokens
            add([added])


def _chat_template(directory: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """The text of a directory's chat template, wherever it is kept; of several the default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = settings.get("chat_template") or _json(directory / "chat_template.json").get(
        "chat_template"
    )
    if not isinstance(source, list):
        return source
    by_name = {entry.get("name"): entry.get("template") for entry in source}
    if not isinstance(default := by_name.get("default"), str):
        raise ValueError(
            f"{directory} has chat templates {', '.join(map(str, by_name))}; expected one of the "
            "name default, or a file in data.chat_template."
        )
    return default
