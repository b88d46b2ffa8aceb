"""Reused prompt prefixes: the same events and logits, fewer tokens computed, bounded memory."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gemma3_export.api.prompts import shared_length
from gemma3_export.cli import command_line
from gemma3_export.errors import InputError
from gemma3_export.exporters.torch.torchscript import TorchScriptWriter
from gemma3_export.reference.loading import load_reference
from gemma3_export.reference.runtime import ReferenceRuntime
from gemma3_export.runtimes.generation.prefix_cache import PrefixCache
from gemma3_export.runtimes.generation.request import Completion
from gemma3_export.runtimes.generation.sampling import SamplingParams
from gemma3_export.runtimes.generation.speculation import PromptLookup
from gemma3_export.runtimes.onnx.runtime import OnnxRuntime
from gemma3_export.runtimes.protocol import IntArray, KVCache, Logits, Runtime
from gemma3_export.runtimes.torch.runtime import TorchScriptRuntime
from tests.exporters.test_half_precision import half_bundle
from tests.exporters.test_quantized_export import int8_bundle
from tests.support.exported_bundles import exported, exported_bundle, source_of
from tests.support.fake_runtime import FakeRuntime
from tests.support.generation import generate
from tests.support.tiny_models import TINY

GREEDY = SamplingParams(seed=3)
SAMPLED = SamplingParams(temperature=1.0, top_k=64, seed=7, repetition_penalty=1.2, logprobs=2)
TOLERANCE = 1e-5  # absolute, float32; logits are about 1, and two correct runs differ by 1e-6
PLENTY = 2**30
BACKENDS = ("reference", "reference bf16", "ort", "ort bf16", "int8", "portable", "torchscript")
FLOAT32 = ("reference", "ort", "portable", "torchscript")


class Recording:
    """A runtime that records the tokens it computed and the logits it returned."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.info, self.config = runtime.info, runtime.config
        self.new_cache = runtime.new_cache
        self.computed: list[int] = []  # tokens per step
        self.logits: list[Logits] = []

    def step(self, input_ids: IntArray, cache: KVCache, **options: Any) -> Logits:
        self.computed.append(input_ids.size)
        self.logits.append(self.runtime.step(input_ids, cache, **options))
        return self.logits[-1]


@functools.cache
def backend(name: str) -> Runtime:
    if name.startswith("reference"):
        model = load_reference(source_of())
        return ReferenceRuntime(model.bfloat16() if "bf16" in name else model)
    if name == "torchscript":
        return TorchScriptRuntime(exported(TorchScriptWriter()), device="cpu")
    bundles: dict[str, Callable[[], Path]] = {
        "ort bf16": lambda: half_bundle("bf16"),
        "int8": lambda: int8_bundle(True).path,
    }
    folder = bundles.get(name, lambda: exported_bundle(name))()
    return OnnxRuntime(folder, device="cpu", threads=1)


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist()


def run(
    runtime: Runtime, prompts: Sequence[Sequence[int]], cache: PrefixCache | None, **options: Any
) -> tuple[list[Completion], list[Logits]]:
    """Return completions, and the logits that each token was chosen from."""
    recording = runtime if isinstance(runtime, Recording) else Recording(runtime)
    before = len(recording.logits)
    options = {"max_new_tokens": 6, "stop_token_ids": ()} | options
    sampling = options.pop("sampling", GREEDY)
    done = generate(recording, prompts, sampling, prefix_cache=cache, **options).collect()
    return done, recording.logits[before:]


