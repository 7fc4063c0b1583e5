"""The Grafana dashboard asks only for metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sapwood.observe.engine_facts import EngineConstants, PoolConstants
from sapwood.observe.metrics import Metrics
from sapwood.schema.output import AdapterUse, EngineStatus, PoolUse

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "dashboards" / "sapwood.json").read_text("utf-8"))
ADDED_BY_PROMETHEUS = {"instance", "job"}
POOLS = ("full", "window_8", "state")


def known_metrics() -> dict[str, set[str]]:
    """Name -> labels, of everything that a server shows."""
    metrics = Metrics("m")
    metrics.http_requests["/", "GET"] = metrics.http_responses["/", "GET", "200"] = 1
    numbers = {name: 0 for name in EngineStatus.__struct_fields__ if name.startswith("num_")}
    pools = (PoolUse(num_free=0, num_leased=0),) * len(POOLS)
    adapters = AdapterUse(
        num_used=0, num_slots=1, bytes_used=0, max_bytes=1, num_loaded=0, num_evictions=0
    )
    metrics.engine.facts = EngineStatus(call_id="", **numbers, pools=pools, adapters=adapters)
    metrics.engine.constants = EngineConstants(
        page_size=16,
        max_total_tokens=16,
        max_running_requests=1,
        startup_s=0.0,
        load_s=0.0,
        weight_bytes=0,
        pools=tuple(PoolConstants(name=name, size=1, unit_bytes=1) for name in POOLS),
    )
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def expressions(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("expr", "definition"):
                yield value
            yield from expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from expressions(item)


def test_every_metric_and_label_exists():
    known = known_metrics()
    found = list(expressions(DASHBOARD))
    assert len(found) > 30
    for expression in found:
        names = re.findall(r"sapwood:\w+", expression)
        assert names, expression
        for name, selector in re.findall(r"(sapwood:\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, name
            labels = set(re.findall(r"(\w+)=~?\"", selector))
            assert labels <= known[name] | ADDED_BY_PROMETHEUS, (name, labels)
        for label in re.findall(r"by \((\w+)\)", expression):
            assert label in known[names[0]], (names[0], label)


def test_panels_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_the_documentation_names_every_metric():
    page = (ROOT / "docs" / "observability.md").read_text("utf-8")
    bases = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in known_metrics()}
    missing = [
        name.removeprefix("sapwood:")
        for name in sorted(bases)
        if f"`{name.removeprefix('sapwood:')}" not in page
    ]
    assert missing == []
