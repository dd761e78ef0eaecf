"""What a person sees in a browser: the Temporal UI of a waiting and of a closed incident, and the report."""

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.harness import CURABLE, INCIDENT, Rehearsal

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(240)]

QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


Show = Callable[[str], Awaitable[str]]


@pytest_asyncio.fixture(loop_scope="package")
async def shown() -> AsyncIterator[Show]:
    """The text that a browser shows at an address. The UI polls for ever, so it is given some seconds."""
    from playwright.async_api import async_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "Chromium is not installed (Debian: chromium)"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *QUIET])

        async def show(url: str) -> str:
            page = await browser.new_page()
            await page.goto(url, wait_until="domcontentloaded")
            await page.wait_for_timeout(4_000)
            await page.keyboard.press("r")  # the UI asks the workflow for its current details at this key
            await page.wait_for_timeout(3_000)
            texts = [await frame.inner_text("body") for frame in page.frames]
            await page.close()
            return " ".join(" ".join(texts).split())

        yield show
        await browser.close()


async def test_a_stranger_can_read_the_ui_and_the_report(world: Rehearsal, shown: Show) -> None:
    world.spike(CURABLE)
    record = await world.awaits_decision()
    page = f"{world.stack.addresses.temporal_ui}/namespaces/default/workflows/{record.incident_id}/{record.run_id}"
    waiting = await shown(f"{page}/user-metadata")
    for words in (
        "AWAITING-DECISION",
        "What is wrong",
        "an approver to decide the way back",
        "runbooks incident approve",
    ):
        assert words in waiting, words
    report = await world.ops.report(INCIDENT)
    as_of_now = await shown(Path(report.html_path).as_uri())
    assert "awaiting-decision" in as_of_now

    await world.traffic_has_passed()
    await world.approve()
    closed = await world.closed(record.run_id)
    history = await shown(f"{page}/history")
    for words in ("Completed", "IncidentWorkflow", "Workflow Execution Completed"):
        assert words in history, words
    assert closed.report_path is not None
    final = await shown(Path(closed.report_path).as_uri())
    for words in ("approver@example.com", "Closed."):
        assert words in final, words
