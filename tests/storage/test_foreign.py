"""JSON and messages with text that somebody else wrote."""

import json
import logging
import os

import pytest

from opsd_jax.cli import main
from opsd_jax.options import ConfigError
from opsd_jax.storage import files, foreign

HOSTILE = "a\nopsd-jax: all is well\r\x1b[31m\x9b\u2028\u202e"


def test_control_characters_are_escaped():
    escaped = r"a\nopsd-jax: all is well\r\x1b[31m\x9b\u2028\u202e"
    assert foreign.escape(HOSTILE) == escaped
    assert foreign.escape("half a pair \ud800") == r"half a pair \ud800"
    assert foreign.escape("a\tb\nc", keep="\n") == r"a\tb" + "\nc"
    assert foreign.escape("é 漢 😀 \u200d") == "é 漢 😀 \u200d"


def test_a_message_keeps_its_lines_and_indents_them():
    assert foreign.message("two values:\n  a: 1\n  b: \x1b2\nFix them.\n") == (
        "two values:\n  a: 1\n  b: \\x1b2\n  Fix them."
    )


def test_no_text_from_a_file_can_begin_a_line_of_a_log(capsys):
    main._log_to_stderr()
    logging.getLogger("opsd_jax.data").warning("data: the key %s", HOSTILE)
    main.say(f"the key {HOSTILE}")
    first, second, third, fourth = capsys.readouterr().err.splitlines()
    assert (first, third) == ("data: the key a", "opsd-jax: the key a")
    assert second == fourth == r"  opsd-jax: all is well\r\x1b[31m\x9b\u2028\u202e"


def test_lists_and_values_in_messages_are_short():
    assert foreign.listed(["a\n", "b" * 5000, "c"], count=2) == f"a\\n, {'b' * 1000}, and 1 more"
    assert foreign.shown("x" * 99) == f"'{'x' * 56}..."


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "[" * 200 + "]" * 200])
def test_deep_json_is_an_error(text):
    with pytest.raises(ValueError, match="nested over 100 levels deep"):
        foreign.parse_json(text)
    with pytest.raises(ValueError, match="nested over 100 levels deep"):
        foreign.parse_json(text.encode())


def test_json_that_is_wide_or_nested_within_the_limit_is_parsed():
    deep = "[" * 100 + "]" * 100
    assert foreign.parse_json(deep) == json.loads(deep)
    assert foreign.parse_json(f"[{'[],' * 5000}[]]") == [[]] * 5001
    assert foreign.parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}  # a byte order mark
    assert foreign.parse_json('{"a": 1, "a": 2}') == {"a": 2}


@pytest.mark.parametrize("text", [b"\xff\xfe{", b'"\xff"', "1" * 5000, "", "{'a': 1}", "nul"])
def test_text_that_is_not_json_is_a_value_error_of_one_line(text):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        foreign.parse_json(text)
    assert "\n" not in str(error.value)


def test_an_object_is_read_from_a_regular_file_of_limited_size(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert foreign.read_object(path) == {"a": 1}
    monkeypatch.setattr(foreign, "DOCUMENT_BYTES", 7)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: over 7 bytes; expected"):
        foreign.read_object(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: not a regular"):
        foreign.read_object(path)


def test_half_of_a_surrogate_pair_can_be_written(tmp_path):
    files.write_atomically(tmp_path / "a.json", '"é\ud800"')
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == r'"é\ud800"'
    assert files.read_json(tmp_path / "a.json") == "é\ud800"


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "a.json"
    for text in (b"\xff", b"[" * 10**5, b"{"):
        path.write_bytes(text + b"\n")
        with pytest.raises(files.RecordError, match=r"a\.json is damaged"):
            files.read_json(path)
        with pytest.raises(files.RecordError, match=r"line 1 of .*a\.json is not valid JSON"):
            files.read_json_lines(path, "Fix it.")
