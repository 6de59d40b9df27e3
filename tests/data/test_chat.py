"""Tokenizers of model directories and chat templates give the token ids of transformers."""

import datetime
import json
from unittest import mock

import pytest
import tiny_tokenizer
import tokenizers
from chats import assert_same_chat

from opsd_jax.data.chat import Chat, ChatTemplate, cut_to_fit
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.options import ConfigError
from opsd_jax.verify import extract

FAMILIES = tuple(tiny_tokenizer.TEMPLATES)
QUESTION = "  What is {x} <think> in 12 + 34?\nPut it within \\boxed{}. é ∑ 中\n"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: tiny_tokenizer.write(root / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def directory(request, directories):
    return directories[request.param]


OPTIONS = {"date_string": "26 Jul 2024"}


@pytest.mark.slow  # needs the extra `parity`
@pytest.mark.parametrize("thinking", ["", "on", "off"])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_prompts_equal_those_of_transformers(directory, thinking, system):
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = PretrainedTokenizer(directory)
    switched = directory.name == "qwen3"
    options = {} if directory.name != "llama3" else OPTIONS
    chat = Chat(
        ours,
        ours.chat_template,
        system=system,
        thinking=thinking if switched else "",
        options=options,
    )
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": QUESTION}]
    arguments = dict(options)
    if switched and thinking:
        arguments["enable_thinking"] = thinking == "on"
    expected = theirs.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False, **arguments
    )
    assert chat.prompt(QUESTION) == list(expected)
    assert_same_chat(ours, theirs, turns, arguments)
    # Text without a template begins with the same special tokens.
    assert ours.encode_document(QUESTION) == theirs(QUESTION).input_ids
    ids = theirs(QUESTION).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_a_prompt_with_todays_date_equals_that_of_transformers(directories):
    transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")
    theirs = transformers.AutoTokenizer.from_pretrained(directories["llama3"])
    ours = PretrainedTokenizer(directories["llama3"])
    turns = [{"role": "user", "content": "?"}]
    for _ in range(2):  # in case midnight passes between the two
        chat = Chat(ours, ours.chat_template, date=datetime.date.today().isoformat())
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        if chat.prompt("?") == expected:
            break
    else:
        pytest.fail("the prompts differ")


def test_a_template_that_asks_for_the_date_needs_one(directories):
    """Otherwise a run that is resumed tomorrow would have different prompts."""
    tokenizer = PretrainedTokenizer(directories["llama3"])
    with pytest.raises(
        ValueError,
        match=r"the template asks for today's date, .*--config.data.date=2026-01-31, or pass --d",
    ):
        Chat(tokenizer, tokenizer.chat_template)
    pinned = Chat(tokenizer, tokenizer.chat_template, date="2024-07-26").prompt("?")
    named = Chat(tokenizer, tokenizer.chat_template, options=OPTIONS).prompt("?")
    assert pinned == named


def test_special_tokens_have_their_ids(directory):
    tokenizer = PretrainedTokenizer(directory)
    end = tokenizer.encode(tiny_tokenizer.END[directory.name])
    assert len(end) == 1
    assert tuple(end) == tokenizer.eos_ids
    assert [tokenizer.pad_id] == tokenizer.encode("<|endoftext|>")
    (think,) = tokenizer.encode("</think>")
    assert tokenizer.decode([think, *end]) == "</think>"  # verifiers need it
    assert tokenizer.vocab_size == 1 + think  # the tag was added last
    assert tokenizer.decode([500, 10**6]) == ""  # a model's vocabulary may be larger


