"""Damaged and hostile files: each ends in an error of the package, in seconds, without much memory.

Every case mutates a valid file with a seeded generator. FUZZ_CASES=2000 makes a longer search.
"""

import contextlib
import copy
import gzip
import json
import os
import random
import resource
import signal
import struct
import time

import hf_files
import pytest
import tiny_tokenizer

from opsd_jax import config as config_lib
from opsd_jax.data import sources
from opsd_jax.data.chat import Chat, ChatTemplate
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.models import architecture, pretrained, safetensors
from opsd_jax.models.safetensors import WeightsError
from opsd_jax.options import ConfigError
from opsd_jax.problem import DataError

CASES = int(os.environ.get("FUZZ_CASES", 120))
SECONDS, BYTES = 5, 2**30  # limits on the time of a case, and on the growth of the process
EXPECTED = (ConfigError, DataError, WeightsError)

# Values that take the place of others. Each once ended in a traceback, a hang or a wrong model.
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**7, 10**400, -(10**400), 0.5, 1e308, -0.0,
    float("nan"), float("inf"), "", "1", "a\nb\x1b[31m", "\ud800", "x" * 10**5, [], {}, [[]], [{}],
    {"a": {"b": []}}, ["a", 1, None], [1] * 10**4, json.loads("[" * 90 + "]" * 90), "../../etc",
]  # fmt: skip


