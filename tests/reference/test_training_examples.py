"""Training on examples: what is learned of them, in which rows, and with which loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma3_export.config import load_config
from gemma3_export.errors import InputError
from gemma3_export.reference.training.distributed import ProcessGroup
from gemma3_export.reference.training.documents import LocalFiles
from gemma3_export.reference.training.example_batches import (
    PADDING,
    ExampleSampler,
    pack_examples,
)
from gemma3_export.reference.training.initialization import config_for_data, model_from_config
from gemma3_export.reference.training.loss import LossModule
from gemma3_export.reference.training.metrics import read_metrics_log
from gemma3_export.reference.training.optimizer import learning_rate
from gemma3_export.reference.training.preparation import prepare_tokens
from gemma3_export.reference.training.runs import read_run_record, resume_training, train
from gemma3_export.reference.training.token_data import (
    BEGINS_DOCUMENT,
    IGNORED_LABEL,
    open_token_data,
)
from gemma3_export.reference.training.trainer import Trainer
from gemma3_export.tokenizer import load_tokenizer
from tests.support.chat_templates import CHATML, write_tokenizer
from tests.support.command_line import run, run_ok
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer
from tests.support.token_folders import (
    quick_options,
    random_examples,
    random_tokens,
    small_config,
    write_config,
    write_examples,
    write_tokens,
)
from tests.support.transformers_peer import transformers_peer

Example = tuple[list[int], list[int]]
CONFIG = small_config(initializer_range=0.3)  # so that the losses of tokens differ
ALONE = ProcessGroup(rank=0, world_size=1, device=torch.device("cpu"))


def arrays(examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([np.array(found, np.uint16) for found, _ in examples])
    marks = np.concatenate(
        [np.array([BEGINS_DOCUMENT | m[0], *m[1:]], np.uint8) for _, m in examples]
    )
    return ids, marks


def sampler_of(examples: list[Example], **changes: Any) -> ExampleSampler:
    given: dict[str, Any] = {"context_length": 16, "batch_size": 3, "seed": 5, "stream": 0}
    return ExampleSampler(*arrays(examples), **{**given, **changes})


def trainer_on(folder: Path, examples: dict[str, list[Example]], **options: Any) -> Trainer:
    data = open_token_data(write_examples(folder, examples))
    model = model_from_config(CONFIG, seed=3)
    return Trainer(quick_options(**options), data, model, folder, ALONE, lambda line: None)


# Rows


@settings(max_examples=100, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=50), min_size=1, max_size=12),
    context_length=st.integers(1, 20),
)
def test_every_learned_token_is_one_label_with_its_own_document_before_it(
    masks: list[list[bool]], context_length: int
) -> None:
    tokens, begins = 0, []
    examples = []
    for mask in masks:
        begins.append(tokens)
        examples.append((list(range(tokens, tokens + len(mask))), [int(m) for m in mask]))
        tokens += len(mask)
    ids, marks = arrays(examples)
    document_of = np.searchsorted(begins, np.arange(tokens), side="right") - 1
    wanted = sorted(
        token for found, mask in examples for token, m in zip(found[1:], mask[1:], strict=True) if m
    )
    if not wanted:
        with pytest.raises(InputError, match="no token of the examples is to be learned"):
            ExampleSampler(ids, marks, context_length=4, batch_size=1, seed=0, stream=0)
        return
    sampler = ExampleSampler(
        ids, marks, context_length=context_length, batch_size=2, seed=1, stream=0
    )
    found = []
    for index in range(sampler.num_batches(1)):
        batch = sampler.batch(index, wraps=False)
        assert batch.documents is not None
        for inputs, labels, documents in zip(*(part.numpy() for part in batch), strict=True):
            used = documents != PADDING
            for place in np.flatnonzero(labels != IGNORED_LABEL):
                label, seen = labels[place], np.flatnonzero(documents == documents[place])
                seen = inputs[seen[seen <= place]]
                assert used[place]
                assert seen[-1] == label - 1
                assert (document_of[seen] == document_of[label]).all()
                first = begins[document_of[label]]
                # All of its document, or at least half of the context.
                assert seen[0] == first or len(seen) >= context_length // 2 + context_length % 2
                assert (np.diff(seen) == 1).all()
                found.append(int(label))
    assert sorted(found) == wanted


def test_short_examples_share_rows_and_long_ones_are_counted() -> None:
    examples = [([2] * size, [1] * size) for size in (5, 6, 6, 40, 3, 3, 17)]
    _, marks = arrays(examples)
    rows = pack_examples(marks, 16)
    assert rows.split_documents == 1
    assert rows.spans.tolist() == [
        [0, 17, 1],
        [17, 34, 18],
        [25, 42, 34],
        [33, 50, 42],
        [40, 57, 50],
        [57, 63, 58],
        [63, 80, 64],
    ]


def test_each_row_is_drawn_once_per_epoch_in_another_order() -> None:
    sampler = sampler_of(random_examples(40), batch_size=1)
    count = len(sampler.rows.spans)
    epochs = [
        [sampler.batch(index).input_ids.tolist() for index in range(start, start + count)]
        for start in (0, count)
    ]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    other = sampler_of(random_examples(40), batch_size=1, stream=1)
    assert [other.batch(index).input_ids.tolist() for index in range(count)] != epochs[0]


def test_processes_take_rows_of_one_global_batch() -> None:
    examples = random_examples(40)
    both, half = sampler_of(examples, batch_size=6), sampler_of(examples)
    parts = [half.batch(5, rank=rank, world_size=2) for rank in range(2)]
    for whole, pieces in zip(both.batch(5), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


# Loss


def peer_loss(peer: Any, examples: list[Example]) -> torch.Tensor:
    """Return the mean loss of transformers over the learned tokens, one example at a time."""
    total, count = torch.zeros(()), 0
    for ids, learned in examples:
        logits = peer(input_ids=torch.tensor([ids])).logits[0, :-1]
        labels = torch.tensor(ids[1:])
        labels[torch.tensor(learned[1:]) == 0] = IGNORED_LABEL
        total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        count += sum(learned[1:])
    return total / count


@pytest.mark.parametrize(
    ("batch_size", "accumulation"), [(12, 1), (4, 3), (1, 12)], ids=["1 x 12", "3 x 4", "12 x 1"]
)
def test_loss_and_gradients_of_a_step_equal_those_of_transformers_on_single_examples(
    batch_size: int, accumulation: int, tmp_path: Path
) -> None:
    examples = random_examples(20, seed=5, longest=12)
    trainer = trainer_on(
        tmp_path,
        {"train": examples},
        batch_size=batch_size,
        accumulation=accumulation,
        context_length=16,
        clip_norm=0,
    )
    rows = len(trainer.train_sampler.rows.spans)  # type: ignore[union-attr]
    assert rows == 12, "one step is to be one epoch"
    weights = {name: value.clone() for name, value in trainer.module.model.state_dict().items()}
    peer = transformers_peer(CONFIG, weights)
    expected = peer_loss(peer, examples)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in peer.parameters() if p.grad is not None]).norm()
    loss, found_norm = trainer.update()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert found_norm == pytest.approx(norm.item(), rel=1e-4)
    assert trainer.state.tokens == sum(len(ids) for ids, _ in examples) - rows


def test_the_mean_of_the_micro_batches_means_would_be_another_loss(tmp_path: Path) -> None:
    """The trap that the tests above are for: micro-batches have different numbers of labels."""
    trainer = trainer_on(
        tmp_path, {"train": random_examples(20, seed=5, longest=12)}, batch_size=1, accumulation=12
    )
    batches = [trainer._batch(trainer.train_sampler, index) for index in range(12)]
    with torch.no_grad():
        means = torch.stack([trainer.module(*batch) for batch in batches])
    assert abs(means.mean().item() - trainer.update()[0]) > 0.1


def test_no_token_sees_another_example_or_padding() -> None:
    torch.manual_seed(0)
    model = model_from_config(CONFIG, seed=3)
    module = LossModule(
        model, compute_dtype=torch.float32, loss_chunk_tokens=7, gradient_checkpointing=False
    )
    examples = random_examples(2, seed=8, longest=7)
    (row,) = [sampler_of(examples, batch_size=1).batch(0)]
    alone = [sampler_of([example], batch_size=1).batch(0) for example in examples]
    one = torch.ones(())
    together = module(*row, one)
    assert together.item() == pytest.approx(
        sum(module(*batch, one).item() for batch in alone), rel=1e-5
    )
    changed = row.input_ids.clone()
    changed[0, : len(examples[0][0])] = 7
    assert module(changed, row.labels, row.documents, one).item() != together.item()
    second = row.labels.clone()
    second[0, : len(examples[0][0])] = IGNORED_LABEL
    assert torch.equal(
        module(changed, second, row.documents, one),
        module(row.input_ids, second, row.documents, one),
    )


def test_validation_loss_counts_each_learned_token_once(tmp_path: Path) -> None:
    held = random_examples(7, seed=2, longest=12)
    trainer = trainer_on(
        tmp_path,
        {"train": random_examples(9), "validation": held},
        batch_size=2,
        eval_batches=50,
        context_length=16,
    )
    weights = {name: value.clone() for name, value in trainer.module.model.state_dict().items()}
    expected = peer_loss(transformers_peer(CONFIG, weights), held)
    assert trainer.evaluate() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.evaluate() == trainer.evaluate()


def test_only_the_answers_are_learned(tmp_path: Path) -> None:
    """The prompts are noise that could be learned by heart, and the answers follow a rule."""
    generator = np.random.default_rng(0)
    examples = []
    for _ in range(12):
        first = int(generator.integers(4, 20))
        noise = generator.integers(4, 20, 6).tolist()
        examples.append(([2, *noise, first, first, first, 1], [0] * 8 + [1] * 3))
    trainer = trainer_on(
        tmp_path, {"train": examples}, steps=60, batch_size=6, learning_rate=1e-2, warmup_steps=5
    )
    before = peer_loss_on_noise(trainer, examples)
    losses = [trainer.update()[0] for _ in range(60)]
    assert losses[-1] < 0.3 < 2 < losses[0]
    assert peer_loss_on_noise(trainer, examples) > before - 0.1


def peer_loss_on_noise(trainer: Trainer, examples: list[Example]) -> float:
    with torch.no_grad():
        logits = trainer.module.model(torch.tensor([ids for ids, _ in examples])).logits[:, :6]
    labels = torch.tensor([ids[1:7] for ids, _ in examples])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


# Runs


def train_examples(folder: Path, run: Path, lines: list[str], **changes: Any) -> Any:
    return train(
        folder / "tokens",
        run,
        quick_options(**changes),
        config_path=folder / "config.json",
        report=lines.append,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    examples = {"train": random_examples(60), "validation": random_examples(9, seed=1)}
    write_examples(path / "tokens", examples)
    write_config(path / "config.json")
    return path


def test_train_reports_how_many_tokens_are_answers(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train_examples(folder, tmp_path / "run", lines, steps=2)
    meta = open_token_data(folder / "tokens").meta
    assert meta.learned_tokens is not None
    learned, total = meta.learned_tokens["train"], meta.tokens["train"]
    assert lines[0].startswith(
        f"data: {learned:,} of {total:,} tokens are answers ({learned / total:.0%}), in "
    )
    assert "examples are longer than --context-length 16" in lines[1]


def test_a_resumed_run_on_examples_equals_an_uninterrupted_one_bit_for_bit(
    folder: Path, tmp_path: Path
) -> None:
    train_examples(folder, tmp_path / "whole", [])
    train_examples(folder, tmp_path / "parts", [])
    for name in ("step-00000008.pt", "step-00000008.json"):
        (tmp_path / "parts" / "checkpoints" / name).unlink()
    resume_training(tmp_path / "parts", report=lambda line: None)
    for name in ("log.csv", "model.safetensors"):
        one, other = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        if name == "log.csv":  # without the speed
            assert [row.split(b",")[:6] for row in one.splitlines()] == [
                row.split(b",")[:6] for row in other.splitlines()
            ]
        else:
            assert one == other


def test_the_run_continues_on_a_longer_schedule(folder: Path, tmp_path: Path) -> None:
    run, lines = tmp_path / "run", []
    train_examples(folder, run, [])
    resume_training(run, report=lines.append)
    assert f"all 8 steps are done; to go on: gemma3-export train --resume {run} --steps MORE" in (
        lines
    )
    with pytest.raises(InputError, match="has already made 8 steps; give --steps more"):
        resume_training(run, steps=8, report=lines.append)

    lines.clear()
    result = resume_training(run, steps=12, report=lines.append)
    assert result.state.step == 12
    (line,) = [line for line in lines if line.startswith("going on to step 12 instead of 8")]
    rate = learning_rate(8, quick_options(steps=12))
    assert f"the learning rate is {rate:.2e} now" in line
    assert [row.step for row in read_metrics_log(run)] == list(range(1, 13))
    assert [row.learning_rate for row in read_metrics_log(run)[8:]] == [
        learning_rate(step, quick_options(steps=12)) for step in range(8, 12)
    ]
    record = read_run_record(run)
    assert record.options["steps"] == 12
    assert record.extensions == [{"after_step": 8, "from": 8, "to": 12}]
    assert record.result is not None
    assert record.result["steps"] == 12
    # From then on it is a run of 12 steps.
    for name in ("step-00000012.pt", "step-00000012.json"):
        (run / "checkpoints" / name).unlink()
    before = (run / "model.safetensors").read_bytes()
    assert resume_training(run, report=lambda line: None).state.step == 12
    assert (run / "model.safetensors").read_bytes() == before


def test_the_command_resumes_with_another_number_of_steps_only(
    folder: Path, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    train_examples(folder, run_folder, [], steps=2)
    result = run("train", "--resume", run_folder, "--steps", 3, "--seed", 4)
    assert result.exit_code == 2
    assert "--resume takes its options from the run; omit all but --steps" in result.stderr
    output = run_ok("train", "--resume", run_folder, "--steps", 3).stdout
    assert "going on to step 3 instead of 2" in output
    assert read_run_record(run_folder).options["steps"] == 3


def test_a_checkpoint_of_before_tokens_were_counted_resumes_with_their_number(
    tmp_path: Path,
) -> None:
    write_tokens(tmp_path / "tokens", random_tokens(600))
    data = open_token_data(tmp_path / "tokens")
    model = model_from_config(CONFIG, seed=3)
    trainer = Trainer(quick_options(), data, model, tmp_path, ALONE, lambda line: None)
    trainer.update()
    trainer.save()
    state = torch.load(tmp_path / "checkpoints" / "step-00000001.pt", weights_only=True)
    assert state["progress"].pop("tokens") == 4 * 16
    trainer.restore(state)
    assert trainer.state.tokens == 4 * 16


def test_a_model_from_scratch_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    tokenizer = tiny_gemma_tokenizer(400)
    row = {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    (tmp_path / "text.txt").write_text("text")
    stops = {}
    for name in ("chats.jsonl", "text.txt"):
        out = tmp_path / f"{name}-tokens"
        prepare_tokens(LocalFiles([tmp_path / name]), tokenizer, out, validation_fraction=0)
        stops[name] = config_for_data(open_token_data(out), "demo", None).eos_token_id
    assert stops == {"chats.jsonl": (1, tokenizer.token_id("<end_of_turn>")), "text.txt": (1,)}


def test_the_run_keeps_the_chat_template_and_the_loss_of_the_data(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", "chatml")
    tokenizer = load_tokenizer(folder)
    row = {"messages": [{"role": r, "content": r * 3} for r in ("user", "assistant")]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 30)
    source = LocalFiles([tmp_path / "chats.jsonl"])
    prepare_tokens(source, tokenizer, tmp_path / "tokens", loss_on="all")
    lines: list[str] = []
    options = quick_options(steps=1)
    train(tmp_path / "tokens", tmp_path / "run", options, size="demo", report=lines.append)
    for kept in (tmp_path / "tokens", tmp_path / "run"):
        assert load_tokenizer(kept).settings.templates == {"default": CHATML}
    assert load_config(tmp_path / "run").eos_token_id == (1, tokenizer.token_id("<|im_end|>"))
    assert " tokens are learned (" in lines[0]
    record = json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["data"]["loss_on"] == "all"
    assert resume_training(tmp_path / "run", report=lines.append).state.step == 1
