"""Chat templates with tools in the manner of three families, and chats that use them."""

from __future__ import annotations

from typing import Any

# Tools in the system turn, calls in markup, answers in a user turn: as Qwen 2.5's and Hermes'.
QWEN = r"""{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You help.' }}{%- endif %}
{{- "\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
{{- '\n<tool_call>\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}{{- call.arguments | tojson }}
{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Tools in the first question, one call a turn without markup, answers as JSON texts: as Llama 3.1's.
LLAMA31 = r"""{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one tool call at once') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if tools and message.role == 'user' and loop.index0 <= 1 %}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}{%- endif %}
{{- message.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# No header before answers, and a call that begins with a marker: as Mistral's.
MISTRAL3 = r"""{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.first %}{{- '[TOOLS] [' }}{%- for tool in tools %}{{- tool | tojson }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '][/TOOLS]' }}{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{- '[RESULTS] {"content": ' }}{{- message.content | tojson }}{{- '}[/RESULTS]' }}
{%- elif message.tool_calls %}{{- '[CALLS] [' }}{%- for call in message.tool_calls %}
{{- call.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']' + eos_token }}
{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"""

TEMPLATES = {"chatml": QWEN, "llama3": LLAMA31, "mistral": MISTRAL3}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}


def tool(name: str, description: str = "Tells the weather.") -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool_chat(
    city: str = "Köln", answer: str = "It rains.", *, calls: int = 1, content: str = ""
) -> list[dict[str, Any]]:
    """Two questions; the first is answered by so many calls and then in words."""
    called = [call("weather", city=city, days=number) for number in range(calls)]
    return [
        {"role": "user", "content": "Rain in Köln?"},
        {"role": "assistant", "content": content, "tool_calls": called},
        *({"role": "tool", "content": f"rain {number} mm"} for number in range(calls)),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And snow?"},
        {"role": "assistant", "content": "No."},
    ]
