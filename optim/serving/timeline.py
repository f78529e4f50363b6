"""The timeline of a finished job: the machine's curves above bars of the stages, as a plotly figure."""

import re
from typing import TYPE_CHECKING, Any

from latentsync.errors import UserError
from optim.serving.job import Job

if TYPE_CHECKING:  # plotly takes a while to load
    from plotly.graph_objects import Figure

# Read on light and on dark; as in assets/page/plots.js.
COLOURS = ("#0d9488", "#b45309", "#4f6bd8", "#a2487f", "#5f8a1d", "#8a6d5c", "#0e7fa8", "#8553c9")
INK, GRID = "#6b7a83", "rgba(128, 140, 148, 0.25)"


def looks_of(name: str, i: int) -> dict[str, Any]:
    """The looks of a curve, the i-th one.

    Each of several GPUs has a colour; its memory has the same, dotted, and the legend shows one of these.
    """
    gpu = re.fullmatch(r"GPU (\d+)( memory)?", name)
    number, memory = (int(gpu[1]), gpu[2] is not None) if gpu else (i, False)
    line = {"color": COLOURS[number % len(COLOURS)], "width": 1.6, "dash": "dot" if memory else "solid"}
    return {"line": line, "showlegend": not memory or number == 0}


def timeline_figure(job: Job) -> "Figure":
    """Use of the machine in percent over the seconds of a job, and when each stage began and ended.

    Raises UserError for a job without a timeline, as one that has not finished.
    """
    from plotly.graph_objects import Bar, Figure, Scatter

    if not job.timeline or not job.report:
        raise UserError("There is no timeline of this job: only a finished one has it.")
    stages, curves = job.timeline["stages"], job.timeline.get("curves", {})
    figure = Figure()
    for i, (name, values) in enumerate(curves.items()):
        looks = looks_of(name, i)
        figure.add_trace(Scatter(x=job.timeline["time"], y=values, name=name, mode="lines", **looks))
    for i, (stage, (start, end)) in enumerate(stages.items()):
        figure.add_trace(
            Bar(
                x=[end - start], base=[start], y=[stage], orientation="h", yaxis="y2", width=0.6, showlegend=False,
                name=stage, marker={"color": COLOURS[(i + len(curves)) % len(COLOURS)]},
                hovertemplate=f"{stage}: {start:.1f} s to {end:.1f} s<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        height=300, margin={"l": 64, "r": 12, "t": 30, "b": 36}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"color": INK, "size": 12}, bargap=0.2, hovermode="x",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={"ticksuffix": " s", "gridcolor": GRID, "zeroline": False, "anchor": "y2"},
        yaxis={"domain": [0.42, 1], "range": [0, 102], "ticksuffix": " %", "gridcolor": GRID, "zeroline": False},
        yaxis2={"domain": [0, 0.32], "autorange": "reversed", "showgrid": False, "zeroline": False},
    )  # fmt: skip
    return figure
