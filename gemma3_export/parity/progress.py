"""A progress bar on stderr, silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gemma3_export.parity.options import Progress

__all__ = ["terminal_progress"]


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Yield a callback for ``verify(progress=...)`` that draws one bar for the whole check."""
    from tqdm import tqdm

    with tqdm(
        total=1,
        file=sys.stderr,
        disable=None,
        leave=False,
        bar_format="{desc} |{bar:24}| {elapsed}",
    ) as bar:

        def report(stage: str, done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.set_description_str(f"{stage:<32.32}", refresh=True)

        yield report
