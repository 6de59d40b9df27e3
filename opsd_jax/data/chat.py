"""Renders chats with the Jinja chat templates of Hugging Face models.

Anyone can write the template of a model, so it runs in a sandbox. There it cannot reach Python's
internals, change its arguments, or take much time or memory.
"""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext

from opsd_jax.data.sandbox import Sandbox
from opsd_jax.options import ConfigError, fail
from opsd_jax.storage.foreign import escape, read_document, shown

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Placeholder for a response in a rendered chat; the response's own token ids replace it.
_RESPONSE = "\N{SYMBOL FOR SUBSTITUTE}response\N{SYMBOL FOR SUBSTITUTE}"

LONGEST_TEMPLATE = 200_000  # characters; released templates have up to 20,000
LONGEST_REASON = 1000  # characters of an exception that a message quotes

_ANY_TURN = {"role": "user", "content": "?"}  # a user's turn whose content does not matter


class _Generation(jinja2.ext.Extension):
    """A Jinja extension that ignores `{% generation %}` tags and renders the text between them.

    Templates mark the assistant's text with these tags.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja requires this form

    def parse(self, parser: Any) -> Any:
        """Returns the parsed statements between a pair of generation tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja chat template that renders the same text as transformers' `apply_chat_template`."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """Compiles the Jinja template `source`.

        Args:
          source: the template's text.
          special_tokens: name -> text of special tokens, as variables of the template.

        Raises:
          ConfigError: the text is not a Jinja template.
        """
        environment = self._environment = Sandbox(
            {"tojson": _tojson},
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": functools.partial(strftime, ""),
            "dict": lambda *pairs, **names: dict(
                *pairs, **names
            ),  # a function: a class gives access to internals
        }
        if len(source) > LONGEST_TEMPLATE:
            raise ConfigError(
                f"the chat template has {len(source):,} characters; expected at most "
                f"{LONGEST_TEMPLATE:,}."
            )
        try:
            environment.restart()
            self._template = environment.from_string(source)
        except Exception as error:  # deep nesting causes several exceptions of Python
            raise ConfigError(
                f"the chat template cannot be parsed: {_reason(error)}; expected a Jinja template."
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """Renders the messages of a chat as one text, which includes the special tokens.

        Args:
          messages: the turns.
          options: further variables of the template, such as `enable_thinking`.
          generation_prompt: whether the text ends with the beginning of the assistant's next turn.

        Raises:
          ConfigError: the template raises an exception, or takes too much time or memory.
        """
        variables = self._special_tokens | dict(options or {})
        try:
            self._environment.restart()
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **variables,
            )
        except Exception as error:  # a template can raise any exception
            raise ConfigError(f"the chat template raised an exception: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns an exception's type and message as one line, which a template may have written."""
    return f"{type(error).__name__}: {escape(str(error)[:LONGEST_REASON])}"


def read_template(path: pathlib.Path) -> str:
    """Returns the text of a file with a chat template.

    Raises:
      ConfigError: the file cannot be read, or it is not UTF-8.
    """
    try:
        return read_document(path).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; expected a Jinja template.") from error


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Returns a value as JSON. Unlike Jinja's own `tojson`, it does not escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime(date: str, form: str) -> str:
    """Formats a fixed date, for chat templates that ask for today's date.

    Args:
      date: "YYYY-MM-DD".
      form: format as for `datetime.date.strftime`.

    Raises:
      ValueError: the date is "", or the format has a width.
    """
    if re.search("[0-9]{3}", form):
        raise ValueError(
            f"the template formats a date with {shown(form)}; expected a format without field "
            "widths, such as '%d %b %Y'."
        )
    if not date:
        raise ValueError(
            "the template asks for today's date, so the prompts would change if the run resumed on "
            "another day; expected a fixed date. Set --config.data.date=2026-01-31, or pass --date "
            "to an evaluation."
        )
    return datetime.date.fromisoformat(date).strftime(form)


def _raise(message: str) -> None:
    """Raises a TemplateError with a message that the chat template chooses."""
    raise jinja2.TemplateError(message)


