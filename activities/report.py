"""Reports of incidents and events: a self-contained HTML page and its Markdown twin, from the record and the metrics.

Text from outside (alarm names, reasons, what people wrote) is cleaned and cut by the renderer itself, on its way out,
and then escaped: no template and no section can forget it.
"""

import asyncio
import os
import re
import secrets
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from temporalio import activity

from activities._event_report import event_content
from activities._report_content import Cell, Content, Stamp, Toned, report_content
from domain.messages import ReportInput, ReportResult
from domain.pre_provisioning import EventReportInput, event_workflow_id

if TYPE_CHECKING:
    from types_boto3_cloudwatch.client import CloudWatchClient

MAX_CHARACTERS = 1200
"""Of one text in the report; longer ones are cut, and say so."""


class ReportActivities:
    """Writes reports into `folder`, one folder per incident run; plots are read with the given CloudWatch client."""

    def __init__(
        self,
        cloudwatch: "CloudWatchClient",
        folder: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cloudwatch = cloudwatch
        self._folder = folder
        self._now = now

    @activity.defn
    async def write_report(self, request: ReportInput) -> ReportResult:
        """Write both files, replacing earlier ones of the same run. A closed incident gives the same files each time.

        When the metrics cannot be read the report is written without plots and says why.

        Raises:
            OSError: the folder cannot be written.
        """
        return await asyncio.to_thread(self._write, request)

    @staticmethod
    def warm() -> None:
        """Import what takes long (matplotlib: about a second) ahead of the first report; for a worker's start."""
        import activities._report_plots  # noqa: F401

    @activity.defn
    async def write_event_report(self, request: EventReportInput) -> ReportResult:
        """The same for a calendar event's pre-provisioning. Raises as `write_report`."""
        return await asyncio.to_thread(self._write_event, request)

    def _write(self, request: ReportInput) -> ReportResult:
        record = request.record
        as_of = record.closed_at or self._now()
        content = report_content(record, request.snapshot, as_of)

        def draw() -> str:
            from activities._report_plots import draw

            return draw(record, request.snapshot, as_of, self._cloudwatch)

        return self._put(folder_name(record.incident_id, record.run_id), content, draw)

    def _write_event(self, request: EventReportInput) -> ReportResult:
        record = request.record
        as_of = record.ended_at or self._now()
        content = event_content(record, request.snapshot, as_of)

        def draw() -> str:
            from activities._report_plots import draw_event

            return draw_event(record, request.snapshot, as_of, self._cloudwatch)

        return self._put(folder_name(event_workflow_id(record.event_id), record.run_id), content, draw)

    def _put(self, name: str, content: Content, draw: Callable[[], str]) -> ReportResult:
        try:
            plots, plots_missing = draw(), ""
        except Exception as error:  # whatever the client raises: a report without plots beats none
            plots, plots_missing = "", f"There are no plots: the metrics could not be read ({error})."
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        html_path, markdown_path = folder / "report.html", folder / "report.md"
        _replace(html_path, render_html(content, plots, plots_missing))
        _replace(markdown_path, render_markdown(content, plots_missing))
        return ReportResult(html_path=str(html_path.resolve()), markdown_path=str(markdown_path.resolve()))


def folder_name(workflow_id: str, run_id: str) -> str:
    """`<workflow id>-<first 8 of the run id>`, in letters that every file system takes."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", workflow_id).strip("-")[:100]
    run = re.sub(r"[^A-Za-z0-9]+", "", run_id)[:8]
    return f"{name or 'incident'}-{run or 'run'}"


def render_html(content: Content, plots: str, plots_missing: str) -> str:
    """The page. `plots` is trusted SVG of our own making, or empty with `plots_missing` saying why."""
    template = _environment(clean, _html_cell, autoescape=True).get_template("report.html")
    return template.render(content=content, plots=Markup(plots), plots_missing=plots_missing)


def render_markdown(content: Content, plots_missing: str) -> str:
    """The same in Markdown (CommonMark with tables)."""
    template = _environment(markdown, _markdown_cell, autoescape=False).get_template("report.md")
    return template.render(content=content, plots_missing=plots_missing)


def _environment(finalize: Callable[[Any], Any], cell: Callable[[Cell], Markup], *, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("activities"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    return environment


def clean(value: Any) -> Any:
    """A text on one line, without control and direction characters, cut to length. Markup of ours passes."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    kept = "".join(
        " " if character.isspace() else character
        for character in value[: 2 * MAX_CHARACTERS]
        if character.isspace() or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
    )
    text = " ".join(kept.split())
    if len(text) <= MAX_CHARACTERS and len(value) <= 2 * MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}… (cut, {len(value):,} characters in all)"


def markdown(value: Any) -> Any:
    """A cleaned text with everything escaped that Markdown could take for markup, also at the start of a line."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = re.sub(r"[\\`*\[\]<>|&~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", clean(value))
    text = re.sub(r"(?i)(?=://)|(?<=www)(?=\.)", r"\\", text)
    return re.sub(r"^(?=[#+=-])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", text)


def _html_cell(cell: Cell) -> Markup:
    if isinstance(cell, Stamp):
        return Markup('<span class="stamp">{} <small>{}</small></span>').format(cell.tokyo, cell.utc)
    if isinstance(cell, Toned):
        return Markup('<span class="{}">{}</span>').format(cell.tone, clean(cell.text))
    return Markup("{}").format(clean(cell))


def _markdown_cell(cell: Cell) -> Markup:
    if isinstance(cell, Stamp):
        return Markup(f"{cell.tokyo} ({cell.utc})")
    if isinstance(cell, Toned):
        text = markdown(cell.text)
        return Markup(f"**{text}**" if cell.tone == "bad" and text else text)
    return Markup(markdown(cell))


def _replace(path: Path, text: str) -> None:
    """Write `path` in one step, so that a reader never sees half a report."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
