"""The page as its reader has it: in a browser, wide and narrow, light and dark."""

import json
import re

import pytest
from plotly import graph_objects

from tests.report.conftest import EVIL, EVIL_NAME

ALL_CHARTS = {"loss", "cross_entropy", "kl_to_target", "grad_norm", "learning_rate", "alpha", "student_entropy"}
ALL_CHARTS |= {"validation_loss", "validation_cross_entropy", "validation_kl_to_target", "validation_rougeL"}
ALL_CHARTS |= {"phases", "shares", "tokens_per_s", "waiting", "answer_tokens", "on_policy", "memory"}
ALL_CHARTS |= {f"sweeps/by_alpha: {metric} over alpha" for metric in ("rougeL", "cross_entropy")}


def data_of(report):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', report.read_text())[1])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_nothing_complains_nothing_is_fetched_and_nothing_overflows(opened, report, width, theme):
    one = opened(width, theme)
    one.page.locator("[data-chart=memory]").scroll_into_view_if_needed()  # what comes into sight is drawn
    one.until("document.querySelector('[data-chart=memory] .main-svg') !== null")
    one.see_everything()
    num_traces = one.page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => [chart.dataset.chart,"
        " chart.querySelectorAll('.scatterlayer .trace path.js-line, .barlayer .trace path').length]))"
    )
    assert set(num_traces) == ALL_CHARTS and all(num_traces.values()), num_traces
    assert one.complaints == [] and one.requests == [report.as_uri()]
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    sticking_out = one.page.evaluate(
        "[...document.querySelectorAll('main *')].filter((node) => !node.closest('.scroll, .chips, .box, pre'))"
        ".filter((node) => node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.className)"
    )
    assert sticking_out == []


def test_the_page_forbids_its_scripts_to_fetch(opened):
    """plotly knows addresses of maps and fonts."""
    forbidden = opened(fresh=True).page.evaluate(
        "new Promise((done) => {"
        " document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));"
        " fetch('http://127.0.0.1:9/').catch(() => setTimeout(() => done('none'), 2000)); })"
    )
    assert forbidden == "connect-src"


def test_a_page_that_is_printed_has_every_chart_though_nobody_has_scrolled(opened):
    page = opened(fresh=True).page
    drawn = "[...document.querySelectorAll('.chart')].filter((one) => one.querySelector('.main-svg')).length"
    assert page.evaluate(drawn) < page.locator(".chart").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(drawn) == page.locator(".chart").count()


def test_plotly_itself_finds_no_fault_with_the_charts(report):
    """A chart's description may only have what plotly knows: its own classes check that."""
    charts = data_of(report)["charts"]
    assert {chart["id"] for chart in charts} == ALL_CHARTS
    for chart in charts:
        graph_objects.Figure({"data": chart["data"], "layout": chart["layout"]})


def test_a_click_on_a_column_sorts_and_another_turns_it_round(opened):
    page = opened().page
    table = page.locator("table.methods")
    values = lambda: [float(text) for text in table.locator("tbody td:nth-child(2) .mean").all_inner_texts()]  # noqa: E731
    table.locator("thead th:nth-child(1) button").click()
    names = lambda: [text.split("\n")[0] for text in table.locator("tbody th").all_inner_texts()]  # noqa: E731
    assert names() == ["delta", "elsewhere", "sft"]
    button = table.locator("thead th:nth-child(2) button")
    button.click()
    assert values() == sorted(values(), reverse=True) and names()[0] == "elsewhere"
    button.click()
    assert values() == sorted(values()) and names()[0] == "sft"
    assert table.locator("thead th:nth-child(2)").get_attribute("aria-sort") == "ascending"


def test_only_a_difference_whose_interval_excludes_0_is_marked(opened):
    """Of `elsewhere` ROUGE-L is 0.2 [0.19, 0.21] better, cross-entropy 0.1 [-0.1, 0.3] more."""
    page = opened().page
    row = page.locator("table.methods tbody tr", has_text="elsewhere")
    assert row.locator("td").nth(0).locator(".difference.better").inner_text().startswith("▲ +20.0 [+19.0, +21.0]")
    assert row.locator("td").nth(1).locator(".difference").get_attribute("class").strip() == "difference"
    assert page.locator("tr.baseline .difference").count() == 0