class Chat:
    """Turns user messages into the token ids of prompts, with or without a chat template.

    Attributes:
      templated: whether there is a template. If not, the prompt is the message itself.
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
        """Stores the options of the chat, and checks that the template renders with them.

        Args:
          tokenizer: an `opsd_jax.data.task.Tokenizer`.
          template: None for prompts of plain text.
          system: system message; "" for none.
          thinking: "on" or "off" sets the template's `enable_thinking`; "" leaves its default.
          date: "YYYY-MM-DD", the date for templates that ask for it; "" for other templates.
          options: further variables of the template.

        Raises:
          ConfigError: an option has no effect on the prompts.
          ValueError: the template fails.
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
            only_templates = {"system": system, "thinking": thinking, "template_options": options}
            for name, value in only_templates.items():
                if value:
                    fail(
                        f"data.{name}",
                        value,
                        "no value, because the prompts are plain text without a chat template. "
                        "To use one, set config.data.chat_template to the path of its file",
                    )
            return
        self._render(template, [_ANY_TURN])
        if thinking:
            other = self._options | {"enable_thinking": thinking != "on"}
            if template.render([_ANY_TURN], self._options) == template.render([_ANY_TURN], other):
                fail(
                    "data.thinking",
                    thinking,
                    "'', because the chat template renders the same text with 'on' and 'off'",
                )

    def _render(self, template: ChatTemplate, turns: Sequence[Message]) -> str:
        """Renders the system message, if there is one, followed by `turns`."""
        return template.render([*self._system, *turns], self._options)

    def prompt(self, text: str) -> list[int]:
        """Returns the token ids of the prompt for one user message."""
        if self._template is None:
            encode_document = getattr(self._tokenizer, "encode_document", self._tokenizer.encode)
            return encode_document(text)
        turns = [{"role": "user", "content": text}]
        return self._tokenizer.encode(self._render(self._template, turns))

    def next_turn(self, request: str) -> list[int]:
        """Returns the token ids that follow a response and contain the user's next `request`.

        Prompt, response and these ids form a chat. It contains the response exactly as it was
        sampled, including its thinking, which a template might remove. The response must not
        include its end-of-sequence token, because these ids begin with the end of its turn.

        Args:
          request: the user's next message.

        Raises:
          ValueError: the template does not render the assistant's turns.
        """
        if self._template is None:
            return self._tokenizer.encode(f"\n\n{request}\n")
        text = self._render(
            self._template,
            [
                _ANY_TURN,
                {"role": "assistant", "content": _RESPONSE},
                {"role": "user", "content": request},
            ],
        )
        _, found, rest = text.rpartition(_RESPONSE)
        if not found:
            raise ValueError(
                "the chat template does not render assistant messages, but contexts of kind 'memo' "
                "need them; expected another config.data.chat_template, or no 'memo' in `contexts`."
            )
        return self._tokenizer.encode(rest)

    def begun(self) -> str:
        """Returns the start of the response that the template adds to each prompt, or "" if none.

        If the template opens the thinking, this is "<think>" and the whitespace after it.
        """
        if self._template is None:
            return ""
        text = self._render(self._template, [_ANY_TURN])
        stripped = text.rstrip()
        return text[stripped.rindex("<think>") :] if stripped.endswith("<think>") else ""

    def thinks_nothing(self) -> bool:
        """Returns whether the template ends each prompt with a finished, empty thinking part."""
        if self._template is None:
            return False
        return self._render(self._template, [_ANY_TURN]).rstrip().endswith("</think>")


def cut_to_fit(render: Callable[[str], list[int]], text: str, limit: int) -> tuple[list[int], bool]:
    """Renders a text as at most `limit` token ids, cutting off the end of the text if needed.

    Args:
      render: text -> token ids.
      text: the text.
      limit: largest number of tokens.

    Returns:
      The token ids, and whether the text was cut.

    Raises:
      ValueError: `render("")` has too many tokens.
    """
    ids = render(text)
    if len(ids) <= limit:
        return ids, False
    fits, low, high = render(""), 0, len(text)
    if len(fits) > limit:
        raise ValueError(
            f"the text has {len(fits)} tokens even without the privileged context; expected at "
            f"most {limit}."
        )
    while high - low > 1:
        middle = (low + high) // 2
        ids = render(text[:middle])
        if len(ids) <= limit:
            fits, low = ids, middle
        else:
            high = middle
    return fits, True
