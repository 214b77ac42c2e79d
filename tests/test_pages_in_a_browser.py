"""The pages as a real browser shows them: on a phone and on a desk, in the light and in the dark."""

import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from fisher_ray.experiment.page import write_comparison
from fisher_ray.storage import Storage
from tests.experiment.test_tables import run
from tests.test_report import page

pytestmark = pytest.mark.browser


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
    return {"run": folder / "report/report.html", "experiment": folder / "compare.html"}


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[390, 1280])
def width(request):
    return request.param


@pytest.mark.parametrize("name", ["run", "experiment"])
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
