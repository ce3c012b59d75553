"""The report: tables as Markdown, everything as JSON, and plots."""

from __future__ import annotations

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

from .rows import Curve, Row

INTRODUCTION = """\
`make bench` writes this page to `build/bench`; `make bench BENCH_ARGS="--out docs/benchmarks"` writes it here.
All ways of a case run in one process, in turn and in an order that is drawn for each round; memory, opening
and imports are measured in fresh processes, in turn as well. A figure is the median, with the first and the
third quartile; a ratio is ours over theirs, so less is better. Before a case is timed, all its ways have
computed the same: float32 within 1e-4 of the largest value, bfloat16 within 5e-2. The weights are random.
All figures of one page are of one run and one machine: the ratios say more than the times.
"""
TITLES = {
    "forward": "Forward passes",
    "sweep": "Patching sweep",
    "lens": "Logit lens",
    "generation": "Generation",
    "gradients": "Gradients",
    "caching": "Caches",
    "opening": "Opening and imports",
    "llama": "Llama, two layers of a model of a billion parameters",
    "hosted": "What a trace adds to the forward of a small wrapped module",
    "server": "A server, over loopback",
    "scaling": "Scaling",
}


def write(out: pathlib.Path, machine: str, parts: dict[str, list[Row]], curves: list[Curve]) -> str:
    """Writes README.md, bench.json and the plots; gives the text of the page."""
    out.mkdir(parents=True, exist_ok=True)
    plots = draw(out, parts, curves)
    text = page(machine, parts, curves, plots)
    (out / "README.md").write_text(text)
    content = {
        "machine": machine,
        "parts": {part: [row.as_json() for row in rows] for part, rows in parts.items()},
        "curves": [curve.as_json() for curve in curves],
    }
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


# ---- Markdown ----


def page(machine: str, parts: dict[str, list[Row]], curves: list[Curve], plots: dict[str, str]) -> str:
    sections = ["# Benchmarks", INTRODUCTION, f"Machine: {machine}."]
    held = [row for rows in parts.values() for row in rows if row.target is not None]
    if held:
        sections += ["## Targets", summary(held), *picture(plots, "targets"), table(held)]
    for part, rows in parts.items():
        sections += [f"## {TITLES[part]}", table(rows)]
    if curves:
        sections.append(f"## {TITLES['scaling']}")
        sections += picture(plots, "scaling")
        for curve in curves:
            sections += [f"{curve.title[0].upper()}{curve.title[1:]}:", sizes(curve)]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def summary(held: list[Row]) -> str:
    met, missed = (sum(row.met is verdict for row in held) for verdict in (True, False))
    unknown = len(held) - met - missed
    rest = f", {unknown} not measured" if unknown else ""
    return f"{met} of {len(held)} targets are met, {missed} missed{rest}."


def picture(plots: dict[str, str], name: str) -> list[str]:
    return [f"![{plots[name]}]({name}.png)"] if name in plots else []


def table(rows: list[Row]) -> str:
    lines = ["| case | ours | against | theirs | ratio | target | met | note |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [line(row) for row in rows])


def line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"**{row.ratio:.2f}x**"
    target = "" if row.target is None else f"{row.target:g}x"
    met = {True: "yes", False: "**no**", None: ""}[row.met]
    theirs = "" if row.theirs is None else row.theirs
    return f"| {row.case} | {row.ours} | {row.against} | {theirs} | {ratio} | {target} | {met} | {row.note} |"


def sizes(curve: Curve) -> str:
    ways = list(curve.points)
    lines = [f"| {curve.size} | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for n in curve.points[ways[0]]:
        lines.append(f"| {n} | " + " | ".join(str(curve.points[way][n]) for way in ways) + " |")
    return "\n".join(lines)


# ---- plots ----


def draw(out: pathlib.Path, parts: dict[str, list[Row]], curves: list[Curve]) -> dict[str, str]:
    """Draws what there is; gives the description of each plot by its name."""
    plots = {}
    held = [row for rows in parts.values() for row in rows if row.target is not None and row.ratio is not None]
    if held:
        draw_targets(out / "targets.png", held)
        plots["targets"] = "Ratio of every case to what it is compared with, and its target"
    if curves:
        draw_curves(out / "scaling.png", curves)
        plots["scaling"] = "Time against the number of layers, tokens, invokes, saves and steps"
    return plots


def draw_targets(path: pathlib.Path, rows: list[Row]) -> None:
    rows = rows[::-1]  # the first one on top
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.32 * len(rows)), layout="constrained")
    colors = ["tab:green" if row.met else "tab:red" for row in rows]
    places = range(len(rows))
    axes.barh(places, [row.ratio for row in rows], color=colors, height=0.6)
    axes.scatter([row.target for row in rows], places, marker="|", s=220, color="black", linewidths=2, zorder=3)
    axes.set_yticks(places, [f"{row.case}, against {row.against}" for row in rows], fontsize=8)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set_xlabel("ours / theirs (less is better); the black mark is the target")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curves(path: pathlib.Path, curves: list[Curve]) -> None:
    columns = 3
    lines = -(-len(curves) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(12, 3.6 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.remove()
    colors: dict[str, str] = {}
    for axes, curve in zip(grid.flat, curves, strict=False):
        for way, points in curve.points.items():
            color = colors.setdefault(way.partition(",")[0], f"C{len(colors)}")
            medians = [timing.median * 1e3 for timing in points.values()]
            axes.plot(list(points), medians, marker="o", markersize=3, label=way, color=color)
            low, high = ([getattr(t, side) * 1e3 for t in points.values()] for side in ("low", "high"))
            axes.fill_between(list(points), low, high, alpha=0.15, color=color)
        axes.set(xscale="log", yscale="log", xlabel=curve.size, ylabel="ms")
        axes.set_xticks(list(next(iter(curve.points.values()))))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_title(curve.title, fontsize=8)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
