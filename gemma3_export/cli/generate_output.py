"""Print the results of ``generate``: streamed text, or one JSON object per prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import click

from gemma3_export.api.completion_json import calls_to_json, result_to_json
from gemma3_export.cli.generation_options import note_incomplete
from gemma3_export.cli.prompts import Prompt
from gemma3_export.runtimes.generation.generate import Event
from gemma3_export.runtimes.generation.request import Completion, TokenEvent
from gemma3_export.tokenizer import Tokenizer

__all__ = ["Printer", "completion_to_json", "printer_for", "speed_line"]

LABEL_CHARACTERS = 60


class Printer(Protocol):
    """Interface that prints a running generation."""

    def show(self, event: Event) -> None:
        """Print the text that an event adds."""

    def finish(self, completions: Sequence[Completion]) -> None:
        """Print everything not yet shown, including prompts that did not finish."""


def printer_for(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    as_json: bool,
    load_s: float,
    *,
    reads_calls: bool = False,
) -> Printer:
    """Return the printer for ``--json`` or for plain text."""
    if as_json:
        return JsonPrinter(prompts, tokenizer, load_s, reads_calls)
    return TextPrinter(prompts, has_text=tokenizer is not None, load_s=load_s)


@dataclass(slots=True)
class TextPrinter:
    """Printer that streams the text of one prompt at a time, in the order of the prompts.

    Text of later prompts is held back until the earlier ones have finished, so texts never mix.
    Without a tokenizer, token ids are printed instead of text.
    """

    prompts: Sequence[Prompt]
    has_text: bool
    load_s: float
    current: int = 0
    waiting: dict[int, list[str]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    is_labeled: bool = False

    def show(self, event: Event) -> None:
        """Print the text that an event adds, or hold it back."""
        if isinstance(event, TokenEvent):
            text = event.text if self.has_text else f"{event.token_id} "
            self.waiting.setdefault(event.request, []).append(text)
        else:
            self.ended.add(event.request)
        self._advance()

    def finish(self, completions: Sequence[Completion]) -> None:
        """Print all text held back, and the speeds."""
        self.ended.update(range(len(self.prompts)))
        self._advance()
        click.echo(speed_line(completions, self.load_s), err=True)
        note_incomplete(completions)

    def _advance(self) -> None:
        while self.current < len(self.prompts):
            self._write("".join(self.waiting.pop(self.current, [])))
            if self.current not in self.ended:
                return
            self._write("\n")
            self.current, self.is_labeled = self.current + 1, False

    def _write(self, text: str) -> None:
        if text and len(self.prompts) > 1 and not self.is_labeled:
            self.is_labeled = True
            click.echo(f"[{self.current + 1}/{len(self.prompts)}] {self._label()}")
        if text:
            click.echo(text, nl=False)

    def _label(self) -> str:
        prompt = self.prompts[self.current]
        shown = ",".join(map(str, prompt.value)) if prompt.text is None else prompt.text
        shown = " ".join(shown.split())
        cut = LABEL_CHARACTERS
        return shown if len(shown) <= cut else shown[: cut - 3] + "..."


@dataclass(slots=True)
class JsonPrinter:
    """Printer that writes one JSON object per prompt, in the order of the prompts."""

    prompts: Sequence[Prompt]
    tokenizer: Tokenizer | None
    load_s: float
    reads_calls: bool = False
    printed: int = 0
    ended: dict[int, Completion] = field(default_factory=dict)

    def show(self, event: Event) -> None:
        """Print the results of prompts that have finished."""
        if isinstance(event, Completion):
            self.ended[event.request] = event
            self._advance()

    def finish(self, completions: Sequence[Completion]) -> None:
        """Print all remaining results, and the speeds."""
        self.ended |= {completion.request: completion for completion in completions}
        self._advance()
        click.echo(speed_line(completions, self.load_s), err=True)

    def _advance(self) -> None:
        while completion := self.ended.get(self.printed):
            data = completion_to_json(completion, self.prompts[self.printed], self.tokenizer)
            data["timings"]["load_s"] = self.load_s
            if self.reads_calls and self.tokenizer is not None:
                data |= calls_to_json(completion, self.tokenizer)
            # ASCII only, so that the output does not depend on the encoding of a terminal or pipe.
            click.echo(json.dumps(data, ensure_ascii=True, allow_nan=False))
            self.printed += 1


def completion_to_json(
    completion: Completion, prompt: Prompt, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return a completion as JSON data.

    ``seed`` (null if greedy) and ``index`` are enough to reproduce it.
    """
    return {
        "index": completion.request,
        "prompt": prompt.text,
        **result_to_json(completion, tokenizer),
        "timings": {
            "time_to_first_token_s": completion.time_to_first_token_s,
            "prefill_tokens_per_s": completion.prefill_tokens_per_s,
            "decode_tokens_per_s": completion.decode_tokens_per_s,
            "reused_tokens": completion.reused_tokens,
            "drafted_tokens": completion.drafted_tokens,
            "accepted_tokens": completion.accepted_tokens,
        },
    }


def speed_line(completions: Sequence[Completion], load_s: float | None = None) -> str:
    """Return the load time, if given, and the speeds of the whole batch in one line."""
    prompt_tokens = sum(done.prompt_tokens for done in completions if done.tokens)
    reused = sum(done.reused_tokens for done in completions if done.tokens)
    new_tokens = sum(len(done.tokens) for done in completions)
    prefill_s = sum(done.prefill_s for done in completions if done.tokens)
    later_tokens = sum(max(len(done.tokens) - 1, 0) for done in completions)
    decode_s = max(
        (done.decode_s for done in completions), default=0.0
    )  # all rows of the batch run at once
    parts = [] if load_s is None else [f"load {load_s:.1f} s"]
    parts.append(f"prompt {prompt_tokens} tokens")
    if reused:
        parts[-1] += f" ({reused} reused)"
    if prefill_s:
        parts[-1] += f" at {(prompt_tokens - reused) / prefill_s:,.0f}/s"
    parts.append(f"generated {new_tokens} tokens")
    if decode_s:
        parts[-1] += f" at {later_tokens / decode_s:,.1f}/s"
    if drafted := sum(done.drafted_tokens for done in completions):
        accepted = sum(done.accepted_tokens for done in completions)
        parts.append(f"{accepted} of {drafted} drafted tokens were accepted")
    return ", ".join(parts)
