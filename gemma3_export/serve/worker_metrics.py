"""The metrics of all workers of a server, from whichever of them is asked.

Each worker answers on a Unix socket with its own metrics, in which the label ``worker`` has its
number. The worker that a client asks for ``/metrics`` asks the others.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric

from gemma3_export.api.engine import Engine
from gemma3_export.serve.metrics import ServerMetrics, metrics_text

__all__ = ["WorkerMetrics"]

ANSWER_S = 2.0  # for a worker that starts, ends or hangs


class WorkerMetrics(ServerMetrics):
    """The metrics of one worker, which can ask the others for theirs.

    Args:
        engine: its totals are read when the metrics are.
        model_name: a label of every metric.
        folder: holds the sockets; only this user can enter it.
        number: of this worker.
        count: of workers.
    """

    def __init__(
        self, engine: Engine, model_name: str, *, folder: Path, number: int, count: int
    ) -> None:
        super().__init__(engine, {"model_name": model_name, "worker": str(number)})
        self._model_name, self._folder = model_name, folder
        self._number, self._count = number, count

    async def listen(self) -> None:
        """Begin to answer the other workers."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                writer.write(_encoded(self.families()))
                await writer.drain()
            writer.close()

        self._server = await asyncio.start_unix_server(answer, self._socket(self._number))

    async def text(self) -> bytes:
        """Return the metrics of all workers that answer, and which of them do."""
        found = await asyncio.gather(*map(self._of, range(self._count)))
        up = GaugeMetricFamily(
            "gemma3_export_worker_up",
            "Whether a worker has answered with its metrics.",
            labels=["model_name", "worker"],
        )
        for number, families in enumerate(found):
            up.add_metric([self._model_name, str(number)], families is not None)
        return metrics_text([up, *(each for families in found for each in families or ())])

    async def _of(self, number: int) -> list[Metric] | None:
        """Return the metrics of a worker; None if it does not answer."""
        if number == self._number:
            return self.families()
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(number))
                try:
                    return _decoded(await reader.read())
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):  # cut off in the middle
            return None

    def _socket(self, number: int) -> str:
        return str(self._folder / f"{number}.sock")


def _encoded(families: list[Metric]) -> bytes:
    return json.dumps(
        [
            {
                "name": each.name,
                "documentation": each.documentation,
                "typ": each.type,
                "samples": [(sample.name, sample.labels, sample.value) for sample in each.samples],
            }
            for each in families
        ]
    ).encode()


def _decoded(data: bytes) -> list[Metric]:
    found = []
    for each in json.loads(data):
        samples = each.pop("samples")
        family = Metric(**each)
        for name, labels, value in samples:
            family.add_sample(name, labels, value)
        found.append(family)
    return found
