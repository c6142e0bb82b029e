"""Chat templates for models that come without one, in the form their families are known for.

They are written here from the published formats and are shorter than the models' own: no tools, no dates, no default
system message. All but chatml refuse rows with tool turns: the families write those in forms of their own, and a result
written as if the user or the model had said it would teach the wrong thing.

| name    | ends answers with | format                                                                     |
|---------|-------------------|----------------------------------------------------------------------------|
| chatml  | <|im_end|>        | OpenAI's ChatML; Qwen, SmolLM                                              |
| llama3  | <|eot_id|>        | Llama 3                                                                    |
| mistral | end of text       | [INST] ... [/INST]; the system message is put before the first user turn  |
| gemma   | <end_of_turn>     | Gemma 1 to 3; the system message is put before the first user turn         |
| alpaca  | end of text       | Stanford Alpaca's "### Instruction:"                                       |
| plain   | end of text       | prompt, line end, answer: for base models                                  |
"""

_ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_NO_TOOLS = (
    "{% for m in messages if m.role == 'tool' %}{{ raise_exception('it has no form for tool turns; use the "
    "model\\'s own template, or that of a model with tools, as a .jinja file') }}{% endfor %}"
)
NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        _NO_TOOLS
        + "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim"
        " + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        _NO_TOOLS + "{% set n = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set n.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + n.system + m.content|trim + ' [/INST]' }}{% set n.system = '' %}"
        "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        _NO_TOOLS + "{% set n = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set n.system = m.content|trim + '\n\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + n.system"
        " + m.content|trim + '<end_of_turn>\n' }}{% set n.system = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "alpaca": (
        _NO_TOOLS + "{% if messages[0].role != 'system' %}{{ '" + _ALPACA_OPENING + "\n\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "plain": (
        _NO_TOOLS
        + "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    ),
}
