"""Trains a small BPE tokenizer and pairs it with a short chat template of each model family."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# Each template imitates its family's in a few lines: the headers of the turns, the generation
# prompt, and the treatment of thinking.
TEMPLATES = {
    # Thinking by default; `enable_thinking=False` writes an empty thought. The thinking of earlier
    # turns is removed.
    "qwen3": """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and not loop.last and "</think>" in content %}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}
""",
    # A system message by default; no thinking.
    "qwen2": """\
{%- if messages[0]["role"] != "system" %}
    {{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" ~ message["role"] ~ "\\n" ~ message["content"] ~ "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
""",
    # The generation prompt opens the thinking. The thinking of earlier turns is removed.
    "r1": """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system="") -%}
{%- for message in messages if message["role"] == "system" %}
    {%- set ns.system = message["content"] %}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}{{ "<|User|>" + message["content"] }}
    {%- elif message["role"] == "assistant" %}
        {%- set content = message["content"] %}
        {%- if "</think>" in content %}{% set content = content.split("</think>")[-1] %}{% endif %}
        {%- generation %}{{ "<|Assistant|>" + content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ "<|Assistant|><think>\\n" }}{% endif %}""",
    # Headers, trimmed content, a token that begins the text, a date.
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}
        {{- raise_exception("no such role: " + message | tojson) }}
    {%- endif %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
    {{- message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
""",
}
END = {"qwen3": "<|im_end|>", "qwen2": "<|im_end|>", "r1": "<|endoftext|>", "llama3": "<|eot_id|>"}
SPECIAL = [
    *("<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
TEXT = [
    "What is 12 + 34? Please reason step by step, and put your final answer within \\boxed{}.",
    "Let x be a real number. Then x^2 = 9, so x = 3 or x = -3. Wait, check this again.",
    "Here is a reference solution: The answer is \\boxed{46}. However, perhaps it is 47. Hmm.",
]


def write(directory, family, texts=TEXT, vocab_size=400):
    """Writes a tokenizer's directory as transformers saves it, and returns the directory."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # These are single tokens but not special ones, so decoding a response keeps them.
    tokenizer.add_tokens(["<think>", "</think>"])
    if family == "llama3":  # encoding with special tokens adds the one that begins the text
        begin = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"content": END[family], "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATES[family],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
