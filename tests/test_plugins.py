import os
import sys

import pytest

from fisher_ray.errors import ConfigError
from fisher_ray.plugins import load_reference


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    for name in [name for name in sys.modules if name.startswith("plugin_of_test")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("plugin_of_test")]:
        del sys.modules[name]


def test_names_inside_modules_and_classes_are_found():
    assert load_reference("os.path:join", "k") is os.path.join
    assert load_reference("fisher_ray.config:Config.from_dict", "k").__name__ == "from_dict"


def test_a_module_in_the_working_directory_is_found(folder):
    (folder / "plugin_of_test_a.py").write_text("def make():\n    return 5\n")
    assert load_reference("plugin_of_test_a:make", "model.factory")() == 5
    load_reference("plugin_of_test_a:make", "model.factory")
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize("reference", ["os.path", ":join", "os:", "os:path:join", "os.path:join()", "../x:y", ""])
def test_another_form_is_refused(reference):
    with pytest.raises(ConfigError, match=r"model.factory: .* is not of the form module:name"):
        load_reference(reference, "model.factory")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("plugin_of_test_none:make", "ModuleNotFoundError: No module named 'plugin_of_test_none'"),
        ("os.path:absent", "has no 'absent'"),
    ],
)
def test_what_is_missing_is_named(folder, reference, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_reference(reference, "model.factory")
    assert str(caught.value).startswith(f"model.factory: {reference!r}")


def test_an_error_inside_the_module_is_shown_and_kept_as_the_cause(folder):
    (folder / "plugin_of_test_b.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero") as caught:
        load_reference("plugin_of_test_b:make", "data.transform")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
