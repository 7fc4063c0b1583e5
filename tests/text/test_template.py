"""Chat templates, against transformers' rendering of the same template and messages."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sapwood.base.errors import ConfigError, InvalidRequest, UnsupportedFeature
from sapwood.text.absent import AbsentTokenizer
from sapwood.text.template import ChatTemplate, built_in_names, template_source
from sapwood.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

LLAMA_3 = """{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'ipython' or message.role == 'tool' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name }}
        {{- '", "parameters": ' + (tool_call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}
        {{- content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif not (message.role == 'system' and tools) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

VISION = """{% for message in messages %}<|{{ message.role }}|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{% for part in message['content'] %}
{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<|end|>
{% endfor %}"""

ONLY_PARTS = """{% macro show(content) %}{% for part in content %}[{{ part['text'] }}]{% endfor %}
{% endmacro %}{% for m in messages %}{{ m.role }}:{{ show(m.content) }};{% endfor %}"""

DEEPSEEK_CALLS = """{% for message in messages %}{% if message['role'] == 'assistant' %}
{% for tool in message['tool_calls'] %}
{{ tool['function']['name'] + '```json' + tool['function']['arguments'] + '```' }}
{% endfor %}{% endif %}{% endfor %}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Today's weather in <b>a city</b>: 'Zürich' & \"Genève\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "  What is <b>1 & 1</b>? ünïcode 你好\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Sure?"},
]

CALL = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "\nI should look it up.\n",
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1]}},
            }
        ],
    },
    {"role": "tool", "content": '{"sky": "<blue>"}', "tool_call_id": "call_0"},
]


@pytest.fixture(scope="module")
def transformers_tokenizer(backends) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backends["byte_level"](), bos_token="<|begin|>", eos_token="<|end|>"
    )


def ours(source: str) -> ChatTemplate:
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return ChatTemplate(source, special_tokens=special)


def assert_same(tokenizer: Any, source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options.setdefault("add_generation_prompt", True)
    before = copy.deepcopy(messages)
    rendered = ours(source).render(messages, **options)
    assert messages == before
    assert rendered == tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, **options
    )
    return rendered


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [CHATML, LLAMA_3, QWEN_TOOLS, VISION])
def test_a_chat_renders_as_in_transformers(transformers_tokenizer, source, add_generation_prompt):
    assert_same(transformers_tokenizer, source, CHAT, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("source", [LLAMA_3, QWEN_TOOLS])
def test_tools_and_calls_render_as_in_transformers(transformers_tokenizer, source):
    rendered = assert_same(transformers_tokenizer, source, CALL, tools=TOOLS)
    assert "Today's weather in <b>a city</b>: 'Zürich' & " in rendered
    assert_same(transformers_tokenizer, source, [*CHAT, *CALL], tools=TOOLS)


def test_further_variables_reach_the_template(transformers_tokenizer):
    rendered = assert_same(transformers_tokenizer, QWEN_TOOLS, CHAT, enable_thinking=False)
    assert rendered.endswith("</think>\n\n")


def test_parts_render_as_in_transformers(transformers_tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    assert "<image>" in assert_same(transformers_tokenizer, VISION, messages)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (
            CHATML,
            [{"role": "user", "content": "Go on: "}, {"role": "assistant", "content": "1, 2 "}],
        ),
        (LLAMA_3, [{"role": "user", "content": "x"}, {"role": "assistant", "content": " 1, 2 "}]),
        (
            VISION,
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "text", "text": "so far"}]},
            ],
        ),
    ],
)
def test_the_last_message_is_left_open_as_in_transformers(transformers_tokenizer, source, messages):
    rendered = assert_same(
        transformers_tokenizer,
        source,
        messages,
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert rendered.rstrip().endswith(("1, 2", "so far"))


def test_parts_become_a_string_for_a_template_that_takes_one():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert "user\none two<|im_end|>" in ours(CHATML).render(messages)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(UnsupportedFeature, match="image_url"):
        ours(CHATML).render(image)


def test_a_string_becomes_parts_for_a_template_that_takes_only_these():
    assert ours(ONLY_PARTS).render([{"role": "user", "content": "ab"}]).startswith("user:[ab]")


def test_arguments_sent_as_text_are_parsed_where_the_template_dumps_them():
    as_text = copy.deepcopy(CALL)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city":"Zürich","days":[1]}'
    assert ours(QWEN_TOOLS).render(as_text) == ours(QWEN_TOOLS).render(CALL)
    assert '{"city":"Zürich","days":[1]}```' in ours(DEEPSEEK_CALLS).render(as_text)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": '
    assert '"arguments": {"city": }' in ours(QWEN_TOOLS).render(as_text)


@pytest.mark.parametrize("depth", [101, 2000, 100_000])
def test_arguments_nested_too_deeply_are_refused(depth):
    as_text = copy.deepcopy(CALL)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = "[" * depth + "]" * depth
    with pytest.raises(InvalidRequest, match="nested deeper than 100 levels") as caught:
        ours(QWEN_TOOLS).render(as_text)
    assert caught.value.param == "messages"
    as_text[1]["tool_calls"][0]["function"]["arguments"] = "[" * 100 + "]" * 100
    assert "[" * 100 in ours(QWEN_TOOLS).render(as_text)


def test_a_template_that_calls_itself_too_often_refuses_the_messages():
    """As templates do that write a tool's schema level by level."""
    template = ours(
        "{% macro levels(one) %}({% for part in one %}{{ levels(part) }}{% endfor %})"
        "{% endmacro %}{{ levels(messages[0].content) }}"
    )
    content: list = []
    for _ in range(1000):
        content = [content]
    with pytest.raises(InvalidRequest, match="RecursionError") as caught:
        template.render([{"role": "user", "content": content}])
    assert caught.value.param == "messages"


def test_null_fields_are_left_out():
    messages = [{"role": "user", "content": "x"}, {**CALL[1], "content": None}]
    assert "None" not in ours(QWEN_TOOLS).render(messages)


def test_a_developer_is_the_system_where_the_template_does_not_know_that_role():
    messages = [{"role": "developer", "content": "Be kind."}]
    assert "<|im_start|>system\nBe kind.<|im_end|>" in ours(CHATML).render(messages)
    knows = "{% for m in messages %}{{ m.role if m.role == 'developer' }}{% endfor %}"
    assert ours(knows).render(messages) == "developer"


def test_the_templates_own_error_is_quoted():
    calls = [{**CALL[1], "tool_calls": CALL[1]["tool_calls"] * 2}]
    with pytest.raises(InvalidRequest, match="only supports single tool-calls at once!") as info:
        ours(LLAMA_3).render([CALL[0], *calls])
    assert info.value.param == "messages"
    with pytest.raises(InvalidRequest, match="content"):
        ours(CHATML).render([{"role": "user"}])
    with pytest.raises(InvalidRequest, match="TypeError"):
        ours("{{ 'a' + messages|length }}").render(CHAT)
    with pytest.raises(InvalidRequest, match="unsafe"):
        ours("{{ messages.__class__.__mro__ }}").render(CHAT)


def test_the_clock_is_read_when_rendering():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render(CHAT) == "26 Jul 2024"


def test_requests_that_cannot_be_rendered_say_why():
    with pytest.raises(InvalidRequest, match="empty"):
        ours(CHATML).render([])
    with pytest.raises(InvalidRequest, match=r"messages\[1\] has no role"):
        ours(CHATML).render([CHAT[0], {"content": "x"}])
    with pytest.raises(UnsupportedFeature, match="no place for tools"):
        ours(CHATML).render(CHAT, tools=TOOLS)
    with pytest.raises(UnsupportedFeature, match="no place for documents"):
        ours(CHATML).render(CHAT, documents=[{"title": "t", "text": "x"}])
    with pytest.raises(InvalidRequest, match="must not set messages"):
        ours(CHATML).render(CHAT, messages=[])
    with pytest.raises(InvalidRequest, match="exclude each other"):
        ours(CHATML).render(CHAT, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text to go on with"):
        ours(QWEN_TOOLS).render(
            [{"role": "assistant"}], continue_final_message=True, add_generation_prompt=False
        )
    with pytest.raises(InvalidRequest, match="leaves out"):
        ours("x").render(CHAT, continue_final_message=True, add_generation_prompt=False)


def test_a_template_that_is_no_jinja_names_the_line():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("fine\n{% for %}")


def test_a_models_tool_template_is_used_for_tools(backends):
    templates = {"default": "plain", "tool_use": "tools: {{ tools[0].function.name }}"}
    tokenizer = Tokenizer(backends["byte_level"](), chat_templates=templates)
    template = ChatTemplate.of_model(tokenizer)
    assert template is not None
    assert template.render(CHAT) == "plain"
    assert template.render(CHAT, tools=TOOLS) == "tools: get_weather"


def test_no_template_is_none(byte_level_tokenizer):
    assert ChatTemplate.of_model(byte_level_tokenizer) is None


def test_the_option_names_a_built_in_a_file_or_the_text(tmp_path, byte_level_tokenizer):
    file = tmp_path / "mine.jinja"
    file.write_text("from a file{{ eos_token }}")
    for option, expected in [(str(file), "from a file<|end|>"), ("{{ bos_token }}!", "<|begin|>!")]:
        template = ChatTemplate.of_model(byte_level_tokenizer, override=option)
        assert template is not None
        assert template.render(CHAT) == expected
    with pytest.raises(ConfigError, match="chatml"):
        template_source("no-such-template")
    assert template_source("llama-3-instruct") == template_source("llama-3")


SYSTEM_USER = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
BUILT_IN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\n",
    "chatml-tools": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]",
    "mistral": "<s>[INST] S\n\nU [/INST]",
    "gemma": "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\n",
    "vicuna": "S USER: U ASSISTANT:",
    "deepseek-v3.2": "<｜begin▁of▁sentence｜>S<｜User｜>U<｜Assistant｜></think>",  # noqa: RUF001
}


def test_every_built_in_is_listed():
    aliases = {"llama-3-instruct", "gemma-it", "vicuna_v1.1"}
    assert set(built_in_names()) == {*BUILT_IN, *aliases}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_renders_a_chat(name):
    template = ChatTemplate(template_source(name))
    assert template.render(SYSTEM_USER) == BUILT_IN[name]
    answer = [*SYSTEM_USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}]
    rendered = template.render(answer)
    assert rendered.index("U") < rendered.index("A", rendered.index("U")) < rendered.rindex("V")


def test_the_built_in_with_tools_shows_them_and_their_calls():
    rendered = ChatTemplate(template_source("chatml-tools")).render(CALL, tools=TOOLS)
    assert '"name": "get_weather", "description": "Today\'s weather' in rendered
    assert '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1]}}' in rendered
    assert '<tool_response>\n{"sky": "<blue>"}\n</tool_response><|im_end|>\n' in rendered


def test_one_of_several_templates_is_chosen_by_its_name() -> None:
    tokenizer = AbsentTokenizer()
    tokenizer.chat_templates = {"default": "A", "rag": "B{{ messages[0].content }}"}
    chosen = ChatTemplate.of_model(tokenizer, name="rag")
    assert chosen is not None
    assert chosen.render([{"role": "user", "content": "x"}]) == "Bx"
    with pytest.raises(ConfigError, match="its templates are: default, rag"):
        ChatTemplate.of_model(tokenizer, name="tools")
