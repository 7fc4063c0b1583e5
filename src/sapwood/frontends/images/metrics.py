"""What /metrics says of an engine that draws."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sapwood.schema.painting import PainterStatus

_GAUGES = {
    "num_waiting": "Pictures that wait or are prepared.",
    "num_denoising": "Pictures between their first step and their last.",
    "num_decoding": "Pictures whose latents become pixels.",
    "text_bytes": "Bytes of vectors of prompts that are kept.",
    "resident_bytes": "Memory of the engine's process.",
    "peak_bytes": "The most memory that the engine's process has had.",
}
_COUNTERS = {
    "num_steps": "Calls of the transformer.",
    "num_rows": "Passes in all of them.",
    "num_trajectory_steps": "Steps of all pictures; several share a call.",
    "num_text_hits": "Prompts whose vectors were kept.",
    "num_text_misses": "Prompts that were encoded.",
}
_ENDS = ("done", "failed", "aborted", "late", "refused")


class _Figures(Collector):
    def __init__(self, status: PainterStatus, model: str) -> None:
        self._status = status
        self._model = model

    def collect(self) -> Iterator[Metric]:
        kinds = ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily))
        for table, kind in kinds:
            for name, text in table.items():
                family = kind(f"sapwood:painting_{name}", text, labels=["model_name"])
                family.add_metric([self._model], getattr(self._status, name))
                yield family
        ends = CounterMetricFamily(
            "sapwood:painting_pictures", "Pictures by how they ended.", labels=["model_name", "end"]
        )
        for end in _ENDS:
            ends.add_metric([self._model, end], getattr(self._status, f"num_{end}"))
        yield ends


def metrics_text(status: PainterStatus, model: str) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Figures(status, model))
    return generate_latest(registry)
