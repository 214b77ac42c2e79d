"""The pages as a real browser shows them: on a phone and on a desk, in the light and in the dark."""

import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from fisher_ray.experiment.page import write_comparison
from fisher_ray.report.attribution import write_audit, write_scores
from fisher_ray.storage import Storage
from tests.experiment.test_tables import run
from tests.test_report import PICTURE, page

pytestmark = pytest.mark.browser


NEAR = [{"row": 12_345 + row, "label": row % 3, "score": 10.0**-row} for row in range(5)]
SHOWN = [
    {"row": row, "label": 0, "taken": 1 + row % 2, "probability": 0.9, "norm": 3.5, "highest": NEAR, "lowest": NEAR[:4]}
    for row in range(12)
]
SCORES = {
    "num_queries": 1200,
    "num_rows": 50_000,
    "shown": SHOWN,
    "split": "test",
    "pairs": None,
    "drawn": True,
    "seconds": {"queries": 1.5, "search/0": 20.0, "pictures": 0.1},
}
PAIRS = [[0] * 40 + [1, 5, 25, 125, 25] * 12, [0] * 30 + [1, 4, 16, 64, 16, 4, 1] * 10]
SUSPECT = {"index": 40_321, "label": 0, "suggested": 2, "margin": -0.75, "probability": 0.01}
AUDIT = {
    "num_rows": 50_000,
    "num_against": 4000,
    "shown": [{**SUSPECT, "index": 40_321 + row} for row in range(24)],
    "drawn": True,
    "seconds": {"ridge": 12.0, "rows": 3.0},
}
ANSWERS = {
    "influence": (write_scores, SCORES, {"by": "influence", "queries": {"format": "images", "path": "a/" * 80}}),
    "class_gap": (write_scores, {**SCORES, "pairs": PAIRS, "drawn": False}, {"by": "class_gap", "queries": "shallow"}),
    "audit": (write_audit, AUDIT, {"top": 1000}),
}
"""Pages of scores, with pictures and without, and of an audit."""


@pytest.fixture(scope="module")
def browser():
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    page(folder)
    write_comparison(Storage(str(folder)), [run(100, 0), run(900, 0)])
    found = {"run": folder / "report/report.html", "experiment": folder / "compare.html"}
    for name, (write, answer, settings) in ANSWERS.items():
        write(Storage(str(folder / name)), answer, settings, ("cat", "dog", "<eel>"), lambda picture: PICTURE)
        found[name] = folder / name / "report.html"
    return found


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[390, 1280])
def width(request):
    return request.param


@pytest.mark.parametrize("name", ["run", "experiment", *ANSWERS])
def test_a_page_is_accessible_fits_its_window_and_has_nothing_to_complain_of(browser, pages, name, scheme, width):
    # the page lets no script run, and the audit is one
    options = {"bypass_csp": True, "color_scheme": scheme, "viewport": {"width": width, "height": 844}}
    said, asked = [], []
    with browser.new_context(**options) as context:
        shown = context.new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto(pages[name].as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        audit = Axe().run(shown).response
        background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert said == []
    assert asked == [pages[name].as_uri()]
    assert len(audit["passes"]) > 20
    assert [(rule["id"], rule["nodes"][0]["failureSummary"]) for rule in audit["violations"]] == []
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]


def test_a_page_runs_no_script(browser, tmp_path):
    text = page(tmp_path)
    (tmp_path / "changed.html").write_text(text.replace("</main>", "<script>document.title = 'ran'</script></main>"))
    with browser.new_context() as context:
        shown = context.new_page()
        shown.goto((tmp_path / "changed.html").as_uri())
        assert shown.title() == "fisher_ray: what the run found"