def test_generation_config_adds_eos_ids(directories, tmp_path):
    tiny_tokenizer.write(tmp_path, "qwen3")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert PretrainedTokenizer(tmp_path).eos_ids == (3, 1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert PretrainedTokenizer(tmp_path).eos_ids == (3, 1)


def test_a_chat_template_is_found_wherever_it_is_stored(tmp_path):
    tiny_tokenizer.write(tmp_path, "qwen3")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = PretrainedTokenizer(tmp_path)
    assert tokenizer.chat_template.render([{"role": "user", "content": "Hm"}]) == "Hm!"
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "yes"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert PretrainedTokenizer(tmp_path).chat_template.render([]) == "yes"


@pytest.mark.parametrize("thinking", ["", "off"])
def test_a_next_turn_leaves_the_response_as_it_was_sampled(directory, thinking):
    """This holds even if the template removes thinking or strips whitespace."""
    tokenizer = PretrainedTokenizer(directory)
    switched = directory.name == "qwen3"
    thinking = thinking if switched else ""
    chat = Chat(tokenizer, tokenizer.chat_template, thinking=thinking, options=OPTIONS)
    response = tokenizer.encode(" <think>\nHm.</think>It is 46. ")
    dialogue = [*chat.prompt("What?"), *response, *chat.next_turn("A memo, please.")]
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = raw.decode(dialogue, skip_special_tokens=False)
    begun = chat.begun()
    assert "What?" in text
    assert f" <think>\nHm.</think>It is 46. {tiny_tokenizer.END[directory.name]}" in text
    asked = text[text.index("It is 46") :]
    assert "A memo, please." in asked
    generation = tokenizer.chat_template.render(
        [{"role": "user", "content": "?"}], {"enable_thinking": not thinking} | OPTIONS
    ).rpartition("?")[2]
    assert asked.endswith(generation)
    assert begun == ("<think>\n" if directory.name == "r1" else "")


def test_a_system_message_about_thinking_does_not_begin_it(directories):
    for family, begun in {"qwen3": "", "r1": "<think>\n"}.items():
        tokenizer = PretrainedTokenizer(directories[family])
        chat = Chat(tokenizer, tokenizer.chat_template, system="Use <think>.")
        assert chat.begun() == begun


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        (
            "r1",
            {"thinking": "off"},
            "data.thinking is 'off'; expected '', because the chat template",
        ),
        (
            "qwen2",
            {"thinking": "on"},
            "data.thinking is 'on'; expected '', because the chat template",
        ),
        (None, {"system": "Hm"}, "data.system is 'Hm'; expected no value, because the prompts are"),
        (None, {"thinking": "on"}, "data.thinking is 'on'; expected no value, because the prompts"),
    ],
)
def test_an_option_without_effect_is_an_error(directories, family, arguments, message):
    tokenizer = PretrainedTokenizer(directories["qwen3"])
    template = family and ChatTemplate(tiny_tokenizer.TEMPLATES[family], tokenizer.special_tokens)
    with pytest.raises(ValueError, match=message):
        Chat(tokenizer, template, **arguments)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(ValueError, match="the chat template raised an exception: "):
        ChatTemplate(source, {}).render([{"role": "user", "content": "?"}])


def test_an_invalid_template_is_an_error():
    with pytest.raises(ValueError, match="the chat template cannot be parsed: "):
        ChatTemplate("{% if %}", {})
    with pytest.raises(ValueError, match="raised an exception: TemplateError: not like this"):
        ChatTemplate("{{ raise_exception('not like this') }}", {}).render([])


def test_thinking_tags_are_text_even_if_they_are_special_tokens(tmp_path):
    """Otherwise no response would have an answer, because no thinking would ever end."""
    tiny_tokenizer.write(tmp_path, "qwen3")
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    there = {token["content"] for token in saved["added_tokens"]}
    assert {"<think>", "</think>", "<|im_end|>"} <= there
    for token in saved["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(saved))
    tokenizer = PretrainedTokenizer(tmp_path)
    response = "two and two.</think>\n\n\\boxed{4}"
    text = tokenizer.decode([*tokenizer.encode(f"{response}<|im_end|>"), 10**9])
    assert text == response
    assert extract.extract(text, ("boxed",)) == "4"
    unfinished = tokenizer.decode(tokenizer.encode("<think>\nmaybe \\boxed{4} and on"))
    assert extract.extract(unfinished, ("boxed",)) is None
    assert "<|im_end|>" in tokenizer.control_tokens
    assert "<think>" not in tokenizer.control_tokens


def test_tokenizer_config_adds_tokens(tmp_path):
    """Tokens that `tokenizer.json` lacks are added in the order of their ids."""
    tiny_tokenizer.write(tmp_path, "qwen3")
    last = PretrainedTokenizer(tmp_path).vocab_size
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {
        "added_tokens_decoder": {
            str(last + 1): {"content": "<|b|>", "special": True},
            str(last): {"content": "<a>", "special": False},
            "3": {"content": "<|im_end|>", "special": True},
        },
        "eos_token": "<|b|>",
        "extra_special_tokens": {"image_token": "<a>"},
        "chat_template": "{{ image_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = PretrainedTokenizer(tmp_path)
    assert tokenizer.encode("<a><|b|>") == [last, last + 1]
    assert tokenizer.decode([last, last + 1]) == "<a>"
    assert tokenizer.eos_ids == (last + 1,)
    assert "<|b|>" in tokenizer.control_tokens
    assert tokenizer.chat_template.render([]) == "<a>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "generation_config.json",
            '{"eos_token_id": "x"}',
            r"eos_token_id is \['x'\]; expected an",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool", "template": ""}], "eos_token": "<|im_end|>"}',
            "has the chat templates tool; expected one named 'default'",
        ),
        ("tokenizer.json", None, r"there is no .*tokenizer.json; expected a Hugging Face model's"),
        ("tokenizer.json", "{}", r"tokenizer.json cannot be read: "),
        ("tokenizer_config.json", "{", r"tokenizer_config.json cannot be read: "),
        (
            "tokenizer_config.json",
            "[]",
            r"tokenizer_config.json contains a JSON value of type list; exp",
        ),
        ("tokenizer_config.json", "{}", "defines no end-of-sequence token; expected eos_token in"),
    ],
)
def test_a_directory_that_cannot_be_read_is_an_error(tmp_path, file, content, message):
    tiny_tokenizer.write(tmp_path, "qwen3")
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer(tmp_path)


