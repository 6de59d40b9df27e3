"""The tokenizers and chat templates of released models give the ids and texts of transformers."""

import subprocess

import numpy as np
import pytest
import real_tokenizers
from chats import assert_same_chat

from opsd_jax.data.chat import Chat
from opsd_jax.data.tokenizer import PretrainedTokenizer

pytestmark = pytest.mark.slow  # needs npm, the network and the extra `parity`
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

# Token that ends a turn, from the cards of the models.
END = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gemma3": "<end_of_turn>",
    "gptoss": "<|return|>",
}
TEXTS = (
    "",
    " ",
    "What is 12 + 3456789?\n\nPut it within \\boxed{}.  ",
    "\t\n \r\n  indented\n\n\n\ttabs ",
    "def f(x):\n    return x**2  # x\u00b2 \u2211 \u221a2 \u2264 \u03c0",
    "caf\u00e9 cafe\u0301 \ufb01ne \u0130stanbul \u00df \U0001f469\u200d\U0001f4bb",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "<think>\nHm.\n</think>\n\nIt's, we'll, DON'T; 1,000.50 $x_{1}^{2}$ 0x1F ___ ...",
    "\u200b\ufeff\u00a0\u3000\x00\x7f\ufffd",
)


@pytest.fixture(scope="module", params=real_tokenizers.NAMES)
def directory(request, tmp_path_factory):
    try:
        return real_tokenizers.fetch(request.param, tmp_path_factory.mktemp("npm"))
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"npm cannot fetch the tokenizer: {error}")


@pytest.fixture(scope="module")
def both(directory):
    return PretrainedTokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


def random_texts(number, seed):
    """Returns texts of random characters, most of them letters, digits and spaces."""
    rng = np.random.default_rng(seed)
    blocks = [*[(32, 127)] * 6, (9, 14), (0xA0, 0x250), (0x370, 0x600), (0x2000, 0x2300)]
    blocks += [(0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650)]
    for _ in range(number):
        chosen = rng.integers(len(blocks), size=rng.integers(1, 60))
        yield "".join(chr(rng.integers(*blocks[i])) for i in chosen)


def test_ids_and_texts(both):
    ours, theirs = both
    special = [theirs.eos_token, theirs.bos_token or theirs.eos_token]
    for text in (*TEXTS, *random_texts(500, seed=0), f"a{special[0]} b {special[1]}c"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode_document(text) == theirs(text).input_ids, text
        kept = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == kept, text


def test_special_tokens(both, directory):
    ours, theirs = both
    assert ours.eos_ids == (theirs.convert_tokens_to_ids(END[directory.name]),)
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token is None else theirs.pad_token_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("thinking", ["", "on", "off"])
def test_prompts(both, directory, thinking, system):
    ours, theirs = both
    if ours.chat_template is None:
        assert directory.name == "gptoss"  # its package has no template
        pytest.skip("the package has no chat template")
    if thinking and directory.name != "qwen3":
        pytest.skip("the template has no switch for thinking")
    options = {"date_string": "26 Jul 2024"} if directory.name == "llama3_1" else {}
    chat = Chat(ours, ours.chat_template, system=system, thinking=thinking, options=options)
    arguments = options | ({"enable_thinking": thinking == "on"} if thinking else {})
    turns = [{"role": "system", "content": system}] if system else []
    for text in TEXTS[2:]:
        asked = [*turns, {"role": "user", "content": text}]
        expected = theirs.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False, **arguments
        )
        assert chat.prompt(text) == expected
    assert_same_chat(ours, theirs, asked, arguments)
