"""What the README and METHODS show, run as a new user would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fisher_ray.config import Config

ROOT = Path(__file__).parents[1]
PAGES = "".join((ROOT / name).read_text() for name in ("README.md", "METHODS.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)


def block(language: str, words: str) -> str:
    (found,) = (text for text in blocks(language) if words in text)
    return found


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", "METHODS.md", "BENCHMARKS.md", "cluster/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert links
    for link in links:
        place, _, heading = link.partition("#")
        assert (page.parent / place).exists(), link
        assert not heading or heading in headings(page.parent / place if place else page), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def test_every_configuration_of_the_readme_is_one():
    found = [yaml.safe_load(text) for text in blocks("yaml")]
    data = {name: {"format": "numpy", "path": "x.npz"} for name in ("train", "shallow", "test")}
    rest = {"output": "runs/x", "data": data, "model": {"factory": "a:b"}, "base": {"steps": 1}}
    assert len(found) == 2
    for part in found:
        Config.from_dict(part if "output" in part else rest | part)


@pytest.mark.slow
def test_a_table_and_a_network_of_ones_own_work_from_python_and_as_a_run(tmp_path):
    script = block("python", "load_breast_cancer")
    assert len([line for line in script.splitlines() if line]) < 30
    (tmp_path / "cancer.py").write_text(script)
    (tmp_path / "cancer.yaml").write_text(block("yaml", "cancer:network"))

    def output(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, check=True, text=True, stdout=subprocess.PIPE, timeout=250
        ).stdout

    network, classifier = map(float, re.findall(r"0\.\d+", output("cancer.py")))
    assert network > 0.6
    assert classifier > 0.85
    quick = ("--set", "trained_on.seconds=0.2", "--set", "runtime.num_workers=1")
    output("-m", "fisher_ray", "run", "cancer.yaml", "--quiet", *quick)
    results = json.loads((tmp_path / "runs/cancer/report/results.json").read_text())
    assert results["num_test"] == 169
    assert results["accuracy"]["fisher_linear"] > 0.85
    assert results["accuracy"]["base"] == pytest.approx(network, abs=1e-3)
