import copy
import csv
import io
import json
import math
import re
from base64 import b64decode
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fisher_ray.report import render_table, write_report
from fisher_ray.storage import Storage

RESULTS = {
    "schema": 1,
    "num_test": 10_000,
    "num_features": 12_544,
    "views": 2,
    "accuracy": {"base": 0.613, "linear_probe": 0.635, "trained_on": 0.699, "fisher_linear": 0.693, "gradnet": None},
    "seconds": {"base": 41.2, "metric": 14.8, "features": 72.5, "linear": 61.3, "trained_on": 148.7},
    "samples_per_second": {"metric": 168.9, "features": 482.8},
}


def picture():
    raw = io.BytesIO()
    Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 50).save(raw, "PNG")
    return raw.getvalue()


PICTURE = picture()
DETAILS = {
    "metric": {
        "dim": 2048,
        "trace": 9.5,
        "captured": 0.9312,
        "effective_dim": 511.25,
        "condition": 830.0,
        "parts": [{"name": "all", "eigvals": [2.5 * i**-1.3 for i in range(1, 1025)], "damping": 0.0021}],
        "layers": [
            {"name": "conv1", "num_coordinates": 2000, "trace": 7.6, "kept": 0.81, "eigvals": [2.0, 1.0, 0.0]},
            {"name": "head", "num_coordinates": 48, "trace": 1.9, "kept": 0.99, "eigvals": [0.5, 0.25]},
        ],
    },
    "path": [
        {"penalty": 0.03, "accuracy": 0.671},
        {"penalty": 0.1, "accuracy": 0.688},
        {"penalty": 0.3, "accuracy": 0.694},
        {"penalty": 1.0, "accuracy": 0.691},
        {"penalty": 3.0, "accuracy": 0.672},
    ],
    "seconds": {"base": 41.2, "metric": 14.8, "features": 72.5, "linear": 61.3, "trained_on": 148.7},
    "config": "output: runs/cifar10\nseed: 0\nmodel: {factory: 'fisher_ray.models:paper_cnn'}  # " + "long " * 40,
    "layers": [{"name": "conv1", "coordinates": 2048, "shape": [64, 64, 5, 5]}],
    "skipped": [{"split": "shallow", "row": 1234, "reason": "train-0.parquet row 1234: not a picture"}],
    "confusion": {
        "base": [[60, 30, 10], [20, 70, 10], [0, 0, 0]],
        "fisher_linear": [[80, 15, 5], [10, 90, 0], [0, 0, 0]],
    },
    "class_names": ("cat", "dog", "eel"),
    "examples": [
        {
            "kind": kind,
            "row": row,
            "label": 0,
            "taken": taken,
            "probability": 0.987,
            "nearest": [{"row": 7, "label": 1, "cosine": 0.51}, {"row": 8, "label": 2, "cosine": 0.5}],
        }
        for kind, row, taken in (("wrong", 4321, 1), ("most", 12, 0))
    ],
    "searched": 25_000,
    "pictures": dict.fromkeys(("test-4321", "test-12", "shallow-7", "shallow-8"), PICTURE),
    "workers": [
        {"worker": "a (pid 1, cpu)", "units": 12, "rows": 12_288, "seconds": 25.6, "retries": 0},
        {"worker": "b (pid 2, cpu)", "units": 13, "rows": 13_000, "seconds": 26.0, "retries": 1},
    ],
    "intervals": {"base": [0.6034, 0.6221], "fisher_linear": [0.69, 0.696]},
    "verdict": "Level with training on: the linear model on Fisher features is 0.6 points below it.",
    "environment": {"python": "3.11.2", "torch": "2.13.0", "machine": "2 cores, " + "x" * 90},
}


def page(tmp_path, results=RESULTS, details=DETAILS):
    write_report(Storage(str(tmp_path)), results, details)
    return (tmp_path / "report" / "report.html").read_text()


