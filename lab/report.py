"""
What people look at: progress bars, tables, curves.

    progress, Clock             a bar on the terminal; seconds per phase of an update
    table, short                aligned columns; a number in at most seven characters
    curves                      curves.png, drawn from log.jsonl
    subplots, save_figure, optional     for the pictures that a script draws itself
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import torch

from lab.files import Stopped, first_line, read_lines, replacing

# Okabe and Ito 2008: colours that people with any colour vision can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


class Clock:
    """Seconds per phase: lap("rollout") adds the time since the last lap to rollout_seconds."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        name = f"{phase}_seconds"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def total(self):
        return sum(self.seconds.values())


def progress(items, label):
    """Go through a list with a bar on the terminal, and one line at the end."""
    start = time.time()
    terminal = sys.stdout.isatty()
    for i, item in enumerate(items):
        if terminal:
            bar = "#" * (30 * i // len(items))
            print(f"\r{label} [{bar:30}]", end="", flush=True)
        yield item
    clear = "\r\033[K" if terminal else ""
    print(f"{clear}{label}: {time.time() - start:.1f} s", flush=True)


def short(value):
    """A number in at most seven characters, so columns of width eight never touch"""
    if value is None or value != value:
        return "nan"
    if value != 0 and abs(value) <= 0.01:
        return f"{value:.0e}"
    for digits in (3, 1, 0):
        text = f"{value:.{digits}f}"
        if len(text) <= 7:
            return text
    return f"{value:.0e}"


def table(rows, markdown=False):
    """Rows of cells, the first row the header -> aligned text, numbers to the right"""
    rows = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    between = " | " if markdown else "  "
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(between.join(cells))
    rule = "-" * len(lines[0])
    if markdown:
        lines = [f"| {line} |" for line in lines]
        rules = ["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]
        rule = "|" + "|".join(rules) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


# --------------------------------------------------------------------------------------------------
# Pictures

def smooth(values):
    """Means over five updates, two to either side, fewer at the ends: a list as long as values"""
    windows = [values[max(0, i - 2):i + 3] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def subplots(*shape, figsize, **options):
    """A figure and its axes, as pyplot's subplots, which would change a notebook's backend"""
    from matplotlib.figure import Figure
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **options)


def no_math(text):
    """Text to draw as it is: matplotlib would read $..$ in a run's name as a formula."""
    return text.replace("$", r"\$")


def optional(draw):
    """
    Decorator: a picture comes after hours of training, so one that fails costs only itself.

    Then the function returns the reason in place of a path: matplotlib is missing, for example.
    """
    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        try:
            return draw(*args, **kwargs)
        except Stopped:                                  # the disk is full: --resume draws it later
            raise
        except Exception as error:
            why = f"not drawn ({type(error).__name__}: {first_line(error)})"
            print(f"warning: a picture was {why}")
            return why
    return wrapped


def save_figure(figure, path, dpi=110):
    """Write a picture to the path, all or nothing -> path"""
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])
    return path


@optional
def curves(folder, panels):
    """Draw logged metrics over updates, a panel for each (heading, unit, names) -> curves.png"""
    log = read_lines(folder / "log.jsonl")
    logged = {name for line in log for name, value in line.items() if value is not None}
    panels = [panel for panel in panels if logged.intersection(panel[2])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, squeeze=False, figsize=(4 * columns, 2.8 * rows))
    for axis, (heading, unit, names) in zip(axes.flat, panels):
        drawn = []
        for name, style, colour in zip(names, ("-", "--", ":"), COLOURS):
            points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, color=colour, linewidth=1.5, label=name)
                drawn += [value for _, value in points]
        # A single spike, such as kl_old can have, would flatten the rest of its curve
        if min(drawn) > 0 and max(drawn) > 10 * statistics.median(drawn):
            axis.set_yscale("log")
            unit = f"{unit}, log scale" if unit else "log scale"
        axis.set(title=heading, xlabel="update", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.suptitle(no_math(str(folder)))
    figure.tight_layout()
    return save_figure(figure, folder / "curves.png")
