"""The figures of `sapwood bench gpu` as bars, with a panel for each model and measurement."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from sapwood.bench.gpu.measure import Report


def plot_figures(report: Report, path: Path) -> None:
    panels = dict.fromkeys((one.model, one.what) for one in report.figures)
    drawing = Drawing(figsize=(4.0 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(drawing)
    for place, (model, what) in enumerate(panels, start=1):
        axis = drawing.add_subplot(1, len(panels), place)
        shown = [one for one in report.figures if (one.model, one.what) == (model, what)]
        colours = ["tab:grey" if "transformers" in one.variant else "tab:green" for one in shown]
        axis.bar(range(len(shown)), [one.value for one in shown], color=colours)
        axis.set_xticks(range(len(shown)), [one.variant for one in shown], rotation=30, ha="right")
        axis.set_ylabel(f"{what} ({shown[0].unit})")
        axis.set_title(model)
    drawing.suptitle(report.device)
    drawing.savefig(path, dpi=110)
