"""Compares chats with those that transformers renders."""


def assert_same_chat(ours, theirs, turns, arguments):
    """Compares a chat of several turns, with and without a generation prompt.

    Args:
      ours, theirs: the `PretrainedTokenizer`, and the tokenizer of transformers.
      turns: the system message, if any, and the first message of the user.
      arguments: variables of the chat template.
    """
    turns = [
        *turns,
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is 46. "},
        {"role": "user", "content": "Sure?"},
    ]
    for generation in (True, False):
        text = theirs.apply_chat_template(
            turns, add_generation_prompt=generation, tokenize=False, **arguments
        )
        rendered = ours.chat_template.render(turns, arguments, generation_prompt=generation)
        assert rendered == text
        assert ours.encode(rendered) == theirs(text, add_special_tokens=False).input_ids