def test_a_text_is_cut_to_the_longest_part_that_fits():
    render = lambda text: list(f"<{text}>")
    assert cut_to_fit(render, "abcdef", 8) == (list("<abcdef>"), False)
    assert cut_to_fit(render, "abcdef", 7) == (list("<abcde>"), True)
    assert cut_to_fit(render, "abcdef", 2) == (list("<>"), True)
    with pytest.raises(
        ValueError, match="2 tokens even without the privileged context; expected at most 1"
    ):
        cut_to_fit(render, "abcdef", 1)


DOUBLED = (
    "{{% set n = namespace(x='a') %}}"
    "{{% for i in range(60) %}}{{% set n.x = {} %}}{{% endfor %}}{{{{ n.x }}}}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ ['a'] * 10**9 }}",
        "{{ 10 ** 99999 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}" + "{% if x.y %}a{% endif %}" * 3000 + "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        DOUBLED.format("n.x ~ n.x"),
        DOUBLED.format("n.x + n.x"),
        DOUBLED.format("[n.x, n.x]"),
        "{% set x %}{% for i in range(99999) %}{{ 'a' * i }}{% endfor %}{% endset %}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('ab' * 99999) | list | join('x' * 99999) }}",
        "{{ ('a b ' * 2000000) | wordwrap | length }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "{{ " + "[" * 9999 + " }}",
        "{% if x %}" * 300 + "{% endif %}" * 300,
        "{{ 'a' }}" * 99999,
    ],
    ids=lambda source: source[:40],
)
def test_a_template_cannot_take_much_time_or_memory(source):
    with pytest.raises(ConfigError, match="the chat template") as error:
        ChatTemplate(source, {}).render([{"role": "user", "content": "What?"}])
    assert len(str(error.value)) < 2000


def test_the_limits_of_templates_leave_room_for_long_chats():
    source = (
        "{% for m in messages %}{% set content = m.content | trim %}"
        "{{ loop.index0 }}/{{ loop.length }} {{ loop.last }} {{ '%s:' % m.role }} "
        "{{ content.split('</think>')[-1].replace('a', 'bb') + '\n' ~ content | length }}"
        "{% endfor %}{{ messages | map(attribute='role') | unique | list | tojson(indent=2) }}"
    )
    messages = [{"role": "user", "content": " a" * 50_000}] * 20
    text = ChatTemplate(source, {}).render(messages)
    assert text.startswith("0/20 False user: bb bb ")
    assert text.endswith('99999[\n  "user"\n]')


def test_the_message_of_a_template_is_one_line():
    with pytest.raises(ConfigError, match=r"TemplateError: a\\nb\\x1b\[0m$"):
        ChatTemplate("{{ raise_exception('a\nb\x1b[0m') }}", {}).render([])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja cannot be read: 'utf-8' codec"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "cannot be used: AttributeErr"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": 1}}', "cannot be used: ValueE"),
        (
            "tokenizer_config.json",
            b'{"eos_token": "<|im_end|>", "chat_template": 5}',
            "of type int",
        ),
        ("tokenizer_config.json", b"[" * 10**5, "nested over 100 levels deep"),
        (
            "generation_config.json",
            b'{"eos_token_id": -1}',
            r"eos_token_id is \[-1\]; expected an id",
        ),
        ("tokenizer.json", b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "u"}}', "."),
    ],
)
def test_a_damaged_tokenizer_directory_is_a_config_error(tmp_path, file, content, message):
    tiny_tokenizer.write(tmp_path, "qwen3")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        PretrainedTokenizer(tmp_path)


def test_a_panic_of_the_tokenizer_is_a_config_error(tmp_path, monkeypatch):
    """A panic in Rust raises an exception whose class is no Exception."""
    tiny_tokenizer.write(tmp_path, "qwen3")
    panic = type("PanicException", (BaseException,), {})("index out of bounds")
    broken = mock.Mock(**{"from_file.side_effect": panic})
    monkeypatch.setattr("opsd_jax.data.tokenizer.tokenizers.Tokenizer", broken)
    with pytest.raises(ConfigError, match="cannot be used: PanicException: index out of bounds"):
        PretrainedTokenizer(tmp_path)
