"""The page of `-html`: tables and plots of one run in one file, without scripts and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bench_plots
import jinja2
from bench_report import Table


@dataclass
class PartOfPage:
    name: str
    tables: list[Table]
    plots: Sequence[bench_plots.Bars | bench_plots.Lines] = field(default_factory=list)


def page(facts: Mapping[str, object], parts: Sequence[PartOfPage]) -> str:
    """`facts`: date, cores, kernel and the like; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("bench_page.html").render(
        facts=facts,
        parts=parts,
        width=bench_plots.WIDTH,
        height=bench_plots.HEIGHT,
        margin=bench_plots.MARGIN,
        labels=bench_plots.LABELS,
    )
