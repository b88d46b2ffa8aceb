"""Define the command ``gemma3-export generate``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma3_export.cli.generation_options import (
    CHAT_MAX_NEW_TOKENS,
    OpeningRequest,
    note_unused_seed,
    note_variant_of,
    opening_options,
    sampling_options,
)
from gemma3_export.cli.options import (
    PATH,
    TEXT_PATH,
    WHOLE,
    cache_size,
    integer,
    is_given,
    is_terminal,
)
from gemma3_export.limits import PREFILL_CHUNK

if TYPE_CHECKING:
    from gemma3_export.cli.generate_output import Printer
    from gemma3_export.runtimes.generation.generate import Generation

__all__ = ["generate"]

EPILOG = """\b
Examples:
  gemma3-export generate gemma-3-270m --prompt "The sea is"
  gemma3-export generate gemma-3-270m-it --chat --prompt "Who wrote Faust?" --temperature 0.7
  gemma3-export generate DIR --prompt "One" --prompt "Two" --seed 7 --top-k 64 --json
  gemma3-export generate functiongemma --chat --tools tools.json --prompt "Weather?" --json
  gemma3-export generate run --prompt "Once"          # weights that are not exported
  gemma3-export generate DIR --chat --prompt "Invent a user." --json-schema user.json
  cat letter.txt | gemma3-export generate DIR --prompt - --stop "Yours"
"""


@click.command(epilog=EPILOG)
@click.argument("bundle_path", metavar="DIR", type=PATH)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Text to continue; repeatable; - reads stdin.",
)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=TEXT_PATH,
    help="UTF-8 file that holds one prompt; repeatable.",
)
@click.option(
    "--prompt-ids",
    "id_lists",
    multiple=True,
    metavar="IDS",
    help="Prompt as token ids, such as 2,651,4864; repeatable.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Treat each prompt as a user message, in the bundle's chat template.",
)
@click.option("--system", metavar="TEXT", help="System message (requires --chat).")
@click.option(
    "--tools",
    "tools_path",
    type=TEXT_PATH,
    metavar="FILE",
    help="JSON list of schemas of the functions that the model may call (requires --chat).",
)
@click.option(
    "--tool-choice",
    metavar="CHOICE",
    help="Constrain calls to the schemas of --tools: auto, required, none or a function's name.",
)
@click.option(
    "--chat-template",
    metavar="NAME",
    help="Which of the bundle's chat templates to use (requires --chat).",
)
@click.option(
    "--literal",
    is_flag=True,
    help="Encode control tokens spelled out in a prompt as plain text, as --chat always does.",
)
@sampling_options
@click.option(
    "--prompt-lookup",
    type=integer(0),
    metavar="N",
    help="Draft up to N tokens by looking up what followed the same words before; 0 is off.  "
    "[default: 16; 0 for quantized bundles and on CUDA]",
)
@click.option(
    "--draft-model",
    "draft_path",
    type=PATH,
    metavar="DIR",
    help="Draft with this smaller bundle instead.",
)
@click.option(
    "--prefix-cache",
    "prefix_cache_bytes",
    type=cache_size,
    default="256MB",
    show_default=True,
    metavar="SIZE",
    help="Memory for prefixes that prompts share, which are computed once; 0 is off.",
)
@click.option(
    "--prefill-chunk",
    type=integer(),
    default=PREFILL_CHUNK,
    show_default=True,
    metavar="N",
    help="Prompt tokens to compute per step. Quantized bundles and CUDA reuse whole chunks only.",
)
@opening_options
@click.option(
    "--warm-up/--no-warm-up",
    default=False,
    show_default=True,
    help="Run a few steps before the first prompt, which then starts without delay; useful in "
    "services.",
)
@click.option(
    "--logprobs",
    type=WHOLE,
    metavar="N",
    help="With --json: report the N most likely tokens at each position.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per prompt, one per line."
)
def generate(
    bundle_path: Path,
    prompts: tuple[str, ...],
    prompt_files: tuple[Path, ...],
    id_lists: tuple[str, ...],
    chat: bool,
    system: str | None,
    tools_path: Path | None,
    tool_choice: str | None,
    chat_template: str | None,
    literal: bool,
    prompt_lookup: int | None,
    draft_path: Path | None,
    prefix_cache_bytes: int,
    prefill_chunk: int,
    opening: OpeningRequest,
    warm_up: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue prompts with a bundle. Greedy unless a temperature or a filter is given.

    DIR may also be weights: a trained run, a Hugging Face folder, a GGUF or a PyTorch file, which
    run in PyTorch. Without a prompt, a terminal becomes a conversation, as with `chat`.

    Text streams to stdout as it is generated; speeds go to stderr. Several prompts run as one
    batch, and their texts are printed in order. Ctrl-C ends the generation and keeps the text so
    far.
    """
    converses = not (prompts or prompt_files or id_lists)
    if converses and (as_json or not is_terminal()):
        raise click.UsageError("no prompt; give --prompt TEXT, --prompt-file or --prompt-ids")
    if converses and tools_path is not None:
        raise click.UsageError("--tools needs a prompt: a conversation here cannot answer calls")
    for option, value in (
        ("--system", system),
        ("--tools", tools_path),
        ("--chat-template", chat_template),
    ):
        if value is not None and not (chat or converses):
            raise click.UsageError(f"{option} needs --chat")
    if tool_choice is not None and tools_path is None:
        raise click.UsageError("--tool-choice needs --tools")
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")

    from gemma3_export.api.options import GenerateOptions
    from gemma3_export.cli.generate_output import printer_for
    from gemma3_export.cli.prompts import read_prompt, read_prompt_file, read_tools, to_prompts

    tools = None if tools_path is None else read_tools(tools_path)
    options = GenerateOptions(
        allow_control_tokens=not literal,
        tools=tools,
        tool_choice=tool_choice,
        chat_template=chat_template,
        prompt_lookup=prompt_lookup,
        draft_model=draft_path,
        prefix_cache_bytes=prefix_cache_bytes,
        prefill_chunk=prefill_chunk,
        **sampling,
    )
    model = opening.open(bundle_path, warm_up=warm_up)
    if converses:
        from gemma3_export.cli.conversation import Conversation

        if not is_given("max_new_tokens"):
            options = replace(options, max_new_tokens=CHAT_MAX_NEW_TOKENS)
        conversation = Conversation(model.chat(system, options), system)
        note_variant_of(model)
        conversation.run()
        return
    texts = [*map(read_prompt, prompts), *map(read_prompt_file, prompt_files)]
    asked = to_prompts(model.tokenizer, texts, id_lists, chat=chat, system=system, tools=tools)
    started = time.perf_counter()
    generation = model.start([prompt.value for prompt in asked], options)
    load_s = time.perf_counter() - started
    note_unused_seed(options.seed, is_greedy=options.is_greedy)  # a rejected prompt is one line
    note_variant_of(model)
    printer = printer_for(asked, model.tokenizer, as_json, load_s, reads_calls=tools is not None)
    _print_generation(generation, printer)


def _print_generation(generation: Generation, printer: Printer) -> None:
    """Print events as they arrive; after an interruption, print the results so far."""
    try:
        for event in generation:
            printer.show(event)
    except KeyboardInterrupt:
        printer.finish(generation.completions)
        raise
    printer.finish(generation.completions)
