"""Chat templates as Hugging Face has them, and the dialogues that this library renders with one.

A template comes with a model, from anyone: it runs in Jinja's sandbox, which keeps it from Python's
internals and from changing what it is given.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Stands for a response in a rendered dialogue; its own token ids then take its place.
_RESPONSE = "\N{SYMBOL FOR SUBSTITUTE}response\N{SYMBOL FOR SUBSTITUTE}"

_ASKED = {"role": "user", "content": "?"}  # a turn that only has to be there


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant says: its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template: the same text that transformers' `apply_chat_template` makes of it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Raises ValueError if `source` is not a template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": functools.partial(strftime, ""),
            "dict": lambda *pairs, **names: dict(*pairs, **names),  # no class to climb up from
        }
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}.") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """The text of a dialogue, special tokens spelled out.

        Args:
          messages: its turns.
          options: variables of the template's own, such as `enable_thinking`.
          generation_prompt: end with what begins the assistant's next turn.

        Raises:
          ValueError: the template refuses the dialogue.
        """
        variables = self._special_tokens | dict(options or {})
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except Exception as error:  # a template runs what it likes
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}") from error


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime(date: str, form: str) -> str:
    """What a template that asks for the date gets on `date`, "YYYY-MM-DD".

    Raises:
      ValueError: it is "": nobody said which day it is.
    """
    if not date:
        raise ValueError(
            "it asks for the date, and has to give the same prompts tomorrow; expected a day in "
            "data.date: --config.data.date=2026-01-31, or --date of an evaluation"
        )
    return datetime.date.fromisoformat(date).strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class Chat:
    """Text of a user's turn -> token ids of the prompt, by a template or, without one, as it is.

    Attributes:
      templated: whether there is a template.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate | None = None,
        *,
        system: str = "",
        thinking: str = "",
        date: str = "",
        options: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          tokenizer: an `opsd_jax.data.task.Tokenizer`.
          template: None for prompts of plain text.
          system: the system's turn; "" for none.
          thinking: "on", "off", or "" for what the template does by itself.
          date: the day that it is for the template, "YYYY-MM-DD"; "" where it does not ask.
          options: further variables of the template.

        Raises:
          ValueError: what was asked for is not in the template's power.
        """
        self._tokenizer, self._template = tokenizer, template
        self.templated = template is not None
        self._system = [{"role": "system", "content": system}] if system else []
        self._options = dict(options or {})
        if date:
            self._options["strftime_now"] = functools.partial(strftime, date)
        if thinking:
            self._options["enable_thinking"] = thinking == "on"
        if template is None:
            asked = {"system": system, "thinking": thinking, "template_options": options}
            for name, value in asked.items():
                if value:
                    raise ValueError(
                        f"data.{name} is {value!r}, and the prompts are plain text: the tokenizer "
                        "has no chat template. Name a file with one in data.chat_template."
                    )
            return
        self._render([_ASKED])
        if thinking:
            other = self._options | {"enable_thinking": thinking != "on"}
            if template.render([_ASKED], self._options) == template.render([_ASKED], other):
                raise ValueError(
                    f"data.thinking is {thinking!r}, and the chat template renders the same with "
                    "'on' and 'off'; expected ''."
                )

    def _render(self, turns: Sequence[Message]) -> str:
        assert self._template is not None
        return self._template.render([*self._system, *turns], self._options)

    def prompt(self, text: str) -> list[int]:
        """Token ids of the prompt in which the user says `text`."""
        if self._template is None:
            document = getattr(self._tokenizer, "encode_document", self._tokenizer.encode)
            return document(text)
        return self._tokenizer.encode(self._render([{"role": "user", "content": text}]))

    def next_turn(self, request: str) -> list[int]:
        """Token ids of what comes after a response, its end-of-sequence token apart, when the user
        then says `request`: up to where the next response begins.

        Appended to the ids of a prompt and a response they make a dialogue in which the response is
        what was sampled, token for token, its thinking included, whatever the template does with
        that.
        """
        if self._template is None:
            return self._tokenizer.encode(f"\n\n{request}\n")
        text = self._render(
            [
                _ASKED,
                {"role": "assistant", "content": _RESPONSE},
                {"role": "user", "content": request},
            ]
        )
        _, found, rest = text.rpartition(_RESPONSE)
        if not found:
            raise ValueError("the chat template does not show an assistant's turn: no memos.")
        return self._tokenizer.encode(rest)

    def begun(self) -> str:
        """What of the response the prompt has written already: "<think>" and what follows it, where
        the template opens the thinking itself; else "".
        """
        if self._template is None:
            return ""
        text = self._render([_ASKED])
        spoken = text.rstrip()
        return text[spoken.rindex("<think>") :] if spoken.endswith("<think>") else ""


def fitting(render: Callable[[str], list[int]], text: str, limit: int) -> tuple[list[int], bool]:
    """`render` of as much of the beginning of `text` as makes at most `limit` token ids.

    Returns:
      The ids, and whether the text was cut.

    Raises:
      ValueError: they are too many without any of it.
    """
    ids = render(text)
    if len(ids) <= limit:
        return ids, False
    fits, low, high = render(""), 0, len(text)
    if len(fits) > limit:
        raise ValueError(f"{len(fits)} tokens without the privileged text; {limit} fit.")
    while high - low > 1:
        middle = (low + high) // 2
        ids = render(text[:middle])
        if len(ids) <= limit:
            fits, low = ids, middle
        else:
            high = middle
    return fits, True
