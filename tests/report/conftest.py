"""A browser without a screen, and a report over runs as training leaves them."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from deltakd.__main__ import main
from tests.report.made import make_evaluation, make_run, make_sweep

# Without them Chromium asks its maker's hosts for news at every start, and root cannot start it.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
EVIL_NAME = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "these tests need a browser: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page about four runs, one of them not finished, and an evaluation of three models."""
    root = tmp_path_factory.mktemp("report")
    runs = root / "runs" / "made"
    make_run(runs / "sft", num_steps=60, seed=1, alpha=0.0)
    make_run(runs / "delta", num_steps=60, seed=2, alpha=0.5)
    make_run(runs / "stopped", num_steps=20, seed=3, finished=False)
    make_run(runs / EVIL_NAME, num_steps=30, seed=4)
    validated = (
        '{"step": %d, "loss": 0.5, "cross_entropy": 0.4, "kl_to_target": 0.3, "rougeL": 0.8, "validation_s": 1}\n'
    )
    (runs / "delta" / "validation.jsonl").write_text("".join(validated % step for step in (20, 40, 60)))
    written = '{"step": %d, "answers": 8, "tokens": 80, "fraction": 0.5, "s": 0.5}\n'
    (runs / "delta" / "rollouts.jsonl").write_text("".join(written % step for step in (1, 21, 41)))
    make_evaluation(runs / "evaluation", ["sft", "delta", "elsewhere"], "sft", {"delta": EVIL})
    make_sweep(runs / "sweeps" / "by_alpha", EVIL_NAME)
    assert main(["report", str(runs), "-o", str(root / "report.html"), "--title", "made <here>"]) == 0
    return root / "report.html"


@dataclass
class Opened:
    """A page in a browser, and all that it complained of and asked for."""

    page: Page
    complaints: list[str]
    requests: list[str]

    def see_everything(self) -> None:
        """Have every chart drawn, as scrolling through the page does."""
        self.page.evaluate("all('.chart').filter((one) => !drawn.has(one)).forEach((one) => draw(one))")
        self.until("all('.plot').every((one) => one.querySelector('.main-svg'))")

    def until(self, condition: str, most_s: float = 60) -> None:
        """Wait for a condition. Playwright's own waiting evaluates strings in the page, which the page forbids."""
        deadline = time.monotonic() + most_s
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)


@pytest.fixture(scope="session")
def opened(chromium: Browser, report: Path) -> Iterator[Any]:
    """Return a function that opens the report at a width and in a theme; the same page again unless `fresh`.

    A page has five MB of script to read, so tests share them: each leaves what it changed as it was.
    """
    pages: dict[tuple[int, str, bool], Opened] = {}

    def open_page(width: int = 1280, theme: str = "light", fresh: bool = False) -> Opened:
        key = (width, theme, fresh)
        if key not in pages or fresh:
            page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
            one = pages[key] = Opened(page, [], [])
            page.on("console", lambda message: one.complaints.append(message.text))
            page.on("pageerror", lambda error: one.complaints.append(str(error)))
            page.on("request", lambda request: one.requests.append(request.url))
            page.goto(report.as_uri())
        return pages[key]

    yield open_page
    for one in pages.values():
        one.page.close()