@pytest.mark.parametrize("name", BACKENDS)
def test_reusing_whole_chunks_is_bitwise_exact(name: str) -> None:
    """The second prompt shares 21 tokens with the first, which contain two chunks of 8."""
    prefix = random_ids(21, 1)
    prompts = [[*prefix, *random_ids(9, 2)], [*prefix, *random_ids(14, 3)]]
    recording = Recording(backend(name))
    cache = PrefixCache(recording, max_bytes=PLENTY)
    run(recording, prompts[:1], cache, prefill_chunk=8)
    del recording.computed[:]
    (reused,), logits = run(recording, prompts[1:], cache, prefill_chunk=8)
    assert reused.reused_tokens == 16
    assert recording.computed[:3] == [8, 8, 3]
    (plain,), expected = run(backend(name), prompts[1:], None, prefill_chunk=8)
    assert plain.reused_tokens == 0
    assert plain.token_ids == reused.token_ids
    for ours, theirs in zip(logits, expected[2:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", FLOAT32)
def test_every_common_token_is_reused_up_to_rounding(name: str) -> None:
    prefix = random_ids(21, 1)
    prompts = [[*prefix, *random_ids(9, 2)], [*prefix, *random_ids(14, 3)], prefix, prefix]
    recording = Recording(backend(name))
    cache = PrefixCache(recording, max_bytes=PLENTY, granularity=1)
    for prompt, known in zip(prompts, (0, 21, 20, 20), strict=True):
        (reused,), logits = run(recording, [prompt], cache, prefill_chunk=8)
        assert reused.reused_tokens == known
        if known == 21:  # chunks end where they would without reuse
            assert recording.computed[-8:-5] == [3, 8, 3]
        (plain,), expected = run(backend(name), [prompt], None, prefill_chunk=8)
        assert plain.token_ids == reused.token_ids
        shorter = expected[len(expected) - 6 :], logits[len(logits) - 6 :]  # those of the answer
        for ours, theirs in zip(*shorter, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FLOAT32)
def test_a_batch_computes_shared_prefixes_once(name: str) -> None:
    prefix = random_ids(32, 4)
    prompts = [[*prefix, *random_ids(length, length)] for length in (3, 5, 1)]
    recording = Recording(backend(name))
    cache = PrefixCache(recording, max_bytes=PLENTY)
    done, _ = run(recording, prompts, cache, prefill_chunk=16, sampling=SAMPLED)
    assert [completion.reused_tokens for completion in done] == [0, 32, 32]
    assert recording.computed[:5] == [16, 16, 3, 5, 1]
    plain, _ = run(backend(name), prompts, None, prefill_chunk=16, sampling=SAMPLED)
    assert [c.token_ids for c in done] == [c.token_ids for c in plain]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_copied_row_is_bitwise_equal(name: str) -> None:
    """Tokens are copied from the middle of a ragged batch, and appended to another row."""
    runtime = backend(name)
    ids = np.array([random_ids(30, 5)])
    source, target = runtime.new_cache(3, 40), runtime.new_cache(2, 40)
    for row, length in enumerate((9, 20, 3)):
        runtime.step(ids[:, :length], source, num_logits=1, row=row)
    for at in range(20, 23):  # the rows are joined, so shorter ones get gaps
        runtime.step(np.repeat(ids[:, at : at + 1], 3, axis=0), source, num_logits=1)
    expected = source.read(1)
    runtime.step(ids[:, :5], target, num_logits=1, row=1)
    first = target.read(1)
    stored = source.export_tokens(1, 5, 23)
    target.load_tokens(1, stored, 17)
    assert target.lengths.tolist() == [0, 22]
    for pair, head, whole in zip(target.read(1), first, expected, strict=True):
        for found, before, wanted in zip(pair, head, whole, strict=True):
            np.testing.assert_array_equal(found[:, :5], before)
            np.testing.assert_array_equal(found[:, 5:], wanted[:, 5:22])
    assert all(tensor.size == 0 for pair in target.read(0) for tensor in pair)
    source.truncate(1, 0)
    runtime.step(ids[:, 7:23], source, num_logits=1, row=1)  # the copy is not a view
    again = runtime.new_cache(1, 40)
    again.load_tokens(0, stored, 18)
    for pair, whole in zip(again.read(0), expected, strict=True):
        for found, wanted in zip(pair, whole, strict=True):
            np.testing.assert_array_equal(found, wanted[:, 5:23])


def test_bfloat16_memory_is_copied_as_it_is() -> None:
    """A bfloat16 cache, as graphs on a GPU have, in host memory."""
    from gemma3_export.bundle import Signature
    from gemma3_export.device import Device
    from gemma3_export.runtimes.onnx.caches import InPlaceCache

    signature = Signature.of(TINY, cache_dtype="bfloat16")
    caches = [InPlaceCache(TINY, signature, Device("cpu"), 2, capacity) for capacity in (12, 9)]
    generator = np.random.default_rng(0)
    for buffer in caches[0].buffers:
        shape = tuple(buffer.shape())
        buffer.update_inplace(generator.integers(0, 2**16, shape).astype(np.uint16))
    caches[0].lengths[:] = 12
    stored = caches[0].export_tokens(1, 2, 10)
    assert stored.size_bytes == 8 * caches[0].kv_bytes_per_token == 8 * 2 * 5 * 2 * 16 * 2
    caches[1].load_tokens(1, stored, 7)
    for one, other in zip(caches[0].buffers, caches[1].buffers, strict=True):
        np.testing.assert_array_equal(one.numpy()[1, :, 2:9], other.numpy()[1, :, :7])
        assert not other.numpy()[0].any()
        assert not other.numpy()[1, :, 7:].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_limit_holds_and_sizes_are_those_of_the_tensors(name: str) -> None:
    runtime = backend(name)
    kv_bytes_per_token = runtime.new_cache(1, 1).kv_bytes_per_token
    cache = PrefixCache(runtime, max_bytes=50 * kv_bytes_per_token + 1, granularity=1)
    generator = np.random.default_rng(0)
    sizes = set()
    for seed in range(12):
        prompt = random_ids(40, seed % 4)[: generator.integers(5, 40)] + random_ids(9, seed)
        generate(runtime, [prompt], GREEDY, max_new_tokens=1, prefix_cache=cache).collect()
        held = sum(
            tensor.nbytes if hasattr(tensor, "nbytes") else tensor.tensor_size_in_bytes()
            for segment in cache._segments()
            for tensor in segment.stored.tensors
        )
        assert held == cache.used_bytes <= cache.max_bytes
        sizes.add(cache.used_bytes)
    assert max(sizes) > 40 * kv_bytes_per_token
    cache.clear()
    assert cache.used_bytes == 0


def random_prompts(generator: np.random.Generator) -> list[list[int]]:
    """Return prompts with shared prefixes, some of them equal."""
    prompts: list[list[int]] = [[2]]
    for _ in range(12):
        known = prompts[generator.integers(len(prompts))]
        kept = known[: generator.integers(1, len(known) + 1)]
        prompts.append([*kept, *generator.integers(8, 12, generator.integers(0, 12)).tolist()][:60])
    return prompts


def common(one: Sequence[int], other: Sequence[int]) -> int:
    ends = min(len(one), len(other))
    return next((at for at in range(ends) if one[at] != other[at]), ends)


def without_measurements(completion: Completion) -> Completion:
    return replace(
        completion,
        time_to_first_token_s=None,
        prefill_s=0.0,
        decode_s=0.0,
        reused_tokens=0,
        drafted_tokens=0,
        accepted_tokens=0,
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence_of_prompts_gives_the_same_results_as_without_a_cache(seed: int) -> None:
    """Batches, chunks, drafts, seeds and cancellation; small caches evict constantly."""
    generator = np.random.default_rng(seed)
    runtime = FakeRuntime()
    room = int(generator.choice([3, 20, 60, 10_000]))
    step = int(generator.choice([0, 1, 4])) or None
    cache = PrefixCache(runtime, max_bytes=8 * room, granularity=step)
    prompts = random_prompts(generator)
    chunk = int(generator.integers(1, 20))
    seen: list[list[int]] = []
    while prompts:
        batch = [prompts.pop() for _ in range(min(len(prompts), int(generator.integers(1, 4))))]
        options: dict[str, Any] = {"max_new_tokens": 5, "prefill_chunk": chunk}
        options["drafter"] = PromptLookup if generator.random() < 0.5 else None
        params = GREEDY if generator.random() < 0.5 else SAMPLED
        plain = generate(FakeRuntime(), batch, params, **options).collect()
        done = generate(runtime, batch, params, **options, prefix_cache=cache).collect()
        assert [*map(without_measurements, done)] == [*map(without_measurements, plain)]
        assert cache.used_bytes <= cache.max_bytes
        for prompt, completion in zip(batch, done, strict=True):
            best = max((common(prompt[:-1], known) for known in seen), default=0)
            multiple = step or chunk
            if room == 10_000:
                known = max((common(prompt[:-1], k) // multiple for k in seen), default=0)
                full = [len(k) // multiple for k in seen]
                assert completion.reused_tokens <= best
                assert completion.reused_tokens == min(known, max(full, default=0)) * multiple
            seen.append(prompt)
        cancelled = generate(
            runtime, batch, params, **options, prefix_cache=cache, cancel=lambda: True
        ).collect()
        assert {completion.finish_reason for completion in cancelled} == {"cancelled"}


def reused(
    runtime: Runtime,
    cache: PrefixCache,
    *prompt: int,
    chunk: int = 512,
    idle_chunk: int | None = None,
) -> int:
    options = {"max_new_tokens": 1, "prefill_chunk": chunk, "idle_prefill_chunk": idle_chunk}
    (done,) = generate(runtime, [prompt], GREEDY, prefix_cache=cache, **options).collect()
    return done.reused_tokens


class TestLimit:
    def test_the_least_recently_used_is_evicted_first(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=8 * 12, granularity=1)
        a, b, c = ([first, 9, 9, 9] for first in (2, 3, 4))
        for prompt in (a, b, c):
            assert reused(runtime, cache, *prompt) == 0
        assert reused(runtime, cache, *a, 5) == 4  # the new token drops b, which is older than a
        assert reused(runtime, cache, *c, 5) == 4
        assert cache.used_bytes == 8 * 10
        assert reused(runtime, cache, *b) == 0

    def test_a_segment_is_kept_while_others_continue_it(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=8 * 12, granularity=1)
        system = [2, 9, 9, 9, 9, 9, 9, 9]
        for question in range(20, 60):
            known = reused(runtime, cache, *system, question, 10)
            assert known == (0 if question == 20 else 8)
        assert reused(runtime, cache, *system, 59, 10) == 9
        assert cache.used_bytes == 8 * 12

    def test_the_beginning_of_a_prompt_that_is_too_large_is_kept(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=8 * 10 + 7, granularity=4)
        prompt = list(range(20, 60))
        assert [reused(runtime, cache, *prompt) for _ in range(2)] == [0, 8]
        assert cache.used_bytes == 8 * 8

    def test_a_limit_below_one_token_keeps_nothing(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=7, granularity=1)
        assert [reused(runtime, cache, 2, 3, 4) for _ in range(2)] == [0, 0]
        assert cache.used_bytes == 0

    def test_shared_tokens_are_stored_once(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=PLENTY, granularity=1)
        for question in range(20, 30):
            reused(runtime, cache, *([2] * 50), question)
        assert cache.used_bytes == 8 * (50 + 10)

    def test_other_chunk_sizes_share_nothing(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=PLENTY)
        prompt = list(range(20, 60))
        assert [reused(runtime, cache, *prompt, chunk=c) for c in (8, 4, 8, 4)] == [0, 0, 32, 36]
        sizes = [(8, 16), (8, 8), (8, 16)]
        found = [reused(runtime, cache, *prompt, chunk=c, idle_chunk=i) for c, i in sizes]
        assert found == [0, 32, 32]

    def test_long_chains_of_growing_prompts_are_found(self) -> None:
        runtime = FakeRuntime()
        cache = PrefixCache(runtime, max_bytes=PLENTY, granularity=1)
        for length in range(1, 128):
            assert reused(runtime, cache, *([9] * length)) == length - 1
        assert cache.used_bytes == 8 * 127

    def test_threads_can_share_a_cache(self) -> None:
        runtime = backend("ort")
        kv_bytes_per_token = runtime.new_cache(1, 1).kv_bytes_per_token
        cache = PrefixCache(runtime, max_bytes=100 * kv_bytes_per_token, granularity=1)
        prompts = [random_ids(30, seed % 3) + random_ids(6, seed) for seed in range(8)]
        options = {"max_new_tokens": 4}
        expected = [run(runtime, [p], None, **options)[0][0].token_ids for p in prompts]
        found: list[tuple[int, bool]] = []

        def work(seed: int) -> None:
            for at in np.random.default_rng(seed).permutation(8).tolist():
                done = generate(
                    runtime,
                    [prompts[at]],
                    GREEDY,
                    **options,
                    stop_token_ids=(),
                    prefix_cache=cache,
                )
                found.append((at, done.collect()[0].token_ids == expected[at]))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 24
        assert all(equal for _, equal in found)
        assert cache.used_bytes <= cache.max_bytes


class TestRefusals:
    def test_another_runtime_of_the_same_bundle_is_rejected_before_any_work(self) -> None:
        cache = PrefixCache(backend("ort"), max_bytes=PLENTY)
        with pytest.raises(InputError, match=r"another runtime \(onnx\).*\(reference\)"):
            generate(backend("reference"), [[2]], GREEDY, max_new_tokens=1, prefix_cache=cache)
        other = OnnxRuntime(exported_bundle("ort"), device="cpu", threads=1)
        with pytest.raises(InputError, match="make a PrefixCache for each loaded model"):
            generate(other, [[2]], GREEDY, max_new_tokens=1, prefix_cache=cache)

    @pytest.mark.parametrize(
        "options", [{"max_bytes": 0}, {"max_bytes": -1}, {"max_bytes": 1, "granularity": 0}]
    )
    def test_invalid_sizes(self, options: dict[str, int]) -> None:
        with pytest.raises(InputError, match=r"of a prefix cache is .*; it must be at least 1"):
            PrefixCache(FakeRuntime(), **options)

    def test_a_cache_that_cannot_share(self) -> None:
        class Lonely(FakeRuntime):
            def new_cache(self, batch_size: int, capacity: int) -> Any:
                cache = super().new_cache(batch_size, capacity)
                hidden = type("Cache", (), {})()
                for name in ("batch_size", "capacity", "lengths", "read", "truncate"):
                    setattr(hidden, name, getattr(cache, name))
                return hidden

        runtime = Lonely()
        cache = PrefixCache(runtime, max_bytes=PLENTY)
        generation = generate(runtime, [[2, 3]], GREEDY, max_new_tokens=1, prefix_cache=cache)
        with pytest.raises(InputError, match="generate without a prefix cache"):
            generation.collect()

    @pytest.mark.parametrize("name", BACKENDS)
    def test_tokens_that_do_not_fit_a_cache(self, name: str) -> None:
        runtime = backend(name)
        source, target = runtime.new_cache(2, 12), runtime.new_cache(1, 8)
        runtime.step(np.array([random_ids(10, 1)]), source, num_logits=1, row=1)
        stored = source.export_tokens(1, 0, 10)
        with pytest.raises(InputError, match="no room for 9 more"):
            target.load_tokens(0, stored, 9)
        for count in (0, -1, 11):
            with pytest.raises(InputError, match=f"cannot load {count} tokens of a segment of 10"):
                target.load_tokens(0, stored, count)
        with pytest.raises(InputError, match="do not fit into a cache of"):
            target.load_tokens(0, replace(stored, layout="something else"), 3)
        for start, stop in ((0, 11), (-1, 3), (4, 4), (5, 4)):
            with pytest.raises(InputError, match="row 1 holds 10 tokens"):
                source.export_tokens(1, start, stop)
        assert target.lengths.tolist() == [0]

    def test_layouts_differ_where_bytes_would_be_misread(self) -> None:
        layouts = [backend(name).new_cache(1, 4).layout for name in BACKENDS]
        assert layouts[0] == "10 tensors of 2 x 16 float32 per token on cpu"
        assert layouts[1] == "10 tensors of 2 x 16 bfloat16 per token on cpu"


class TestCommandLine:
    PROMPTS = (
        "--prompt-ids",
        "2," + "11,12,13,14,15," * 8 + "20",
        "--prompt-ids",
        "2," + "11,12,13,14,15," * 8 + "21,22",
    )

    def run(self, *arguments: object) -> Any:
        return CliRunner().invoke(command_line, ["generate", *map(str, arguments)])

    def reused(self, *arguments: object) -> tuple[list[int], list[list[int]]]:
        import json

        result = self.run(*arguments, "--max-new-tokens", 5, "--json")
        assert result.exit_code == 0, (result.output, result.exception)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        known = [line["timings"]["reused_tokens"] for line in lines]
        assert ("reused" in result.stderr) == any(known)
        return known, [line["token_ids"] for line in lines]

    def test_prompts_with_a_shared_prefix_compute_it_once(self, ort_bundle: Path) -> None:
        on = self.reused(ort_bundle, *self.PROMPTS)
        off = self.reused(ort_bundle, *self.PROMPTS, "--prefix-cache", 0)
        tiny = self.reused(ort_bundle, *self.PROMPTS, "--prefix-cache", "1kB")
        assert [known for known, _ in (on, off, tiny)] == [[0, 32], [0, 0], [0, 0]]
        assert on[1] == off[1] == tiny[1]

    def test_a_system_message_is_shared(self, ort_bundle: Path) -> None:
        chat = ("--chat", "--system", "Be brief and friendly, and answer in rhymes.")
        known, _ = self.reused(ort_bundle, *chat, "--prompt", "What?", "--prompt", "Why not?")
        assert known[0] == 0
        assert known[1] >= 16

    def test_quantized_bundles_reuse_whole_chunks_only(self) -> None:
        bundle = int8_bundle(True).path
        assert self.reused(bundle, *self.PROMPTS)[0] == [0, 0]
        known, tokens = self.reused(bundle, *self.PROMPTS, "--prefill-chunk", 20)
        assert known == [0, 40]
        plain = ("--prefill-chunk", 20, "--prefix-cache", 0)
        assert self.reused(bundle, *self.PROMPTS, *plain) == ([0, 0], tokens)

    @pytest.mark.parametrize("size", ["-1", "lots", "1XB", "", "0.1", "1e3"])
    def test_invalid_cache_sizes(self, ort_bundle: Path, size: str) -> None:
        result = self.run(ort_bundle, *self.PROMPTS, "--prefix-cache", size)
        assert result.exit_code == 2
        assert "Invalid value for '--prefix-cache'" in result.stderr
        assert "give" in result.stderr

    def test_the_longest_prefix_that_two_prompts_share(self) -> None:
        assert shared_length([[1, 2, 3]]) == 0
        assert shared_length([[1, 2, 3, 4], [5], [1, 2, 9], [1, 2, 3, 8], []]) == 3


def test_caches_that_evict_tokens_are_rejected() -> None:
    runtime = OnnxRuntime(
        exported_bundle("ort"), device="cpu", threads=1, sliding_window_cache=True
    )
    with pytest.raises(
        InputError, match=r"needs caches that keep every token.*sliding_window_cache=False"
    ):
        PrefixCache(runtime, max_bytes=1)
