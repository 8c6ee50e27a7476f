"""The chat template of models that are fine-tuned without one of their own: Stanford Alpaca's prompts, for chats too.

One template writes rows of instructions and rows of messages, and it is saved with the model. So `entrenar chat`,
transformers and llama.cpp later ask the model in the very text that it was trained on.

Source of the prompts: Taori et al. 2023, "Stanford Alpaca".
"""

from entrenar.data.sft.settings import PromptFormat
from entrenar.data.tokenizer.tokenizer import Tokenizer

_BEGIN_ANSWER, _END_ANSWER = "{% generation %}", "{% endgeneration %}"
# A system message replaces the first paragraph. "input" is the role of an instruction row's input.
_TEMPLATE = r"""
{%- if messages[0]['role'] == 'system' -%}
    {{- messages[0]['content'] + '\n\n' -}}
{%- else -%}
    {%- set given = messages | selectattr('role', 'equalto', 'input') | list -%}
    {{- 'Below is an instruction that describes a task' -}}
    {{- ', paired with an input that provides further context' if given else '' -}}
    {{- '. Write a response that appropriately completes the request.\n\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '### Response:\n' -}}
        BEGIN{{- message['content']EOS -}}END
        {{- '' if loop.last else '\n\n' -}}
    {%- elif message['role'] != 'system' -%}
        {%- set headings = {'user': 'Instruction', 'input': 'Input', 'tool': 'Tool'} -%}
        {{- '### ' + headings[message['role']] + ':\n' + message['content'] + '\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{{- '### Response:\n' if add_generation_prompt else '' -}}
"""


def alpaca_template(tokenizer: Tokenizer, *, marks_answers: bool = False) -> str:
    """Return the template for a tokenizer, with its bos and eos; it can mark the answers for training."""
    begin, end = (_BEGIN_ANSWER, _END_ANSWER) if marks_answers else ("", "")
    lines = "".join(line.strip() for line in _TEMPLATE.splitlines())
    filled = lines.replace("BEGIN", begin).replace("END", end)
    filled = filled.replace("EOS", "" if tokenizer.eos_id is None else " + eos_token")
    return ("" if tokenizer.bos_id is None or not tokenizer.add_bos else "{{- bos_token -}}") + filled


def tokenizer_to_train(tokenizer: Tokenizer, prompt_format: PromptFormat) -> Tokenizer:
    """Return the tokenizer with the chat template that fine-tuning will use and save with the model."""
    if prompt_format != "alpaca" and (prompt_format != "auto" or tokenizer.chat_templates):
        return tokenizer
    return _with_template(tokenizer, alpaca_template(tokenizer))


def marking_answers(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with a template that marks the answers, if its template is this one."""
    if tokenizer.chat_template != alpaca_template(tokenizer):
        return tokenizer
    return _with_template(tokenizer, alpaca_template(tokenizer, marks_answers=True))


def has_inputs(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer has this chat template, the one with the role "input"."""
    return tokenizer.chat_template in {alpaca_template(tokenizer, marks_answers=marks) for marks in (False, True)}


def _with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(dict(tokenizer.content), {**tokenizer.config, "chat_template": template})
