"""The figures of `sapwood bench gpu` as bars, with a panel for each model and measurement."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from sapwood.bench.gpu.measure import Report


def plot_figures(report: Report, path: Path) -> None:
    panels = dict.fromkeys((figure.model, figure.what) for figure in report.figures)
    drawing = Drawing(figsize=(4.0 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(drawing)
    for place, (model, what) in enumerate(panels, start=1):
        axis = drawing.add_subplot(1, len(panels), place)
        shown = [
            figure for figure in report.figures if (figure.model, figure.what) == (model, what)
        ]
        colours = [
            "tab:grey" if "transformers" in figure.variant else "tab:green" for figure in shown
        ]
        axis.bar(range(len(shown)), [figure.value for figure in shown], color=colours)
        axis.set_xticks(
            range(len(shown)), [figure.variant for figure in shown], rotation=30, ha="right"
        )
        axis.set_ylabel(f"{what} ({shown[0].unit})")
        axis.set_title(model)
    drawing.suptitle(report.device)
    drawing.savefig(path, dpi=110)
