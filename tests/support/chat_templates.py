"""Chat templates of several families, written for the tests, and conversations for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gemma3_export.exporters.bundle_writer import export_bundle
from gemma3_export.exporters.onnx.writer import OnnxWriter
from gemma3_export.reference.weights.source import RandomSource
from gemma3_export.tokenizer import load_tokenizer
from tests.support.exported_bundles import made_once
from tests.support.tiny_models import tiny_config
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Headers with roles, the date, tools as JSON in the first user message, one call a message.
LLAMA_LIKE = """\
{{- bos_token }}
{%- set day = strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|head|>system<|/head|>\\n\\nToday: ' + day + '\\n\\n' + system + '<|eot|>' }}
{%- if tools is not none %}
    {{- '<|head|>user<|/head|>\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\\n\\n' }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call a message') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
        {{- '<|eot|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|head|>ipython<|/head|>\\n\\n' }}
        {{- message.content if message.content is string else message.content | tojson }}
        {{- '<|eot|>' }}
    {%- else %}
        {{- '<|head|>' + message.role + '<|/head|>\\n\\n' + message.content | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""

# Marks what the model says, keeps reasoning, leaves a loop early, and knows documents.
MARKED = """\
{{ bos_token }}{% for document in documents or [] %}
{{ loop.index }}. {{ document.title }}: {{ document.text }}
{% endfor %}
{% for message in messages %}
{% if message.role == 'stop' %}{% break %}{% endif %}
{% if message.role == 'skip' %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}
A:{% generation %}{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{{ message.content }}{{ eos_token }}{% endgeneration %}

{% else %}
{{ message.role | upper }}: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}A:{% endif %}
"""

# Function calling as FunctionGemma does it: declarations, calls and responses in Gemma's turns.
FUNCTION_GEMMA = """\
{%- macro value(given, is_quoted=true) -%}
    {%- if given is string -%}<escape>{{ given }}<escape>
    {%- elif given is boolean -%}{{ 'true' if given else 'false' }}
    {%- elif given is mapping -%}{
        {%- for key, item in given | dictsort -%}
            {{ '<escape>' ~ key ~ '<escape>' if is_quoted else key }}:{{ value(item, is_quoted) }}
            {{- ',' if not loop.last }}
        {%- endfor -%}}
    {%- elif given is sequence -%}[
        {%- for item in given -%}
            {{ value(item, is_quoted) }}{{ ',' if not loop.last }}
        {%- endfor -%}]
    {%- else -%}{{ given }}
    {%- endif -%}
{%- endmacro -%}
{%- macro declare(tool) -%}
    <start_function_declaration>declaration:{{ tool.function.name -}}
    {description:<escape>{{ tool.function.description }}<escape>,parameters:{properties:{
    {%- for key, item in tool.function.parameters.properties | dictsort -%}
        {{ key }}:{description:<escape>{{ item.description }}<escape>,type:<escape>
        {{- item.type | upper }}<escape>}{{ ',' if not loop.last }}
    {%- endfor -%}
    },type:<escape>OBJECT<escape>}}<end_function_declaration>
{%- endmacro -%}
{{ bos_token }}
{%- set rest = messages -%}
{%- if tools or messages[0].role in ['system', 'developer'] -%}
    {{ '<start_of_turn>developer\\n' }}
    {%- if messages[0].role in ['system', 'developer'] -%}
        {{ messages[0].content | trim }}
        {%- set rest = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}{{ declare(tool) }}{%- endfor -%}
    {{ '<end_of_turn>\\n' }}
{%- endif -%}
{%- set ns = namespace(in_response=false) -%}
{%- for message in rest -%}
    {%- if message.role == 'tool' -%}
        <start_function_response>response:{{ message.name }}
        {{- value(message.content, false) if message.content is mapping
            else '{value:' ~ value(message.content) ~ '}' -}}
        <end_function_response>
        {%- set ns.in_response = true -%}
    {%- else -%}
        {%- if not (ns.in_response and message.role == 'assistant') -%}
            {{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) }}
            {{- '\\n' }}
        {%- endif -%}
        {%- set ns.in_response = false -%}
        {{ (message.content or '') | trim }}
        {%- if message.tool_calls is defined -%}
            {%- for call in message.tool_calls -%}
                <start_function_call>call:{{ call.function.name }}
                {{- value(call.function.arguments, false) -}}<end_function_call>
            {%- endfor -%}
            {%- set ns.in_response = true -%}
        {%- else -%}
            {{ '<end_of_turn>\\n' }}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.in_response -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

FUNCTION_TOKENS = (
    *("<start_function_declaration>", "<end_function_declaration>"),
    *("<start_function_call>", "<end_function_call>"),
    *("<start_function_response>", "<end_function_response>"),
    "<escape>",
)

# The control tokens that each adds to Gemma's.
ADDED_TOKENS = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama": (LLAMA_LIKE, ("<|head|>", "<|/head|>", "<|eot|>")),
    "marked": (MARKED, ()),
    "functiongemma": (FUNCTION_GEMMA, FUNCTION_TOKENS),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather <now>, e.g. in \"Graz\" & 'Linz'.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city, ä ö ü."},
                "days": {"type": "integer", "description": "How many days."},
            },
            "required": ["city"],
        },
    },
}


def write_tokenizer(folder: Path, name: str, *, vocab_size: int = 600, **config: Any) -> Path:
    """Write a Gemma-like tokenizer with a template of :data:`ADDED_TOKENS`; return ``folder``.

    Args:
        folder: where to write it.
        name: which template.
        vocab_size: tokens before the added ones.
        config: other entries of ``tokenizer_config.json``.
    """
    template, added = ADDED_TOKENS[name]
    tiny_gemma_tokenizer(vocab_size).save(folder)
    file = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    backend.save(str(file))
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text()) | {"chat_template": template} | config
    path.write_text(json.dumps(data))
    return folder


def chat_bundle(name: str) -> Path:
    """Return a shared bundle with a template of :data:`ADDED_TOKENS`; its context is long."""

    def make(path: Path) -> None:
        tokenizer = load_tokenizer(
            write_tokenizer(path.with_name(f"{path.name}-tokenizer"), name, model_max_length=77)
        )
        config = tiny_config(
            num_hidden_layers=1,
            layer_types=("full_attention",),
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=2048,
        )
        export_bundle(RandomSource(config, 3), path, OnnxWriter(), tokenizer=tokenizer)

    return made_once(f"chat-{name}", make)