def printed(results):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_table(results))
    return console.export_text()


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.text, self.labels = [], [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.labels += [found.get("aria-label")] if tag == "svg" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_results_are_written_as_json_as_they_are(tmp_path):
    page(tmp_path)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == RESULTS


def test_a_result_that_is_not_a_number_is_not_written(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["accuracy"]["base"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        page(tmp_path, results)
    assert not (tmp_path / "report").exists()


def test_the_page_shows_every_model_with_its_difference_to_the_base_and_its_interval(tmp_path):
    text = Outline(page(tmp_path)).text
    for expected in ("61.3 %", "63.5 %", "69.9 %", "69.3 %", "+8.0", "+2.2", "60.3 – 62.2 %", "69.0 – 69.6 %"):
        assert expected in text
    assert "10,000 clean test samples" in text
    assert "mirror image" in text
    assert "GradNet" not in text
    for expected in (
        "conv1",
        "64 × 64 × 5 × 5",
        "2,048",
        "train-0.parquet row 1234",
        "Level with training on",
        "2.13.0",
    ):
        assert expected in text


def test_the_page_is_well_formed_with_unique_ids_and_asks_for_nothing_from_elsewhere(tmp_path):
    text = page(tmp_path)
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids)) > 10
    inside = {address for address in outline.addresses if not address.startswith(("data:text/csv", "data:image/png"))}
    assert {address.lstrip("#") for address in inside} <= set(outline.ids)
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)


def test_every_figure_says_in_words_what_it_shows(tmp_path):
    labels = Outline(page(tmp_path)).labels
    assert len(labels) == 6
    assert any("Most often: cat for dog 15.0 %; dog for cat 10.0 %; cat for eel 5.0 %." in label for label in labels)
    assert any("linear model on Fisher features 69.3 %, interval 69.0 – 69.6 %" in label for label in labels)
    assert any("69.4 % at 0.3" in label for label in labels)
    assert any("1024 eigenvalues from 2.5 to 0.0003" in label and "damping 0.0021" in label for label in labels)
    assert any("conv1 from 2; head from 0.5" in label for label in labels)
    assert any("features 72.5 s" in label for label in labels)


def test_examples_are_shown_with_their_nearest_in_words_and_pictures(tmp_path):
    text = page(tmp_path)
    assert text.count("<h3>") == 2
    shown = Outline(text)
    assert "Most certain, and wrong" in shown.text
    assert "Least certain" not in shown.text
    assert "among 25,000 training rows" in shown.text
    assert "Test row 4,321: cat, taken for dog with 98.7 %." in shown.text
    pictures = re.findall(r'<img class="(?:asked|near)" src="data:image/png;base64,([^"]+)" alt="([^"]+)">', text)
    assert len(pictures) == text.count("<img") == 6
    assert {b64decode(raw) for raw, _ in pictures} == {PICTURE}
    assert [alt for _, alt in pictures[:3]] == [
        *("test row 4321: cat, taken for dog", "training row 7: dog", "training row 8: eel")
    ]
    assert "Pictures" not in page(tmp_path, details={**DETAILS, "examples": []})


def tables_as_csv(text):
    links = [link for link in Outline(text).addresses if link.startswith("data:text/csv")]
    return [[*csv.reader(io.StringIO(unquote(link.partition(",")[2])))] for link in links]


def test_every_table_can_be_had_as_csv(tmp_path):
    text = page(tmp_path)
    found = tables_as_csv(text)
    assert len(found) == text.count("<table") > 5
    assert found[0][0][:2] == ["model", "accuracy"]
    assert ["linear model on Fisher features", "69.3 %"] in [row[:2] for row in found[0]]
    assert len(set(re.findall(r'download="([^"]+)"', text))) == len(found)


def test_classes_are_told_by_name_with_what_they_are_taken_for(tmp_path):
    (classes,) = [rows for rows in tables_as_csv(page(tmp_path)) if rows[0][0] == "class"]
    assert classes[0] == [
        *("class", "samples", "base network", "linear model on Fisher features", "most often taken for")
    ]
    assert classes[1:] == [
        ["cat", "100", "60.0 %", "80.0 %", "dog (15.0 %)"],
        ["dog", "100", "70.0 %", "90.0 %", "cat (10.0 %)"],
    ]


def test_of_many_classes_those_that_are_wrong_most_often_are_listed_and_none_is_drawn(tmp_path):
    matrix = np.diag(np.arange(100, 160))
    matrix[7, 3] = 50
    details = {**DETAILS, "confusion": {"base": matrix.tolist(), "fisher_linear": matrix.tolist()}, "class_names": None}
    text = page(tmp_path, details=details)
    (classes,) = [rows for rows in tables_as_csv(text) if rows[0][0] == "class"]
    assert (len(classes), classes[1][0], classes[1][4]) == (51, "7", "3 (31.8 %)")
    assert "the 50 that are wrong most often" in text
    assert not [label for label in Outline(text).labels if "Confusion" in label]


