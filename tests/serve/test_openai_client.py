"""The official OpenAI client gets from the server what the model gives directly."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, ClassVar

import jsonschema
import openai
import pytest

import gemma3_export
from gemma3_export import Model
from gemma3_export.runtimes.generation.sampling import SampledToken, Sampler
from tests.serve.conftest import NAME, Running, running
from tests.support.chat_templates import WEATHER, chat_bundle

PROMPT = "The sea is"
MESSAGES: list[Any] = [{"role": "user", "content": "Where is the sea?"}]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def test_a_completion_is_the_models(served: Running, model: Model) -> None:
    found = served.openai.completions.create(prompt=PROMPT, max_tokens=9, **GREEDY)
    alone = model.generate(PROMPT, max_new_tokens=9)
    (choice,) = found.choices
    assert choice.text == alone.text
    assert choice.finish_reason == {"length": "length", "stop": "stop"}[alone.finish_reason]
    assert found.usage is not None
    assert found.usage.prompt_tokens == alone.prompt_tokens
    assert found.usage.completion_tokens == len(alone.token_ids)
    assert found.model == NAME


def test_a_batch_of_prompts_has_n_choices_each_in_order(served: Running, model: Model) -> None:
    prompts = ["a", "bb", "The sea"]
    options: dict[str, Any] = {"temperature": 1.3, "seed": 7}
    found = served.openai.completions.create(
        model=NAME, prompt=prompts, n=2, max_tokens=6, **options
    )
    assert [choice.index for choice in found.choices] == list(range(6))
    for choice in found.choices:
        alone = model.generate(
            prompts[choice.index // 2],
            max_new_tokens=6,
            request_index=choice.index % 2,
            **options,
        )
        assert choice.text == alone.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(model.encode(prompt)) for prompt in prompts)


@pytest.mark.parametrize("prompt", [[2, 40, 41], [[2, 40, 41], [2, 50]]])
def test_prompts_may_be_token_ids(served: Running, model: Model, prompt: Any) -> None:
    found = served.openai.completions.create(prompt=prompt, max_tokens=5, **GREEDY)
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    for choice, ids in zip(found.choices, prompts, strict=True):
        assert choice.text == model.generate(ids, max_new_tokens=5).text


def test_stops_cut_the_text(served: Running, model: Model) -> None:
    text = model.generate(PROMPT, max_new_tokens=12).text
    stop = text[4:6]
    found = served.openai.completions.create(prompt=PROMPT, max_tokens=12, stop=[stop], **GREEDY)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("frequency", [0.0, 1.5])
def test_biases_and_penalties_are_the_models(
    served: Running, model: Model, frequency: float
) -> None:
    asked = {"frequency_penalty": frequency, "presence_penalty": 0.5}
    bias = {9: 30, 11: 29.0}
    answer = served.openai.completions.create(
        model=NAME,
        prompt="a",
        max_tokens=6,
        temperature=0,
        logit_bias={str(token): int(value) for token, value in bias.items()},
        **asked,
    )
    expected = model.generate("a", max_new_tokens=6, logit_bias=bias, **asked)
    assert answer.choices[0].text == expected.text
    assert set(expected.token_ids) == ({9} if frequency == 0 else {9, 11})


def test_clients_may_send_the_defaults(served: Running) -> None:
    defaults = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1}
    for more in (defaults, dict.fromkeys(defaults)):
        asked = {"prompt": "a", "max_tokens": 1} | more
        assert served.http.post("/v1/completions", json=asked).status_code == 200


@pytest.mark.parametrize("is_chat", [False, True])
def test_ignore_eos_goes_on_to_max_tokens(
    served: Running, model: Model, monkeypatch: pytest.MonkeyPatch, is_chat: bool
) -> None:
    prompt: Any = MESSAGES if is_chat else PROMPT
    free = model.generate(prompt, max_new_tokens=9)
    end = free.token_ids[2]
    monkeypatch.setattr(Model, "stop_token_ids", lambda self, *, is_chat: (end,))
    given = {"messages": prompt} if is_chat else {"prompt": prompt}
    client = served.openai.chat.completions if is_chat else served.openai.completions
    create: Any = client.create
    for ignores, length in ((False, free.token_ids.index(end) + 1), (True, 9)):
        fields = {"ignore_eos": ignores}
        found = create(**given, max_tokens=9, extra_body=fields, **GREEDY)
        assert found.usage.completion_tokens == length
        assert found.choices[0].finish_reason == ("length" if ignores else "stop")


def test_a_stream_adds_up_to_the_answer_and_ends_with_usage(served: Running) -> None:
    whole = served.openai.completions.create(prompt=PROMPT, max_tokens=9, n=2, **GREEDY)
    chunks = list(
        served.openai.completions.create(
            prompt=PROMPT,
            max_tokens=9,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == whole.choices[index].text
        assert [each.finish_reason for each in own if each.finish_reason] == [
            whole.choices[index].finish_reason
        ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_is_the_models(served: Running, model: Model) -> None:
    found = served.openai.chat.completions.create(messages=MESSAGES, max_tokens=9, **GREEDY)
    alone = model.generate(MESSAGES, max_new_tokens=9)
    assert found.choices[0].message.content == alone.text
    assert found.choices[0].message.role == "assistant"
    chunks = list(
        served.openai.chat.completions.create(
            messages=MESSAGES, max_completion_tokens=9, stream=True, **GREEDY
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == alone.text


def test_content_may_be_parts_of_text(served: Running) -> None:
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the sea?"}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    one = served.openai.chat.completions.create(messages=messages, max_tokens=5, **GREEDY)
    other = served.openai.chat.completions.create(messages=MESSAGES, max_tokens=5, **GREEDY)
    assert one.usage == other.usage
    assert one.choices[0].message.content == other.choices[0].message.content


def test_many_async_streams_share_the_engine(served: Running, model: Model) -> None:
    prompts = [f"{number} seas" for number in range(6)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            prompt=prompt, max_tokens=12, stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    expected = [model.generate(prompt, max_new_tokens=12).text for prompt in prompts]
    assert asyncio.run(main()) == expected


def test_chats_report_log_probabilities(served: Running, model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "logprobs": True, "top_logprobs": 3, **GREEDY}
    found = served.openai.chat.completions.create(messages=MESSAGES, **options)
    alone = model.generate(MESSAGES, max_new_tokens=5, logprobs=3)
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert content is not None
    assert len(content) == len(alone.tokens)
    for token, own in zip(content, alone.tokens, strict=True):
        assert token.logprob == pytest.approx(own.logprob)
        assert token.bytes == list(model.tokenizer.token_bytes(own.token_id))
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            [logprob for _, logprob in own.top_logprobs]
        )
    streamed = [
        each
        for chunk in served.openai.chat.completions.create(
            messages=MESSAGES, stream=True, **options
        )
        if chunk.choices[0].logprobs is not None
        for each in chunk.choices[0].logprobs.content or ()
    ]
    assert [each.token for each in streamed] == [each.token for each in content]


class TestEcho:
    def test_lm_eval_gets_the_log_probabilities_of_token_ids(
        self, served: Running, model: Model
    ) -> None:
        """The request and the reading of the answer are those of lm-eval's local-completions."""
        prompts = [model.encode("The sea is blue and wide"), model.encode("A sky")]
        context = 2
        answer = served.http.post(
            "/v1/completions",
            json={
                "model": NAME,
                "prompt": prompts,
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            },
        )
        assert answer.status_code == 200, answer.text
        for choice, ids in zip(answer.json()["choices"], prompts, strict=True):
            logits = model.logits(ids).astype("float64")
            logprobs = logits - [[math.log(sum(map(math.exp, row)))] for row in logits.tolist()]
            expected = [logprobs[at - 1, ids[at]] for at in range(context, len(ids))]
            found = choice["logprobs"]["token_logprobs"][context:-1]
            assert found == pytest.approx(expected, abs=1e-4)
            top = choice["logprobs"]["top_logprobs"][context:-1]
            tokens = choice["logprobs"]["tokens"][context:-1]
            for at, (token, alternatives) in enumerate(zip(tokens, top, strict=True), context):
                is_greedy = ids[at] == int(logits[at - 1].argmax())
                assert (max(alternatives, key=alternatives.get) == token) == is_greedy

    def test_no_tokens_at_all_still_give_those_of_the_prompt(
        self, served: Running, model: Model
    ) -> None:
        found = served.openai.completions.create(
            prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, **GREEDY
        )
        (choice,) = found.choices
        assert choice.text == PROMPT
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or ()) == len(model.encode(PROMPT))
        assert found.usage is not None
        assert found.usage.completion_tokens == 0

    def test_without_log_probabilities_it_adds_the_prompt_to_the_text(
        self, served: Running, model: Model
    ) -> None:
        found = served.openai.completions.create(prompt=PROMPT, max_tokens=4, echo=True, **GREEDY)
        assert found.choices[0].text == PROMPT + model.generate(PROMPT, max_new_tokens=4).text

    @pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": 5, "n": 2}], ids=str)
    def test_a_stream_begins_with_the_prompt(self, served: Running, options: Any) -> None:
        options |= {"prompt": ["ab", "The sea"], "echo": True, "logprobs": 1, **GREEDY}
        whole = served.openai.completions.create(**options)
        chunks = list(served.openai.completions.create(stream=True, **options))
        for choice in whole.choices:
            own = [each.choices[0] for each in chunks if each.choices[0].index == choice.index]
            assert "".join(each.text for each in own) == choice.text
            parts = [each.logprobs for each in own if each.logprobs is not None]
            for name in ("tokens", "token_logprobs", "text_offset"):
                found = [value for part in parts for value in getattr(part, name)]
                assert found == getattr(choice.logprobs, name)