def test_the_filter_leaves_the_examples_that_hold_a_text_and_marks_it(opened):
    page = opened().page
    assert page.locator(".example").count() == 3
    page.locator(".examples .filter").fill("PROMPT 1")
    assert page.locator(".example").count() == 1 and "prompt 1" in page.locator(".example").inner_text()
    assert page.locator(".examples .count").inner_text() == "1 of 3 prompts"
    page.locator(".examples .filter").fill("hacked")
    assert page.locator(".example").count() == 1 and page.locator(".example mark").first.inner_text() == "hacked"
    page.locator(".examples .filter").fill("nobody says this")
    assert page.locator(".example").count() == 0
    page.locator(".examples .filter").fill("")


def test_what_a_model_answers_is_text_and_never_markup(opened, report):
    one = opened()
    one.see_everything()
    assert EVIL in one.page.locator(".example").first.inner_text()
    assert one.page.evaluate("[window.hacked, document.querySelectorAll('img').length]") == [None, 0]
    assert EVIL not in report.read_text() and EVIL_NAME not in report.read_text()
    assert EVIL_NAME in one.page.locator(".runs .chips").inner_text()
    assert one.page.title() == "made <here>: report"


def test_the_theme_follows_the_reader_and_a_click_changes_it_in_charts_too(opened):
    one = opened(theme="dark", fresh=True)
    page = one.page
    page.evaluate("draw(document.querySelector('[data-chart=loss]'))")
    ground = "getComputedStyle(document.body).backgroundColor"
    letters = "getComputedStyle(document.querySelector('[data-chart=loss] .xtick text')).fill"
    dark = page.evaluate(f"[{ground}, {letters}]")
    page.locator("#theme").click()
    one.until(f"{letters} !== {json.dumps(dark[1])}")
    light = page.evaluate(ground)
    assert dark[0] != light and page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    assert page.evaluate(ground) == light, "the choice is kept"


def test_a_run_has_one_colour_in_every_chart_and_table_and_a_click_hides_it_everywhere(opened):
    one = opened()
    one.see_everything()
    page = one.page
    colours = page.evaluate(
        "all('.plot').flatMap((plot) => plot.data).filter((trace) => trace.type !== 'bar')"
        ".filter((trace) => data.runs[trace.meta.run]?.name === 'delta').map((trace) => trace.line.color)"
    )
    swatch = page.evaluate("colour('run1')")
    assert set(colours) == {swatch} and len(colours) > 10
    in_table = page.locator("table.methods tbody tr", has_text="delta").locator(".swatch")
    chip = page.locator(".runs .chip", has_text="delta")
    paint = "(node) => getComputedStyle(node).backgroundColor"
    assert in_table.evaluate(paint) == chip.locator(".swatch").evaluate(paint)
    chip.click()
    loss = "document.querySelector('[data-chart=loss] .plot').data"
    shown = f"{loss}.filter((one) => one.visible).map((one) => one.meta.run)"
    one.until(f"!{shown}.includes(1)")
    assert 0 in page.evaluate(shown)
    assert "delta" not in page.evaluate("document.querySelector('[data-chart=phases] .plot').data[0].y")
    page.locator("[data-select=all]").click()
    one.until(f"{shown}.includes(1)")


def test_a_logarithmic_axis_and_shares_of_the_run_are_a_click_away(opened):
    one = opened()
    one.see_everything()
    one.page.locator("[data-chart=loss] .log").click()
    assert one.page.evaluate("document.querySelector('[data-chart=loss] .plot').layout.yaxis.type") == "log"
    one.page.locator("#relative").check()
    ends = (
        "document.querySelector('[data-chart=loss] .plot').data.map((one) => Math.max(...(one.x.length ? one.x : [2])))"
    )
    one.until(f"Math.max(...{ends}) === 1")
    one.page.locator("#relative").uncheck()
    one.page.locator("[data-chart=loss] .log").click()
    assert one.complaints == []


def test_the_page_says_what_was_not_measured_and_who_trained_what(opened):
    page = opened().page
    gaps = page.locator("table.gaps").inner_text()
    assert "not finished (stopped): it stands at step 20 of 40" in gaps
    assert re.search(r"stopped\s+no evaluation among these has scored its model", gaps)
    assert not re.search(r"^delta\s+no evaluation", gaps, re.MULTILINE)
    text = page.locator("main").inner_text()
    assert "0123456789ab" in text and "x86_64, 2 cores, 24 GiB" in text
    settings = page.locator("table.settings").inner_text()
    assert "objective.target.alpha" in settings and "objective.divergence" not in settings
    page.locator("summary").get_by_text("delta", exact=True).click()
    assert "name: reverse_kl" in page.locator("details[open] pre").inner_text()