def test_workers_are_told_with_their_rates(tmp_path):
    (workers,) = [rows for rows in tables_as_csv(page(tmp_path)) if rows[0][0] == "worker"]
    assert workers[1:] == [
        ["a (pid 1, cpu)", "12", "12,288", "25.6 s", "480", "0"],
        ["b (pid 2, cpu)", "13", "13,000", "26.0 s", "500", "1"],
    ]


def test_accuracies_that_are_all_the_same_are_drawn_within_what_there_is(tmp_path):
    page(tmp_path, details={**DETAILS, "path": [{"penalty": value, "accuracy": 1.0} for value in (0.1, 1.0)]})
    drawn = ElementTree.parse(tmp_path / "report/figures/penalty.svg")
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    shares = [float(text.removesuffix(" %")) for text in texts if text and text.endswith(" %") and ":" not in text]
    assert shares
    assert max(shares) <= 100


@pytest.mark.parametrize(("given", "shown"), [("\u732b", "\u732b"), ("a\x00b", "a\ufffdb"), ("$x_1$", "$x_1$")])
def test_class_names_of_any_letters_are_drawn(tmp_path, given, shown):
    text = page(tmp_path, details={**DETAILS, "class_names": (given, "dog", "eel")})
    assert f">{shown}<" in text
    drawn = ElementTree.parse(tmp_path / "report/figures/confusions.svg")
    assert shown in {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_figures_take_their_colours_from_the_theme(tmp_path):
    figures = "".join(re.findall(r"<svg.*?</svg>", page(tmp_path), flags=re.DOTALL))
    assert "var(--accent)" in figures
    texts = re.findall(r"<text [^>]*>|<g[^>]*>\s*<text>", figures)
    assert len(texts) > 30
    assert all("fill: var(--ink)" in text for text in texts)  # unsaid, it would be black on a dark page
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href="|url\()#[^")]*', "", figures))


def test_figures_are_files_too_that_look_as_on_a_light_page(tmp_path):
    page(tmp_path)
    drawn = {path.name for path in (tmp_path / "report/figures").iterdir()}
    names = ("accuracy", "confusions", "layers", "penalty", "spectrum", "timeline")
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        with Image.open(tmp_path / f"report/figures/{name}.png") as picture:
            assert picture.width > 900
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
            assert "chart" in picture.info["Description"] or "matrix" in picture.info["Description"]
        text = (tmp_path / f"report/figures/{name}.svg").read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "#1c2127" in text
        assert "var(" not in text


def test_the_timeline_begins_each_stage_where_the_one_before_ended(tmp_path):
    text = page(tmp_path, details={**DETAILS, "seconds": {"base": 40.0, "features": 60.0}})
    assert "one after the other: 100 s in all" in text
    drawn = ElementTree.parse(tmp_path / "report/figures/timeline.svg")
    bars = [
        path.get("d").split() for path in drawn.iter("{http://www.w3.org/2000/svg}path") if "98a5b3" in str(path.attrib)
    ]
    (first, second) = [(float(bar[1]), float(bar[4])) for bar in bars]
    assert first[1] == pytest.approx(second[0], abs=0.1)
    assert (second[1] - second[0]) / (first[1] - first[0]) == pytest.approx(1.5, rel=0.01)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert page(tmp_path / "a") == page(tmp_path / "b")
    for path in (tmp_path / "a/report/figures").iterdir():
        assert path.read_bytes() == (tmp_path / "b/report/figures" / path.name).read_bytes()


HOSTILE = "<script>alert('1')</script> & \"$x_1$\" [bold]"


def test_every_text_is_escaped(tmp_path):
    details = {
        **DETAILS,
        "config": HOSTILE,
        "verdict": HOSTILE,
        "seconds": {HOSTILE: 1.0},
        "layers": [{"name": HOSTILE, "coordinates": 1, "shape": HOSTILE}],
        "skipped": [{"split": HOSTILE, "row": 1, "reason": HOSTILE}],
        "environment": {HOSTILE: HOSTILE},
    }
    text = page(tmp_path, details=details)
    assert "<script" not in text
    outline = Outline(text)
    assert outline.text.count(HOSTILE) == 10
    assert HOSTILE in next(label for label in outline.labels if "stage" in label)


