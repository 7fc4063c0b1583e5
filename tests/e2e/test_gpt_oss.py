"""A tiny gpt-oss from an MXFP4 checkpoint, in Harmony's format: thinking, tool calls and answers
over HTTP.

The model is made here, with names as in the files of OpenAI: its experts are random MXFP4 numbers,
and all else of it learns three answers by heart, whose prompts are far longer than its window. So
each answer needs the experts' numbers, the window, the sinks and the prompt's exact text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from sapwood.text.template import ChatTemplate
from tests.e2e.server import Server, serving
from tests.models.loader.test_fused_experts import blocks_of

WINDOW = 8
NUM_EXPERTS = 4
HIDDEN, INNER = 64, 96
END, RETURN, CALL, TEXT_END = "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"
TAGS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", END, RETURN, CALL, TEXT_END)
TEMPLATE = """
{%- macro analysis(thinking) -%}
<|start|>assistant<|channel|>analysis<|message|>{{ thinking }}<|end|>
{%- endmacro -%}
<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>
{%- if tools -%}
<|start|>developer<|message|># Tools\n\nnamespace functions {
{%- for tool in tools %}\n// {{ tool.function.description }}\ntype {{ tool.function.name }} = (_: \
{{ tool.function.parameters.properties | tojson }}) => any;{% endfor %}\n}<|end|>
{%- endif -%}
{%- set last = namespace(call="") -%}
{%- for message in messages -%}
{%- if message.role == "tool" -%}
<|start|>functions.{{ last.call }} to=assistant<|channel|>commentary<|message|>\
{{ message.content }}<|end|>
{%- elif message.role == "assistant" -%}
{%- if message.tool_calls -%}
{%- if message.thinking %}{{ analysis(message.thinking) }}{% endif -%}
{%- set call = message.tool_calls[0].function -%}
{%- set last.call = call.name -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>\
{{ call.arguments | tojson }}<|call|>
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""
FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
SUM, WEATHER = "How much are two and two?", "Is it warm in Rome?"
SUNNY = '{"sky": "clear", "degrees": 25}'
THOUGHT_OF_SUM, SUM_IS = "Two and two are four.", "They are 4."
THOUGHT_OF_CALL, ARGUMENTS = "I must ask for the weather.", {"city": "Rome"}
THOUGHT_OF_RESULT, WARM = "25 degrees are warm.", "Yes: 25 degrees, and a clear sky."


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def conversations() -> list[tuple[str, str]]:
    """(prompt, answer) of each turn, as the template shows them."""
    template = ChatTemplate(TEMPLATE)
    function = {"name": FUNCTION["name"], "arguments": json.dumps(ARGUMENTS)}
    called = {
        "role": "assistant",
        "reasoning_content": THOUGHT_OF_CALL,
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "a", "content": SUNNY}

    def thinks(thought: str) -> str:
        return f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"

    def ends(answer: str) -> str:
        return f"<|channel|>final<|message|>{answer}<|return|>"

    call = (
        f"<|channel|>commentary to=functions.{FUNCTION['name']} <|constrain|>json<|message|>"
        f"{json.dumps(ARGUMENTS)}<|call|>"
    )
    return [
        (template.render([user(SUM)]), thinks(THOUGHT_OF_SUM) + ends(SUM_IS)),
        (template.render([user(WEATHER)], tools=TOOLS), thinks(THOUGHT_OF_CALL) + call),
        (
            template.render([user(WEATHER), called, result], tools=TOOLS),
            thinks(THOUGHT_OF_RESULT) + ends(WARM),
        ),
    ]


def write_tokenizer(directory: Path, texts: Sequence[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(TAGS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": RETURN, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return backend


def make_model(vocab_size: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model whose experts are numbers of MXFP4, and these experts as files have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.endswith((".gate_up_proj", ".down_proj")):
            shape = (2 * INNER, HIDDEN) if name.endswith("gate_up_proj") else (HIDDEN, INNER)
            made = [blocks_of(*shape) for _ in range(NUM_EXPERTS)]
            stored[f"{name}_blocks"] = torch.stack([blocks for blocks, _, _ in made])
            stored[f"{name}_scales"] = torch.stack([scales for _, scales, _ in made])
            parameter.data = torch.stack([weight.T for _, _, weight in made])
            parameter.requires_grad_(False)
    return model, stored


def learn(model: Any, token_ids: list[tuple[list[int], list[int]]]) -> None:
    """Train all but the experts, until each answer is likely token by token."""
    longest = max(len(prompt) + len(answer) for prompt, answer in token_ids)
    inputs = torch.zeros(len(token_ids), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    for row, (prompt, answer) in enumerate(token_ids):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    for _ in range(400):
        logits = model(inputs, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none"
        )
        if losses.max() < 0.02:
            return
        optimizer.zero_grad()
        losses.sum().div((wanted >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    raise AssertionError(f"the model has not learnt its answers: {losses.max()}")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt-oss")
    texts = conversations()
    backend = write_tokenizer(directory, [prompt + answer for prompt, answer in texts])
    pairs = [(backend.encode(prompt).ids, backend.encode(answer).ids) for prompt, answer in texts]
    assert min(len(prompt) for prompt, _ in pairs) > 2 * WINDOW
    model, stored = make_model(backend.get_vocab_size())
    learn(model, pairs)
    for name, tensor in model.state_dict().items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            stored[name] = tensor.contiguous()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
    }
    (directory / "config.json").write_text(json.dumps(config, default=str))
    ends = [backend.token_to_id(one) for one in (RETURN, TEXT_END, CALL)]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory


@pytest.fixture(scope="module")
def gpt_oss_server(model_path: Path) -> Iterator[Server]:
    options = ("--served-model-name", "gpt-oss", "--dtype", "float32", "--num-threads", "1")
    sizes = ("--page-size", "8", "--chunked-prefill-size", "32", "--max-total-tokens", "4096")
    with serving("--model", str(model_path), *options, *sizes) as one:
        yield one


@pytest.fixture
def client(gpt_oss_server: Server) -> Iterator[openai.OpenAI]:
    url = f"{gpt_oss_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one:
        yield one


GREEDY: dict[str, Any] = {"model": "gpt-oss", "temperature": 0}


def chat(client: openai.OpenAI, messages: list[Any], *, stream: bool, **options: Any) -> Any:
    asked = {**GREEDY, "messages": messages, "max_tokens": 100, **options}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            (choice,) = events.get_final_completion().choices
    else:
        (choice,) = client.chat.completions.create(**asked).choices
    return choice


@pytest.mark.parametrize("stream", [False, True])
def test_chat_completions(client: openai.OpenAI, stream: bool) -> None:
    summed = chat(client, [user(SUM)], stream=stream)
    assert (summed.message.reasoning_content, summed.message.content) == (THOUGHT_OF_SUM, SUM_IS)
    assert summed.finish_reason == "stop"

    asked = chat(client, [user(WEATHER)], stream=stream, tools=TOOLS)
    assert asked.finish_reason == "tool_calls"
    assert asked.message.reasoning_content == THOUGHT_OF_CALL
    assert not asked.message.content
    (call,) = asked.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", ARGUMENTS)

    said = asked.message.model_dump(exclude_none=True)
    said["tool_calls"] = [
        {"id": call.id, "type": "function", "function": {"name": call.function.name,
                                                         "arguments": call.function.arguments}}
    ]  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": SUNNY}
    told = chat(client, [user(WEATHER), said, result], stream=stream, tools=TOOLS)
    assert (told.message.reasoning_content, told.message.content) == (THOUGHT_OF_RESULT, WARM)


def respond(client: openai.OpenAI, *, stream: bool, **asked: Any) -> Any:
    options = {**GREEDY, "max_output_tokens": 100, **asked}
    if not stream:
        return client.responses.create(**options)
    with client.responses.stream(**options) as events:
        for _ in events:
            pass
        return events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
def test_responses(client: openai.OpenAI, stream: bool) -> None:
    tools = [{"type": "function", **FUNCTION, "strict": False}]
    summed = respond(client, stream=stream, input=SUM)
    assert [one.type for one in summed.output] == ["reasoning", "message"]
    assert summed.output[0].content[0].text == THOUGHT_OF_SUM
    assert summed.output_text == SUM_IS

    asked = respond(client, stream=stream, input=WEATHER, tools=tools)
    assert [one.type for one in asked.output] == ["reasoning", "function_call"]
    thought, call = asked.output
    assert thought.content[0].text == THOUGHT_OF_CALL
    assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)

    result = {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}
    told = respond(
        client, stream=stream, input=[result], previous_response_id=asked.id, tools=tools
    )
    assert [one.type for one in told.output] == ["reasoning", "message"]
    assert told.output[0].content[0].text == THOUGHT_OF_RESULT
    assert told.output_text == WARM


def test_it_was_computed_from_mxfp4_with_windows(gpt_oss_server: Server) -> None:
    notes = json.dumps(gpt_oss_server.counters()) + gpt_oss_server.log
    assert "tool_call_parser = gpt-oss" in notes
    assert "reasoning_parser = gpt-oss" in notes
    assert f"windows of {WINDOW} in 1 layer" in notes
    assert "mxfp4" in notes
