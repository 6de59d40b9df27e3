"""Demonstrations of SFT: the thinking tags of the prompt and of the solution."""

import pytest
import tiny_tokenizer

from opsd_jax.data.options import DataOptions
from opsd_jax.data.text import Prompts
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.problem import DataError, Problem


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Returns a function of a model family and a thinking mode."""

    def make(family, thinking=""):
        directory = tmp_path_factory.mktemp(family)
        tiny_tokenizer.write(directory, family)
        tokenizer = PretrainedTokenizer(directory)
        return Prompts(DataOptions(thinking=thinking, tokenizer=str(directory)), tokenizer)

    return make


def shown(prompts, solution):
    """Returns the prompt and the response of a demonstration as text."""
    row = prompts.demonstration(Problem("p/1", "What is 2 + 2?", solution, "4"))
    return [prompts.tokenizer.decode(ids) for ids in (row.prompt, row.response)]


@pytest.mark.parametrize("before", ["<think>\n", "<think>", "\n<think>\n\n", ""])
def test_a_tag_that_the_template_opens_occurs_once(prompts, before):
    prompt, response = shown(prompts("r1"), f"{before}add\n</think>\n\n\\boxed{{4}}")
    assert prompt.endswith("<think>\n")
    assert response == "add\n</think>\n\n\\boxed{4}"


def test_a_solution_keeps_its_tags_if_the_template_opens_none(prompts):
    solution = "<think>\nadd\n</think>\n\n\\boxed{4}"
    prompt, response = shown(prompts("qwen3"), solution)
    assert "<think>" not in prompt
    assert response == solution


def test_a_thought_that_never_ends_is_refused(prompts):
    with pytest.raises(DataError, match=r"problem p/1 with <think>, but its solution has no </th"):
        shown(prompts("r1"), "<think> add, no end")


def test_a_solution_that_thinks_is_refused_with_thinking_off(prompts):
    off = prompts("qwen3", "off")
    assert shown(off, r"add: \boxed{4}")[1] == r"add: \boxed{4}"
    with pytest.raises(DataError, match=r"p/1 ends with an empty thought, but its solution has a"):
        shown(off, "<think>\nadd\n</think>\n\n\\boxed{4}")