def test_the_metric_is_told_in_numbers_and_each_layers_part_in_it(tmp_path):
    text = page(tmp_path)
    for row in ("coordinates</th><td>2,048", "capture</th><td>93.1%", r"<td>511\.2", "damped</th><td>830"):
        assert re.search(row, text), row
    assert re.search(r"conv1</th><td>64 × 64 × 5 × 5</td><td>2,048</td><td>80.0 %</td><td>81.0 %", text)


def test_parts_with_dampings_of_their_own_and_many_layers_are_drawn(tmp_path):
    metric = copy.deepcopy(DETAILS["metric"])
    metric["parts"] = [{"name": f"l{i}", "eigvals": [1.0 / i, 0.1], "damping": 0.01 * i} for i in range(1, 12)]
    metric["layers"] = [{**metric["layers"][0], "name": f"l{i}", "eigvals": [1.0 / i]} for i in range(1, 12)]
    outline = Outline(page(tmp_path, details={**DETAILS, "metric": metric}))
    assert any("22 eigenvalues from 1 to 0.091, dampings 0.01 to 0.11" in label for label in outline.labels)
    assert any("l1 from 1; " in label and "l8 from 0.12" in label and "l9" not in label for label in outline.labels)
    assert "The 8 layers that have most of it" in outline.text


def test_a_layer_far_below_the_others_is_left_out_of_the_figure(tmp_path):
    metric = copy.deepcopy(DETAILS["metric"])
    metric["layers"] = [*metric["layers"], {**metric["layers"][0], "name": "faint", "eigvals": [1e-9]}]
    metric["layers"].append({**metric["layers"][0], "name": "empty", "eigvals": []})
    labels = Outline(page(tmp_path, details={**DETAILS, "metric": metric})).labels
    assert any("conv1 from 2; head from 0.5." in label for label in labels)


def test_what_was_not_run_is_shown_as_such_and_gradnet_only_when_it_was(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["accuracy"].update(linear_probe=None, trained_on=None, gradnet=0.59)
    results["views"] = 1
    text = page(tmp_path, results)
    assert re.search(r"linear probe on its last hidden layer</th><td>–</td><td>–</td><td>–", text)
    assert re.search(r"GradNet</th><td>59.0 %</td><td>−2.3", text)
    assert "mirror" not in text


def test_a_page_is_written_even_with_hardly_anything_to_tell(tmp_path):
    results = {
        "schema": 1,
        "num_test": 3,
        "num_features": 1,
        "accuracy": {"base": 0.0, "linear_probe": None, "trained_on": None, "fisher_linear": 1.0, "gradnet": None},
        "seconds": {"base": 0.0, "trained_on": None},
        "samples_per_second": {"metric": None},
    }
    empty = {"metric": {}, "path": [], "skipped": [], "layers": [], "verdict": None}
    for details in ({}, empty, {"path": [{"penalty": 1.0, "accuracy": 1.0}]}):
        assert "+100.0" in Outline(page(tmp_path, results, details)).text


def test_a_long_list_of_skipped_rows_is_cut_and_counted(tmp_path):
    skipped = [{"split": "shallow", "row": row, "reason": "label 11 is not in [0, 10)"} for row in range(1250)]
    text = Outline(page(tmp_path, details={**DETAILS, "skipped": skipped})).text
    assert text.count("label 11") == 100
    assert "1,250 rows left out" in text
    assert "And 1,150 more." in text


def test_batches_that_were_cut_for_want_of_memory_are_counted_where_there_were_any(tmp_path):
    words = "Micro-batches cut for want of memory"
    assert f"{words}: 1,250." in Outline(page(tmp_path, details={**DETAILS, "num_halvings": 1250})).text
    assert words not in Outline(page(tmp_path, details={**DETAILS, "num_halvings": 0})).text


def test_the_table_shows_the_same_in_the_terminal():
    text = printed(RESULTS)
    for expected in ("base network", "61.3 %", "+8.6", "69.0 – 70.8 %", "10,000 clean test samples"):
        assert expected in text
    assert "GradNet" not in text
    assert "–" in printed({**RESULTS, "accuracy": {**RESULTS["accuracy"], "trained_on": None}})