class TestStructuredOutput:
    def test_a_schema_is_enforced(self, served: Running) -> None:
        pytest.importorskip("llguidance")
        schema = {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
            "required": ["ok", "n"],
            "additionalProperties": False,
        }
        found = served.openai.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            seed=3,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        assert found.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(found.choices[0].message.content or ""), schema)

    def test_so_is_a_regular_expression(self, served: Running) -> None:
        pytest.importorskip("llguidance")
        found = served.openai.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=20, extra_body={"regex": "(yes|no){3}"}
        )
        assert found.choices[0].text.replace("yes", "no") == "nonono"

    def test_json_mode_gives_an_object(self, served: Running) -> None:
        pytest.importorskip("llguidance")
        stream = served.openai.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            seed=1,
            max_tokens=30,
            response_format={"type": "json_object"},
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text.startswith("{")


class TestTools:
    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
        """Let the model, whose weights are random, write a call."""
        script = model.tokenizer.encode(
            "ok<start_function_call>call:get_weather{city:<escape>Graz<escape>,days:3}"
            "<end_function_call><start_function_response>",
            add_bos=False,
        )

        def sample(sampler: Sampler, *arguments: Any) -> SampledToken:
            sampler.position += 1
            return SampledToken(token_id=script[sampler.position - 1])

        monkeypatch.setattr(Sampler, "sample", sample)
        monkeypatch.setattr(Sampler, "choose", sample)

    def test_calls_are_parsed(self, served: Running) -> None:
        found = served.openai.chat.completions.create(
            messages=MESSAGES, tools=[WEATHER], max_tokens=400, **GREEDY
        )
        (choice,) = found.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "ok"
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Graz", "days": 3}

    def test_a_stream_has_calls_instead_of_their_text(self, served: Running) -> None:
        with served.openai.chat.completions.stream(
            messages=MESSAGES, tools=[WEATHER], max_tokens=400, **GREEDY
        ) as stream:
            found = stream.get_final_completion()
        (choice,) = found.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "ok"
        (call,) = choice.message.tool_calls or ()
        assert json.loads(call.function.arguments) == {"city": "Graz", "days": 3}

    def test_results_go_back_to_the_model(self, served: Running, model: Model) -> None:
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Graz"}'},
        }
        history: list[Any] = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        found = served.openai.chat.completions.create(
            messages=history, tools=[WEATHER], max_tokens=400, **GREEDY
        )
        own = [
            *model.tokenizer.chat.opening(None, [WEATHER]),
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": {"city": "Graz"}},
                    }
                ],
            },
            {"role": "tool", "name": "get_weather", "content": "sunny"},
        ]
        from gemma3_export import GenerateOptions

        assert found.usage is not None
        expected = model.encode(own, GenerateOptions(tools=[WEATHER]))
        assert found.usage.prompt_tokens == len(expected)

    def test_none_offers_no_tools(self, served: Running, model: Model) -> None:
        found = served.openai.chat.completions.create(
            messages=MESSAGES, tools=[WEATHER], tool_choice="none", max_tokens=400, **GREEDY
        )
        assert found.choices[0].message.tool_calls is None
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(model.encode(MESSAGES))


