"""The report in a real browser, from disk: no script fails, every figure is there, points, filters and tokens work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lco_lite.recipe.file import dump, validate
from lco_lite.report import as_html, gather
from lco_lite.report.study import gather_study
from lco_lite.run import Run
from tests.conftest import TINY
from tests.report.browser import Browser, find_browser
from tests.report.made_runs import make_run, make_study, score_of_base, write_lines

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here (LCO_LITE_BROWSER names one)")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    for seed in (1, 2):
        make_run(root / "runs", f"one-{seed}", seed, 1.0, 0.4 + seed / 10)
        make_run(root / "runs", f"two-{seed}", seed, 0.5, 0.6 + seed / 20)
    data = gather([Run(folder) for folder in sorted((root / "runs").iterdir())])
    (root / "page.html").write_text(as_html(data), encoding="utf-8")
    return root / "page.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(find_browser() or "", tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """What a test does may raise no error in the page and ask nothing of a network."""
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.scheme("light")
    browser.open(page)
    yield browser
    browser.js("1")
    assert not browser.errors
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.js("window.hacked") is None


def cards(browser: Browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('.sample .about')].map(x => x.innerText.replaceAll('\\n', ' '))")


def choose(browser: Browser, name: str, value: str) -> None:
    event = "input" if name == "search" else "change"
    at = f"document.getElementById('filter-{name}')"
    browser.js(f"{at}.value = {json.dumps(value)}; {at}.dispatchEvent(new Event('{event}'))")


def test_every_figure_is_drawn_with_its_curves_bands_and_table(opened):
    shown = "JSON.parse(document.getElementById('data').textContent).figures"
    opened.js("document.querySelectorAll('#curves > details').forEach(box => { box.open = true })")
    opened.until("document.querySelectorAll('#figure-rl-lr .curve').length", 10)
    for figure in opened.js(shown):
        at = f"document.querySelector('#figure-{figure['id']}')"
        curves = opened.js(f"[...{at}.querySelectorAll('.curve')].map(x => x.getAttribute('d'))")
        assert len(curves) == sum(len(s["runs"]) + 1 for s in figure["series"]), figure["id"]
        assert all(curve.count("L") == 3 and "NaN" not in curve for curve in curves)
        assert opened.js(f"{at}.querySelectorAll('.band').length") == len(figure["series"])
        opened.js(f"{at}.querySelector('details').open = true")
        opened.until(f"{at}.querySelectorAll('tbody tr').length === 4", 10)
    assert opened.js("document.querySelectorAll('[data-figure=scores-arithmetic] .interval').length") == 3
    assert opened.js("document.querySelectorAll('#tests tbody tr').length") == 3
    assert opened.js("document.querySelectorAll('img').length") == 0, "what a model writes is text"


def test_no_label_of_an_axis_is_cut_and_none_of_a_share_is_impossible(opened):
    left = opened.js("[...document.querySelectorAll('.chart .tick')].map(x => x.getBBox().x)")
    assert len(left) > 10 and min(left) >= 0

    def ticks(metric: str) -> list[str]:
        return opened.js(f"[...document.querySelectorAll('#figure-rl-{metric} .tick')].map(x => x.textContent)")

    assert "1e−5" in ticks("kl_to_old"), "digits that say something alone"
    assert all(0 <= float(tick) <= 1 for tick in ticks("accuracy")) and ticks("accuracy")[0] == "0"
    level = opened.js(
        "[...document.querySelectorAll('#curves .grid')].map(grid => [...grid.querySelectorAll('.chart')].slice(0, 3)"
        ".map(chart => chart.getBoundingClientRect().top))"
    )
    assert all(max(row) - min(row) < 1 for row in level), "the charts of a row stand beside one another"


def test_the_page_of_one_run_tells_its_result_what_was_chosen_and_no_empty_column(browser, tmp_path):
    folder = make_run(tmp_path / "runs", "alone", right=0.25)
    score_of_base(folder, 0.75)
    (folder / "recipe.yaml").write_text(dump(validate(TINY, "here")))
    page = tmp_path / "page.html"
    page.write_text(as_html(gather([Run(folder)])), encoding="utf-8")
    browser.errors.clear()
    browser.open(page)
    assert "rl-kld is below base" in browser.js("document.querySelector('header').innerText")
    browser.resize(500, 900)
    columns = browser.js("[...document.querySelectorAll('#tests th')].map(x => x.textContent)")
    assert columns == ["task", "A", "B", "B − A over items", "p", "items"]
    assert browser.js("document.querySelectorAll('#tests th')[4].getBoundingClientRect().right") < 500
    assert "−50.0" in browser.js("document.querySelector('#tests tbody').innerText")
    assert browser.js("[...document.querySelectorAll('#recipe details')].every(x => !x.open)")
    chosen = browser.js("[...document.querySelectorAll('#recipe .wide')].at(-1).innerText")
    assert "rl.steps" in chosen and "null" not in chosen and len(chosen.splitlines()) < 60
    tags = browser.js("[...document.querySelectorAll('.sample')].map(x => [!!x.querySelector('.tok'), x.innerText])")
    assert [with_tokens for with_tokens, _ in tags] == [True, True, False]
    assert all(("tokens not kept" in text) is not with_tokens for with_tokens, text in tags)
    assert not browser.errors and browser.js("window.hacked") is None


def test_a_click_on_a_point_or_a_score_opens_the_samples_of_its_runs_alone(opened):
    opened.place("#figure-rl-reward .chart")
    circle = "document.querySelectorAll('#figure-rl-reward circle')[2]"
    x, y = opened.js(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({circle}.getBoundingClientRect())")
    opened.move(x, y)
    assert "step 3" in opened.js("document.getElementById('tip').innerText")
    opened.click(x, y)
    found = cards(opened)
    assert found and all("step 3" in card and "rl-kld" in card for card in found)
    assert {card.split()[0] for card in found} == {"one-1", "one-2"}, "a mean is of its method's runs"
    assert opened.js("Math.abs(document.getElementById('samples').getBoundingClientRect().top) < 100")
    opened.js("document.getElementById('reset').click()")
    opened.js("document.querySelectorAll('[data-figure=scores-arithmetic] g')[2].dispatchEvent(new Event('click'))")
    assert opened.js("document.getElementById('filter-run').selectedOptions[0].textContent") == "two-1, two-2"
    assert opened.js("document.getElementById('count').textContent").startswith("80 of ")
    choose(opened, "run", "two-2")
    assert opened.js("document.getElementById('count').textContent").startswith("40 of ")


def test_keys_walk_along_a_curve_to_its_samples_and_along_the_tokens(opened):
    opened.js("document.querySelector('#figure-rl-loss .chart').focus()")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        opened.press(key)
    assert cards(opened) and all("step 2" in card and "one-1" in card for card in cards(opened))
    opened.js("document.querySelector('.tok').focus()")
    assert "so" in opened.js("document.getElementById('tip').innerText")
    opened.press("ArrowRight")
    said = opened.js("document.getElementById('tip').innerText")
    assert "−0.25" in said and "0.9000" in said and "0.8000" in said and "0.8500" in said
    opened.press("Escape")
    assert opened.js("document.getElementById('tip').hidden")


def test_filters_search_and_order_choose_among_the_samples(opened):
    opened.js("document.getElementById('reset').click()")
    total = int(opened.js("document.getElementById('count').textContent").split()[0].replace(",", ""))
    assert total == 4 * 12 + 2 * 4 * 40
    choose(opened, "run", "two-2")
    choose(opened, "source", "training")
    choose(opened, "step", "4")
    assert len(cards(opened)) == 3 and all("two-2" in card and "step 4" in card for card in cards(opened))
    choose(opened, "outcome", "wrong")
    assert len(cards(opened)) == 1 and "✗ wrong" in cards(opened)[0]
    choose(opened, "outcome", "")
    choose(opened, "sort", "low")
    assert "reward −1" in cards(opened)[0]
    choose(opened, "search", "onerror")
    assert len(cards(opened)) == 1
    assert "<img src=x onerror" in opened.js("document.querySelector('.sample .text:not(.prompt)').innerText")
    opened.js("document.getElementById('reset').click()")
    choose(opened, "source", "arithmetic")
    assert len(cards(opened)) == 20
    opened.js("document.getElementById('more').click()")
    assert len(cards(opened)) == 40 and "answer 1" in cards(opened)[0]


def test_tokens_are_coloured_by_sign_and_show_what_each_policy_held(opened):
    classes = opened.js("[...document.querySelectorAll('.tokens')[0].children].map(x => x.className)")
    assert classes == ["tok pos", "tok neg", "tok "]
    colours = opened.js(
        "[...document.querySelectorAll('.tok')].slice(0, 2).map(x => getComputedStyle(x).backgroundColor)"
    )
    styles = opened.js(
        "[...document.querySelectorAll('.tok')].slice(0, 2).map(x => getComputedStyle(x).borderBottomStyle)"
    )
    assert colours[0] != colours[1] and styles == ["solid", "dotted"], "the sign is not told by hue alone"
    opened.move(*opened.place(".tok", 0))
    rows = opened.js("[...document.querySelectorAll('#tip tr')].map(x => [...x.children].map(y => y.textContent))")
    assert rows[1:] == [["so", "+0.5", "0.4000", "0.6000", "0.5000"], ["to", "−0.2", "0.3000", "0.2000", "0.3000"]]


def test_a_hidden_method_and_another_axis_change_the_curves(opened):
    at = "document.querySelectorAll('#figure-rl-reward .curve').length"
    assert opened.js(at) == 6
    opened.js("document.querySelectorAll('input[data-method]')[1].click()")
    assert opened.js(at) == 3
    opened.js(
        "{ const a = document.getElementById('axis'); a.value = 'samples'; a.dispatchEvent(new Event('change')) }"
    )
    assert "samples seen" in opened.js("document.querySelector('#figure-rl-reward svg').textContent")
    opened.js("document.getElementById('log').click()")
    assert opened.js("document.querySelector('#figure-rl-loss .curve').getAttribute('d')").count("NaN") == 0


def test_close_values_on_a_logarithmic_axis_have_labels_that_differ_and_bands_stay_on_it(browser, tmp_path):
    for seed in (1, 2):
        folder = make_run(tmp_path / "runs", f"seed-{seed}", seed)
        values = [
            {"step": k, "loss": 1.42 + k / 1000 + seed / 500, "entropy": (1e-3, 1.0)[seed - 1]} for k in (1, 2, 3)
        ]
        write_lines(folder / "rl-kld" / "metrics.jsonl", values)
    page = tmp_path / "page.html"
    page.write_text(as_html(gather([Run(folder) for folder in (tmp_path / "runs").iterdir()])), encoding="utf-8")
    browser.errors.clear()
    browser.open(page)
    browser.js("document.getElementById('log').click()")
    for metric in ("loss", "entropy"):
        at = f"#figure-rl-{metric} .chart"
        labels, places = (
            browser.js(f"[...document.querySelectorAll('{at} .tick')].map(x => {of})")
            for of in ("x.textContent", "Number(x.getAttribute('y'))")
        )
        assert len(labels) >= 2 and len(set(labels)) == len(labels), labels
        assert places == sorted(places, reverse=True) and min(places) >= 8 and max(places) <= 190, "8 to 186, 4 lower"
        band = browser.js(f"document.querySelector('{at} .band').getAttribute('d')")
        heights = [float(point.split()[1]) for point in re.split("[MLZ]", band) if point]
        assert min(heights) >= 8 and max(heights) <= 186, heights
    assert not browser.errors


def test_it_is_dark_where_the_reader_is_and_fits_a_telephone(opened, tmp_path):
    def ground() -> str:
        return opened.js("getComputedStyle(document.body).backgroundColor")

    light = ground()
    opened.scheme("dark")
    assert ground() != light
    opened.resize(390, 800)
    opened.js("new Promise(done => setTimeout(done, 200))")
    assert opened.js("document.documentElement.scrollWidth <= innerWidth")
    assert opened.js("document.querySelector('.chart').getBoundingClientRect().right <= innerWidth")
    opened.screenshot(tmp_path / "telephone.png")
    assert (tmp_path / "telephone.png").stat().st_size > 10_000


def test_a_studys_page_shows_its_claims_tables_and_pictures(browser, tmp_path):
    page = tmp_path / "study.html"
    page.write_text(as_html(gather_study(make_study(tmp_path / "study"))), encoding="utf-8")
    browser.errors.clear()
    browser.open(page)
    browser.until("document.querySelector('img').naturalWidth > 0", 10)
    assert "? unclear" in browser.js("document.querySelector('#claims tbody').innerText")
    assert browser.js("document.querySelectorAll('#tables tbody tr').length") == 2
    assert not browser.errors and browser.js("window.hacked") is None
