"""Chat templates for models that come without one, in the form their families are known for.

They are written here from the published formats and are shorter than the models' own: no dates, no default system
message. chatml-tools writes tool definitions, calls and results; of the others, all but chatml refuse rows with tool
turns: the families write those in forms of their own, and a result written as if the user or the model had said it
would teach the wrong thing. Llama 3.1's and Mistral's forms of calls are not here: Llama's takes one call per turn and
Mistral's wants call ids that most rows lack, and the models that know them bring a template that writes them.

| name         | ends answers with | format                                                                     |
|--------------|-------------------|----------------------------------------------------------------------------|
| chatml       | <|im_end|>        | OpenAI's ChatML; Qwen, SmolLM                                              |
| chatml-tools | <|im_end|>        | ChatML with <tool_call> and <tool_response>; Hermes 2 Pro, Qwen 2.5 and 3  |
| llama3       | <|eot_id|>        | Llama 3                                                                    |
| mistral      | end of text       | [INST] ... [/INST]; the system message is put before the first user turn  |
| gemma        | <end_of_turn>     | Gemma 1 to 3; the system message is put before the first user turn         |
| alpaca       | end of text       | Stanford Alpaca's "### Instruction:"                                       |
| plain        | end of text       | prompt, line end, answer: for base models                                  |
| joined       | end of text       | prompt and answer as they are, nothing between: for base models            |

joined is what trl makes of prompt and completion as text. plain does not look at the answer to leave its line end out
where that begins with a space: a prompt for an answer to come would be written otherwise than in training.
Where a tokenizer has no <|im_end|>, chatml-tools ends turns with its own end token (``template.choose_template``), so
that rows with tools can be trained on with any tokenizer.

source: the chat templates of Qwen2.5-7B-Instruct and Qwen3-8B for the words of chatml-tools.
"""

IM_END = "<|im_end|>"
CHATML_TOOLS = "chatml-tools"

_ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_NO_TOOLS = (
    "{% for m in messages if m.role == 'tool' %}{{ raise_exception('it has no form for tool turns') }}{% endfor %}"
)
NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    CHATML_TOOLS: (
        "{% if tools %}{{ '<|im_start|>system\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>' }}"
        "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
        "{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% elif m.role != 'system' or not tools %}"
        "{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for call in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n{\"name\": ' }}{{ call.function.name | tojson }}{{ ', \"arguments\": ' }}"
        "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
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
    "joined": (
        _NO_TOOLS + "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% elif m.role == 'system' %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
}