class TestToolChoice:
    """Calls that the grammar enforces, of a model whose weights are random."""

    LIGHT: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {"room": {"enum": ["kitchen", "hall"]}},
                "required": ["room"],
            },
        },
    }

    def ask(self, served: Running, **options: Any) -> Any:
        pytest.importorskip("llguidance")
        return served.openai.chat.completions.create(
            messages=MESSAGES,
            extra_body={"top_k": 40},
            **{"model": NAME, "seed": 3, "max_tokens": 400, "tools": [WEATHER, self.LIGHT]}
            | options,
        )

    def test_a_named_function_is_called_once(self, served: Running) -> None:
        choice: Any = {"type": "function", "function": {"name": "set_light"}}
        whole = self.ask(served, tool_choice=choice, n=2)
        for each in whole.choices:
            assert each.finish_reason == "tool_calls"
            (call,) = each.message.tool_calls or ()
            assert call.function.name == "set_light"
            assert json.loads(call.function.arguments)["room"] in ("kitchen", "hall")
        chunks = list(self.ask(served, tool_choice=choice, stream=True))
        (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        first = whole.choices[0].message.tool_calls[0]
        assert streamed.function.arguments == first.function.arguments

    def test_a_call_can_be_required_and_more_be_excluded(self, served: Running) -> None:
        """Some of the choices end in the middle of another call, which is left out."""
        options: dict[str, Any] = {"tool_choice": "required", "tools": [self.LIGHT]}
        options |= {"n": 16, "max_tokens": 60}
        several = self.ask(served, **options).choices
        calls = [[call.function for call in each.message.tool_calls] for each in several]
        assert max(map(len, calls)) > 1
        assert {each.finish_reason for each in several} == {"tool_calls", "length"}
        first = self.ask(served, parallel_tool_calls=False, **options).choices
        assert [[call.function for call in each.message.tool_calls] for each in first] == [
            each[:1] for each in calls
        ]

    def test_other_models_cannot_be_made_to_call(self) -> None:
        llama = gemma3_export.load(chat_bundle("llama"), device="cpu", threads=1)
        wrong = pytest.raises(openai.BadRequestError, match="only FunctionGemma's calls")
        with running(llama) as other, wrong:
            self.ask(other, tool_choice="required")


def test_the_model_is_listed(served: Running) -> None:
    (only,) = served.openai.models.list()
    assert only.id == NAME
    assert served.openai.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model"):
        served.openai.models.retrieve("gpt-5")


def test_errors_are_those_of_the_client(served: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        served.openai.completions.create(model="gpt-5", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as invalid:
        served.openai.completions.create(prompt="a", top_p=2, **GREEDY)
    assert invalid.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as too_long:
        served.openai.completions.create(prompt="a " * 3000, **GREEDY)
    assert too_long.value.code == "context_length_exceeded"


def test_over_long_prompts_are_rejected_before_they_are_encoded(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma3_export.tokenizer.tokenizer._encoding", None)
    with pytest.raises(openai.BadRequestError, match="at least") as text:
        served.openai.completions.create(prompt="ab" * 900_000, **GREEDY)
    assert (text.value.code, text.value.param) == ("context_length_exceeded", "prompt")
    messages: Any = [{"role": "user", "content": "ab" * 900_000}]
    with pytest.raises(openai.BadRequestError, match="at least") as chat:
        served.openai.chat.completions.create(model=NAME, messages=messages)
    assert (chat.value.code, chat.value.param) == ("context_length_exceeded", "messages")
