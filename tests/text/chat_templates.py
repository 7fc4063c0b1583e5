"""Templates written as those of well-known model families behave, in this project's own words.

What they insist on is what matters here: roles in turn, no system message, ids of a certain length,
a place for tools in one role only.
"""

from __future__ import annotations

_TURNS = """{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns: user, assistant, user') }}
    {%- endif %}
    {{- TEXT }}
{%- endfor %}
"""

SMOLLM2 = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a small model.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

GEMMA_2 = (
    """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}
"""
    + _TURNS.replace("TEXT", "message.role + ':' + message.content | trim + '<end>'")
    + "{%- if add_generation_prompt %}{{- 'model:' }}{%- endif %}"
)

MISTRAL_7B = """{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant') }}
    {%- endif %}
{%- endfor %}
"""

LLAMA_2 = """{%- set ns = namespace(system='', turns=messages) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}
    {%- set ns.turns = messages[1:] %}
{%- endif %}
{%- for message in ns.turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '<s>[INST] ' + (ns.system if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' </s>' }}
    {%- endif %}
{%- endfor %}
"""

DROPS_SYSTEM = """{%- for message in messages if message.role != 'system' %}
    {{- '<|' + message.role + '|>' + message.content }}
{%- endfor %}
"""

ONLY_PARTS = """{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}
{%- endfor %}
"""

PHI_4_MINI = """{%- for message in messages %}
    {%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
        {{- '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
"""
"""Mentions tools, but reads them from a field that no dialect has."""

DEEPSEEK_R1 = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message['tool_calls'] %}
        {%- for call in message['tool_calls'] %}
            {{- '<call>' + call['function']['name'] + call['function']['arguments'] }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + (message['content'] or '') }}
    {%- endif %}
{%- endfor %}
"""
"""Renders calls, but lists no tools."""

RAISES_ON_TOOLS = (
    "{%- if tools %}{{- raise_exception('this model has no tools') }}{%- endif %}" + SMOLLM2
)

COUNTS_TOOLS = "{{- (tools | length) if tools else 0 }} tools. " + SMOLLM2
"""Says that there are tools, but not which."""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- 'Answer with <tool_call>\\n{"name": …}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}{{- '<tool_call>' + call | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""

MISTRAL_TOOLS = """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}{{- tool.function | tojson }}{%- endfor %}
            {{- '][/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'system' %}
        {{- raise_exception('only user, assistant and tool') }}
    {%- elif message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('an id has 9') }}{%- endif %}
            {{- '[TOOL_CALLS] [' + call.function | tojson + ']' }}
        {%- endfor %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
"""
"""Shows tools beside the last of the user's messages; takes no system message."""

SYSTEM_HAS_TOOLS = """{%- for message in messages %}
    {{- '<|' + message.role + '|>' + message.content }}
    {%- if message.role == 'system' and tools %}
        {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {%- endif %}
{%- endfor %}
"""
"""Shows tools only within a system message."""

SYSTEM_OR_TOOLS = """{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}
{%- elif tools %}
    {{- tools | tojson }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}{{- message.content }}{%- endfor %}
"""
"""Forgets the tools where there is a system message."""

ONLY_LONG_CHATS = """{%- if messages | length < 9 %}{{- raise_exception('too short') }}{%- endif %}
{%- for tool in tools or [] %}{{- tool.function.name }}{%- endfor %}
{%- for message in messages %}{{- message.content }}{%- endfor %}
"""
"""Refuses every conversation that is only tried."""

WITHOUT_PLACE = {
    "SmolLM2": SMOLLM2,
    "Gemma 2": GEMMA_2,
    "Mistral 7B": MISTRAL_7B,
    "Llama 2": LLAMA_2,
    "drops system": DROPS_SYSTEM,
    "only parts": ONLY_PARTS,
    "Phi-4-mini": PHI_4_MINI,
    "DeepSeek R1": DEEPSEEK_R1,
    "raises on tools": RAISES_ON_TOOLS,
    "counts tools": COUNTS_TOOLS,
    "system or tools": SYSTEM_OR_TOOLS,
}

WITH_PLACE = {
    "Qwen": QWEN,
    "Mistral with tools": MISTRAL_TOOLS,
    "system has tools": SYSTEM_HAS_TOOLS,
    "only long chats": ONLY_LONG_CHATS,
}
