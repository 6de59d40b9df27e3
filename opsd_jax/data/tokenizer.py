"""A byte tokenizer, which needs no files, and the tokenizers of Hugging Face models."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from opsd_jax.data.chat import LONGEST_REASON, ChatTemplate, read_template
from opsd_jax.options import ConfigError
from opsd_jax.storage.foreign import escape, listed, read_object, shown

THINKING = ("<think>", "</think>")  # tags around the thinking of a response

TOKENIZER_BYTES = 256 * 2**20  # largest tokenizer.json; released files have up to 40 MB


class ByteTokenizer:
    """A tokenizer whose tokens are the bytes of the UTF-8 encoded text.

    Id 0 is padding, id 1 ends a response, and byte b has id b + 2.
    """

    vocab_size = 258
    pad_id, eos_ids = 0, (1,)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""
        return [byte + 2 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids. Skips special tokens and ids beyond the vocabulary.

        Bytes that are not valid UTF-8, which a model may sample, become U+FFFD.
        """
        return bytes(i - 2 for i in ids if 2 <= i < self.vocab_size).decode(errors="replace")


class PretrainedTokenizer:
    """The tokenizer of a Hugging Face model, loaded from the model's directory.

    Attributes:
      vocab_size: the tokenizer's highest id plus one. The model's vocabulary may be larger.
      pad_id: id of the padding token; if there is none, the first of `eos_ids`.
      eos_ids: id of `eos_token`, then the ids in `generation_config.json` or `config.json`.
      special_tokens: name -> text of special tokens, the variables of chat templates.
      control_tokens: texts that always encode to a special token, without the tags in THINKING.
      chat_template: the directory's chat template, or None.
    """

    def __init__(self, directory: str | pathlib.Path):
        """Loads the tokenizer and its chat template from a model's directory.

        Raises:
          ConfigError: a file is missing or cannot be used. Names the file and the reason.
        """
        self._directory = pathlib.Path(directory)
        with _named(self._directory):
            self._load(self._directory)
            self.decode(self.encode("1 + 1 = 2?"))  # fails with a vocabulary that lacks tokens

    def _load(self, directory: pathlib.Path) -> None:
        """Loads the files and sets all attributes. Raises any exception for unexpected content."""
        self._tokenizer = _tokenizer(directory / "tokenizer.json")
        settings = _json(directory / "tokenizer_config.json")
        _add_missing(self._tokenizer, settings.get("added_tokens_decoder") or {})
        named = _json(directory / "special_tokens_map.json") | settings
        if isinstance(extra := named.get("extra_special_tokens"), dict):
            named = extra | named
        self.special_tokens = {
            name: _text(value)
            for name, value in named.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        special = {
            id: token.content
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            # Verifiers and contexts read these tags, whatever a tokenizer says of them.
            if token.special and token.content not in THINKING
        }
        self._skipped, self.control_tokens = frozenset(special), tuple(special.values())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_ids = _eos_ids(directory, vocabulary.get(self.special_tokens.get("eos_token", "")))
        self.pad_id = vocabulary.get(self.special_tokens.get("pad_token", ""), self.eos_ids[0])
        source = _chat_template(directory, settings)
        if not isinstance(source, str | None):
            raise ConfigError(
                f"{directory} has a chat_template of type {type(source).__name__}; expected a text."
            )
        self.chat_template = ChatTemplate(source, self.special_tokens) if source else None

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text without adding special tokens.

        Special tokens that the text contains become their ids.
        """
        with _named(self._directory):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        """Returns the token ids of a text, and adds special tokens such as <|begin_of_text|>.

        An end-of-sequence token at the end is removed.
        """
        with _named(self._directory):
            ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens and ids beyond the vocabulary.

        The tags in THINKING stay, also if they are special tokens.
        """
        kept = [i for i in ids if i < self.vocab_size and i not in self._skipped]
        with _named(self._directory):
            return self._tokenizer.decode(kept, skip_special_tokens=False)


class _named:
    """Context manager that turns exceptions in its block into a ConfigError with a directory.

    It covers the errors of the package `tokenizers`, which can panic as well.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, ConfigError):
            return
        # The exception for a panic in Rust is no Exception, and its class cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            reason = escape(str(error)[:LONGEST_REASON])
            raise ConfigError(
                f"{self._directory} has a tokenizer that cannot be used: {type(error).__name__}: "
                f"{reason}; expected the tokenizer files of a Hugging Face model."
            ) from error


def _tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Loads the tokenizer in a `tokenizer.json`, and disables its truncation and padding."""
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}; expected a Hugging Face model's directory. If the model has only "
            "vocab and merges files, create this file with transformers: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)."
        )
    if path.stat().st_size > TOKENIZER_BYTES:
        raise ConfigError(f"{path} has over {TOKENIZER_BYTES:,} bytes; expected a smaller file.")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the class Exception itself
        raise ConfigError(
            f"{path} cannot be read: {escape(str(error)[:LONGEST_REASON])}; expected the "
            "tokenizer.json of a Hugging Face model."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _eos_ids(directory: pathlib.Path, first: int | None) -> tuple[int, ...]:
    """Returns the ids of all tokens that end a response, without duplicates.

    Args:
      directory: directory of the model.
      first: id of the tokenizer's `eos_token`, if it has one.

    Raises:
      ConfigError: there is no such id, or a file has something else in its place.
    """
    ids = [] if first is None else [first]
    for file in ("generation_config.json", "config.json"):
        more = _json(directory / file).get("eos_token_id")
        if more is not None:
            more = more if isinstance(more, list) else [more]
            if not all(type(i) is int and 0 <= i < 2**31 for i in more):
                raise ConfigError(
                    f"{directory / file}: eos_token_id is {shown(more)}; expected an id, or a list "
                    "of ids."
                )
            ids += more
            break
    if not ids:
        raise ConfigError(
            f"{directory} defines no end-of-sequence token; expected eos_token in "
            "tokenizer_config.json, or eos_token_id in generation_config.json."
        )
    return tuple(dict.fromkeys(ids))


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if the file does not exist."""
    return read_object(path) if path.exists() else {}


def _text(token: Any) -> str:
    """Returns the text of a token, which is a string or a dict with the key "content"."""
    return token if isinstance(token, str) else str(token.get("content", ""))


def _add_missing(tokenizer: tokenizers.Tokenizer, defined: dict[str, Any]) -> None:
    """Adds the tokens that only `tokenizer_config.json` defines, in the order of their ids.

    Args:
      tokenizer: the tokenizer in `tokenizer.json`.
      defined: `added_tokens_decoder` of `tokenizer_config.json`: id -> token.
    """
    properties = ("single_word", "lstrip", "rstrip", "normalized", "special")
    missing = [
        tokenizers.AddedToken(_text(token), **{p: token[p] for p in properties if p in token})
        for _, token in sorted(defined.items(), key=lambda item: int(item[0]))
        if tokenizer.token_to_id(_text(token)) is None
    ]
    # Each call takes time in proportion to all tokens that were added before.
    for special, tokens in itertools.groupby(missing, lambda token: token.special):
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))


def _chat_template(directory: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """Returns the text of the default chat template in a model's directory, or None.

    Args:
      directory: directory of the model.
      settings: content of its `tokenizer_config.json`.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_template(path)
    source = settings.get("chat_template") or _json(directory / "chat_template.json").get(
        "chat_template"
    )
    if not isinstance(source, list):
        return source
    by_name = {entry.get("name"): entry.get("template") for entry in source}
    if not isinstance(default := by_name.get("default"), str):
        names = listed([str(name) for name in by_name])
        raise ConfigError(
            f"{directory} has the chat templates {names}; expected one named 'default'. "
            "To use another one, set config.data.chat_template to the path of its file."
        )
    return default
