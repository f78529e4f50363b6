"""What `optim.benchmark` measured as one HTML page, from its JSON alone."""

import html

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from latentsync import FPS

STAGES = {"encode": "#4477aa", "denoise": "#ccbb44", "decode": "#66ccee"}  # told apart by every kind of sight
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def draw(results: dict) -> str:
    """An HTML page that needs nothing else: frames/s, seconds a window, and seconds over a clip's length.

    results: what --json writes. Rows that failed are left out, and panels without rows.
    """
    windows = [row for row in results.get("windows", []) if not row["failed"]]
    lengths = [row for row in results.get("lengths", []) if not row["failed"]]
    jobs = [row for row in results.get("jobs", []) if not row["failed"]]
    panels = []
    if windows:
        panels += [("Frames a second", frames_panel, windows), ("Seconds a window of 16 frames", stages_panel, windows)]
    if lengths:
        panels.append(("Seconds of a clip, from built networks to its last frame", lengths_panel, lengths))
    if jobs:
        panels.append(("Seconds of a job, file to file", jobs_panel, jobs))
    figure = go.Figure()
    if panels:
        gap = 0.12 if len(panels) < 4 else 0.08
        figure = make_subplots(len(panels), 1, subplot_titles=[title for title, _, _ in panels], vertical_spacing=gap)
    for number, (_, panel, rows) in enumerate(panels, 1):
        panel(figure, number, rows)
    machine = results.get("machine", {})
    names = (machine.get("device"), f"torch {machine.get('torch')}", machine.get("dtype"), machine.get("date"))
    where = html.escape(", ".join(map(str, filter(None, names))))
    figure.update_layout(
        title=f"LatentSync, levels of optimization<br><sub>{where}</sub>", template="plotly_white", barmode="group",
        height=200 + 380 * max(1, len(panels)),
        legend={"groupclick": "toggleitem"},
    )  # fmt: skip
    return figure.to_html(include_plotlyjs=True, full_html=True)


def _resolutions(rows: list[dict]) -> list[int]:
    return sorted({row["resolution"] for row in rows}, reverse=True)


def frames_panel(figure: go.Figure, number: int, rows: list[dict]) -> None:
    """Bars by level and resolution; lines for the reference of each resolution and for real time."""
    for resolution, colour in zip(_resolutions(rows), COLOURS, strict=False):
        some = [row for row in rows if row["resolution"] == resolution]
        group = {"legendgroup": "frames", "legendgrouptitle_text": "Frames a second"}
        figure.add_bar(
            x=[row["name"] for row in some], y=[row["frames_per_second"] for row in some], name=f"{resolution} px",
            text=[f"{row['frames_per_second']:.1f}" for row in some], offsetgroup=str(resolution),
            marker_color=colour, row=number, col=1, **group,
        )  # fmt: skip
        for row in some:
            if row["ratio"] == 1:  # the first reference row: what the others are compared with
                figure.add_hline(
                    row["frames_per_second"], line={"dash": "dot", "color": colour}, row=number, col=1,
                    annotation_text=f"reference, {resolution} px", annotation_position="top right",
                )  # fmt: skip
    figure.add_hline(
        FPS, line={"dash": "dash", "color": "#555555"}, row=number, col=1,
        annotation_text=f"real time, {FPS} frames/s", annotation_position="top left",
    )  # fmt: skip
    figure.update_yaxes(title_text="frames/s", rangemode="tozero", row=number, col=1)


def stages_panel(figure: go.Figure, number: int, rows: list[dict]) -> None:
    """A stack of condition, denoise and decode for each level and resolution."""
    rows = sorted(rows, key=lambda row: -row["resolution"])
    base = [0.0] * len(rows)  # stacked by hand: a figure has one way to lay out bars, and the others stand side by side
    for stage, colour in STAGES.items():
        figure.add_bar(
            # On two lines, or the names would stand upright and reach into the next panel.
            x=[[f"{row['resolution']} px" for row in rows], [row["name"].replace(" + ", "<br>+ ") for row in rows]],
            y=[row[stage] for row in rows], base=base, name={"encode": "condition (encode)"}.get(stage, stage),
            offsetgroup="stages", marker_color=colour, legendgroup="stages",
            legendgrouptitle_text="Seconds a window", row=number, col=1,
        )  # fmt: skip
        base = [below + row[stage] for below, row in zip(base, rows, strict=True)]
    figure.update_xaxes(tickangle=0, tickfont_size=10, row=number, col=1)
    figure.update_yaxes(title_text="s", row=number, col=1)


def lengths_panel(figure: go.Figure, number: int, rows: list[dict]) -> None:
    """A line over length for each level and resolution: dashed from a cold start, solid from a warm one."""
    curves: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        curves.setdefault((row["resolution"], row["name"]), []).append(row)
    for i, ((resolution, name), some) in enumerate(curves.items()):
        some.sort(key=lambda row: row["length"])
        for start, dash in (("cold", "dash"), ("warm", "solid")):
            figure.add_scatter(
                x=[row["length"] for row in some], y=[row[start] for row in some], mode="lines+markers",
                name=f"{name}, {resolution} px, {start}", line={"dash": dash, "color": COLOURS[i % len(COLOURS)]},
                # hollow: computed from shorter clips
                marker_symbol=["circle-open" if row["computed"] else "circle" for row in some],
                legendgroup="lengths", legendgrouptitle_text="Seconds of a clip", row=number, col=1,
            )  # fmt: skip
    figure.update_xaxes(title_text="length of the clip, s (hollow: computed)", type="log", row=number, col=1)
    figure.update_yaxes(title_text="s", type="log", row=number, col=1)


def jobs_panel(figure: go.Figure, number: int, rows: list[dict]) -> None:
    """Wall time beside what the same windows take alone."""
    names = [f"{row['name']}, {row['resolution']} px" for row in rows]
    for key, name, colour in (("wall", "the whole job", "#aa3377"), ("gpu", "its windows alone", "#bbbbbb")):
        figure.add_bar(
            x=names, y=[row[key] for row in rows], name=name, marker_color=colour, offsetgroup=key,
            legendgroup="jobs", legendgrouptitle_text="Jobs", row=number, col=1,
        )  # fmt: skip
    figure.update_yaxes(title_text="s", row=number, col=1)