def change(rng, value):
    """Returns a JSON value with one part replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    part, path = value, []
    while isinstance(part, dict | list) and part and (not path or rng.random() < 0.8):
        path.append(
            (part, rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part)))
        )
        part = path[-1][0][path[-1][1]]
    if not path:
        return rng.choice(VALUES)
    parent, key = path[-1]
    kind = rng.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "a\nb", "\ud800", "x" * 10**4, *parent])] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent += [parent[key]] * rng.choice([1, 1000])
    else:
        parent[key] = rng.choice(VALUES)
    return value


def damage(rng, content):
    """Returns bytes with a bit flipped, a part removed or repeated, or in another encoding."""
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(8)
    if kind == 0:
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 10])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    text = content.decode(errors="replace")
    return [
        lambda: content[:at],
        lambda: content[:at] + content[end:],
        lambda: content[:end] + content[at:],
        lambda: content[:at] + rng.choice([b"[", b'{"a":', b"("]) * 10**5 + content[at:],
        lambda: (
            content[:at]
            + rng.choice([b"9" * 5000, b"\x00", b"\xff", b"\xed\xa0\x80", b"NaN"])
            + content[at:]
        ),
        lambda: text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
        lambda: b"",
    ][kind - 1]()


def mutated(rng, value):
    """Returns the text of a JSON value with one to three mutations, as bytes."""
    for _ in range(rng.choice([1, 1, 1, 3])):
        value = change(rng, value)
    content = json.dumps(value).encode()
    return damage(rng, content) if rng.random() < 0.4 else content


@contextlib.contextmanager
def limited(case):
    """Fails if the block raises an error that is not the package's own, or takes too long."""

    def stop(number, frame):
        raise TimeoutError(f"over {SECONDS} s: {case!r:.300}")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except EXPECTED as error:
        text = str(error)
        lines = text.splitlines()
        assert text.isprintable() or all(line.isprintable() for line in lines), repr(text)[:500]
        # Lists of rows and tensors have lines of their own.
        assert len(lines) == 1 or all(line.startswith("  ") for line in lines[1:-1]), repr(text)[
            :500
        ]
        assert len(text) < 50_000
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} in {case!r:.500}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def memory():
    """Fails if the peak memory of the process grows by more than BYTES."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    yield
    assert peak() - before < BYTES


def cases(name):
    """Yields seeded random generators."""
    return [random.Random(f"{name} {i}") for i in range(CASES)]


ROPES = [
    {},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    {
        "layer_types": ["full_attention"] * 3, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 3, "max_position_embeddings": 64,
    },
]  # fmt: skip


def test_config_json(tmp_path):
    path = tmp_path / "config.json"
    for rng in cases("config"):
        path.write_bytes(case := mutated(rng, hf_files.CONFIG | rng.choice(ROPES)))
        with limited(case):
            architecture.from_json(path)


@pytest.mark.parametrize("field", [*hf_files.CONFIG, *(key for rope in ROPES for key in rope)])
def test_each_field_of_config_json(tmp_path, field):
    path = tmp_path / "config.json"
    base = hf_files.CONFIG | {key: value for rope in ROPES for key, value in rope.items()}
    for value in VALUES:
        path.write_text(json.dumps(base | {field: value}))
        with limited(value):
            architecture.from_json(path)


def test_safetensors_headers_and_indices(tmp_path):
    tensors = hf_files.tensors_of(hf_files.CONFIG)
    directory = hf_files.write(tmp_path / "model", tensors, hf_files.CONFIG, files=2)
    index = directory / safetensors.INDEX
    path = directory / "model-00001-of-00002.safetensors"
    whole, listed = path.read_bytes(), index.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for rng in cases("safetensors"):
        path.write_bytes(whole)
        index.write_bytes(listed)
        kind = rng.randrange(4)
        if kind == 0:
            index.write_bytes(case := mutated(rng, json.loads(listed)))
        elif kind == 1:
            path.write_bytes(case := damage(rng, whole))
        else:
            text = case = mutated(rng, header)
            size = rng.choice([len(text)] * 8 + [0, 2**63, 2**40, len(text) - 1])
            path.write_bytes(struct.pack("<Q", size) + text + data)
        with limited(case):
            pretrained.check_tensors(safetensors.tensors_of(directory), {}, directory)


def test_json_lines(tmp_path):
    row = {"id": "a", "problem": "What?", "answer": "1", "solution": "So 1.", "extra": {"a": [1]}}
    for rng in cases("rows"):
        lines = [
            mutated(rng, row) if rng.random() < 0.3 else json.dumps(row | {"id": i}).encode()
            for i in range(9)
        ]
        content = case = b"\n".join(lines)
        path = tmp_path / rng.choice(["a.jsonl", "a.jsonl.gz"])
        if path.suffix == ".gz":
            content = gzip.compress(content)
            content = damage(rng, content) if rng.random() < 0.3 else content
        path.write_bytes(content)
        source = config_lib.source(str(path), bad_rows=rng.choice(["refuse", "drop"]))
        with limited(case):
            sources.problems("maths", source, "data.train.maths", lambda found: [""] * len(found))


def test_tokenizers(tmp_path):
    tiny_tokenizer.write(tmp_path, "qwen3")
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
    )
    whole = {
        name: (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        for name in names
    }
    whole["special_tokens_map.json"] = b'{"pad_token": {"content": "<|im_end|>", "lstrip": false}}'
    for rng in cases("tokenizer"):
        name = rng.choice(names)
        for other in names:
            (tmp_path / other).write_bytes(whole[other])
        (tmp_path / name).write_bytes(case := mutated(rng, json.loads(whole[name])))
        with limited((name, case)):
            tokenizer = PretrainedTokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("What is 1 + 1? é 漢"))
            Chat(tokenizer, tokenizer.chat_template).prompt("What?")


def test_chat_templates():
    words = (
        "{{ }} {% %} for endfor in range(99999) * 99999999999 ~ ( ) [ messages .content | set x = "
    )
    words = [*f"{words}center( if endif macro 'a' -%}} {{#".split()]
    for rng in cases("template"):
        source = tiny_tokenizer.TEMPLATES[rng.choice(list(tiny_tokenizer.TEMPLATES))]
        if rng.random() < 0.5:
            parts = source.split(" ")
            for _ in range(rng.choice([1, 3, 10])):
                parts[rng.randrange(len(parts))] = rng.choice(words)
            source = " ".join(parts)
        else:
            source = damage(rng, source.encode()).decode(errors="surrogateescape")
        with limited(source):
            special = {"bos_token": "<s>", "eos_token": "</s>"}
            ChatTemplate(source, special).render([{"role": "user", "content": "What?"}])


def test_the_limits_catch_a_hang_and_a_traceback():
    """Checks the test itself."""

    def run(wrong):
        with limited("case"):
            wrong()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SECONDS", 1)
        for wrong in (lambda: time.sleep(2), lambda: [][0]):
            with pytest.raises(AssertionError, match="Error"):
                run(wrong)
