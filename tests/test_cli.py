import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import ray
import typer
from rich.console import Console

from fisher_ray import __version__
from fisher_ray.cli import job, main
from fisher_ray.cli.commands import EXAMPLES
from fisher_ray.cli.exits import error_exits
from fisher_ray.config import Config
from fisher_ray.errors import ConfigError, DataError, FisherRayError, StoppedError
from fisher_ray.progress import JsonProgress, duration, show_progress
from fisher_ray.records import Receipt, Unit

ROOT = Path(__file__).parents[1]
CIFAR10 = str(ROOT / "jobs" / "configs" / "cifar10.yaml")
COMMANDS = ["run", "fit-metric", "write-features", "train", "evaluate", "plan", "verify", "inspect", "demo", "init"]
COMMANDS += ["score", "audit"]
JOBS = {
    "run.py": "run",
    "fit_metric.py": "fit-metric",
    "write_features.py": "write-features",
    "train_linear.py": "train",
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def exit_code(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_help_names_every_command(capsys):
    assert exit_code(["--help"]) == 0

    words = capsys.readouterr().out.split()
    assert [command for command in COMMANDS if command not in words] == []


@pytest.mark.parametrize("command", ["run", "fit-metric", "write-features", "train", "evaluate", "demo"])
def test_every_running_command_takes_the_same_options(command, capsys):
    assert exit_code([command, "--help"]) == 0

    words = capsys.readouterr().out.split()
    options = ["--output", "--set", "--address", "--fresh", "--debug", "--quiet", "--json"]
    assert [option for option in options if option not in words] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_on_a_line_of_its_own(command, capsys):
    assert exit_code([command, "--help"]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [example for example in EXAMPLES[command] if f"Example: {example}" not in shown] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen commands, one after the other
def test_the_examples_of_the_help_work_one_after_the_other(ray_session, tmp_path):
    assert set(EXAMPLES) == set(COMMANDS)
    shutil.copy(ROOT / "jobs/configs/digits.yaml", tmp_path)
    cluster = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # else each would start one, for seconds
    environment = os.environ | cluster | {"PYTHONPATH": str(ROOT)}
    for line in (line for name, lines in EXAMPLES.items() if name != "demo" for line in lines):  # which others try
        program, *arguments = line.split()
        assert program == "fisher-ray"
        command = [sys.executable, "-m", "fisher_ray", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        if "--json" in arguments:
            *events, last = map(json.loads, done.stdout.splitlines())
            assert {event["event"] for event in events} >= {"stage started", "stage done", "note"}
            assert (last["event"], last["results"]["num_test"]) == ("done", 597)
    assert (tmp_path / "runs/digits/report/report.html").exists()


def test_init_writes_a_configuration_and_its_schema_and_overwrites_none(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert exit_code(["init", str(path)]) == 0
    assert f"fisher-ray plan {path}" in capsys.readouterr().out.replace("\n", " ")
    assert Config.from_yaml(path).output == "runs/first"
    schema = path.read_text().split("$schema=")[1].split()[0]
    assert "metric" in json.loads((tmp_path / schema).read_text())["properties"]
    assert exit_code(["init", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert exit_code(["init", str(tmp_path / "nowhere" / "mine.yaml")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_completion_can_be_had_for_the_shell():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "_FISHER_RAY_COMPLETE": "complete_bash"}
    words = {"COMP_WORDS": "fisher-ray pl", "COMP_CWORD": "1"}
    program = "from fisher_ray.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment | words,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["plan"]


def test_help_takes_under_half_a_second():
    # CPU time, the best of three: the wall's clock is also the other processes'.
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python("-m", "fisher_ray", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(spent) < 0.5


def test_the_command_line_loads_nothing_that_computes():
    done = python("-c", "import sys, fisher_ray, fisher_ray.cli; print(*sys.modules)")

    assert {"torch", "ray", "zarr", "numpy", "pyarrow", "matplotlib", "pydantic"} & set(done.stdout.split()) == set()
    assert "fisher_ray.cli.commands" in done.stdout.split()


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "gone.yaml"], ["gone.yaml", "No such file"]),
        (["run", CIFAR10, "--set", "metric.rnk=3"], ["'metric.rnk'", "'rank'"]),
        (["train", CIFAR10, "--set", "seed=1", "--set", "linear.views=7"], ["linear.views", "7"]),
        (["plan", CIFAR10, "--set", "linear"], ["--set", "'linear'"]),
        (["demo", "--set", "metric.rnk=3"], ["'metric.rnk'", "'rank'"]),
    ],
)
def test_a_wrong_request_ends_with_code_2_and_one_paragraph(arguments, words, capsys):
    assert exit_code(arguments) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert [word for word in words if word not in shown.err] == []


@pytest.mark.parametrize("arguments", [["run"], ["run", CIFAR10, "--nope"], ["nope"], []])
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    assert exit_code(arguments) == 2

    shown = capsys.readouterr().err
    assert "Usage: fisher-ray" in shown
    assert "Traceback" not in shown


def test_debug_adds_the_traceback_and_the_error_stays_last(capsys):
    assert exit_code(["run", "gone.yaml", "--debug"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: configuration gone.yaml")


@pytest.mark.parametrize("output", ["s3://bucket/run", "12", "a: b", "null", 'it\'s "quoted"'])
def test_output_is_taken_as_text_whatever_it_looks_like(output):
    from fisher_ray.cli.commands import _read

    assert _read(Path(CIFAR10), ["output=other"], output).output == output


@pytest.mark.parametrize("script", JOBS)
def test_a_job_takes_its_configuration_as_an_option_and_fails_as_the_command_does(script):
    done = python(str(ROOT / "jobs" / script), "--config", CIFAR10, "--set", "metric.rnk=3")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'metric.rnk'; did you mean 'rank'?\n"


@pytest.mark.parametrize("command", JOBS.values())
def test_a_job_without_a_configuration_is_refused(command, capsys):
    with pytest.raises(SystemExit) as caught:
        job(command, [])

    assert caught.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FisherRayError("x"), 1, "x"),
        (ConfigError("two\n  lines"), 2, "two lines"),
        (DataError("a.parquet row 3: no picture", row=3), 3, "a.parquet row 3: no picture"),
        (StoppedError("x"), 4, "x"),
        (KeyboardInterrupt(), 4, "interrupted before the end. Run the same command again to resume."),
        (SystemExit(signal.SIGTERM), 4, "interrupted before the end. Run the same command again to resume."),
        (KeyError("k"), 1, "unexpected KeyError: 'k'. Run again with --debug for the traceback."),
    ],
)
def test_a_failure_becomes_an_exit_code_and_a_message(error, code, message, capsys):
    with pytest.raises(typer.Exit) as caught, error_exits():
        raise error

    assert caught.value.exit_code == code
    assert capsys.readouterr().err == f"error: {message}\n"


def test_another_exit_passes_through():
    with pytest.raises(SystemExit) as caught, error_exits():
        sys.exit(7)

    assert caught.value.code == 7


def test_sigterm_ends_the_command_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as caught, error_exits():
        signal.raise_signal(signal.SIGTERM)

    assert caught.value.exit_code == 4
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_exits_with_code_4(number):
    program = f"""
        import os, threading, typer
        from fisher_ray.cli.exits import error_exits
        app = typer.Typer()
        @app.command()
        def wait():
            with error_exits():
                os.kill(os.getpid(), {int(number)})
                threading.Event().wait(30)
        app()
    """
    done = python("-c", textwrap.dedent(program))

    assert done.returncode == 4
    assert done.stderr.startswith("error: interrupted")


def hear(console: Console) -> None:
    with show_progress(console) as progress:
        progress.stage_started("metric", 2)
        progress.note("unit 0 runs again: [worker] lost")
        for index in range(2):
            progress.unit_done("metric", Receipt(Unit(index, 64 * index, 64 * index + 64)))
        progress.stage_done("metric", 1.25)
        progress.stage_started("linear", None)
        progress.stage_done("linear", 2.0)


def test_progress_outside_a_terminal_is_plain_lines():
    stream = io.StringIO()
    hear(Console(file=stream, force_terminal=False, width=20))

    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["metric: started, 2 units", "unit 0 runs again: [worker] lost"]
    assert lines[2].startswith("metric: 2/2 units, 128 rows, ")  # the first unit was within the interval
    assert lines[3:] == ["metric: done in 1.2 s", "linear: started", "linear: done in 2.0 s"]


def receipt(index: int, num_bytes: int = 0, attempt: int = 1) -> Receipt:
    return Receipt(Unit(index, 64 * index, 64 * index + 64), attempt, {}, num_bytes, f"worker {index % 2}")


def test_a_stage_says_how_far_it_is_in_words(monkeypatch):
    monkeypatch.setattr("fisher_ray.progress.LINE_INTERVAL_S", 0.0)
    stream = io.StringIO()
    with show_progress(Console(file=stream, force_terminal=False)) as progress:
        progress.stage_started("features", 3)
        for index in range(3):
            progress.unit_done("features", receipt(index, 10**6, attempt=1 + (index == 1)))
    first, second, last = stream.getvalue().splitlines()[1:]
    words = r"{}/3 units, {} rows, [\d,]+ rows/s, [\d.]+ \wB/s"
    assert re.fullmatch(f"features: {words.format(1, 64)}, 0 s left", first)
    assert re.fullmatch(f"features: {words.format(2, 128)}, 0 s left, 2 workers, 1 retried", second)
    assert re.fullmatch(f"features: {words.format(3, 192)}, 2 workers, 1 retried", last)


def test_json_lines_tell_the_same_in_plain_values():
    stream = io.StringIO()
    progress = JsonProgress(stream, clock=lambda: 5.0)
    progress.stage_started("features", 2)
    progress.note("unit 0 runs again: [worker] lost")
    progress.unit_done("features", receipt(0, 100))
    progress.unit_done("features", receipt(1, 100, attempt=2))
    progress.stage_done("features", 1.25)
    progress.stage_started("base", None)
    progress.advanced("base", 10, 10, "steps, loss 1.2")
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in told] == [
        *("stage started", "note", "units done", "stage done", "stage started", "advanced")
    ]
    assert {line["time"] for line in told} == {5.0}
    assert told[2].pop("rows_per_second") > 0 < told[2].pop("bytes_per_second")
    counts = {"units": 2, "total": 2, "rows": 128, "bytes": 200, "seconds_left": 0.0, "workers": 2, "retries": 1}
    assert told[2] == {"event": "units done", "time": 5.0, "stage": "features", **counts}
    words = {"stage": "base", "done": 10, "total": 10, "text": "steps, loss 1.2"}
    assert told[5] == {"event": "advanced", "time": 5.0, **words}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")]
)
def test_a_time_is_told_in_the_unit_that_it_is_spoken_of_in(seconds, words):
    assert duration(seconds) == words


def test_progress_in_a_terminal_is_a_live_view():
    stream = io.StringIO()
    hear(Console(file=stream, force_terminal=True, width=100, color_system=None))

    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.endswith("unit 0 runs again: [worker] lost")] != []
    assert "2/2" in [line for line in lines if "metric" in line][-1]
    assert "1/1" in [line for line in lines if "linear" in line][-1]


NEAR = [{"row": 31, "label": 2, "score": 0.125}, {"row": 7, "label": 1, "score": 0.0625}]
SCORES = {
    "place": "runs/one/scores/some",
    "class_names": ["cat", "dog", "eel"],
    "num_queries": 6,
    "num_rows": 50,
    "shown": [{"row": 3, "label": 0, "taken": 1, "highest": NEAR, "lowest": NEAR[:1]}],
}
SUSPECT = {"index": 1234, "label": 1, "suggested": 2, "margin": -0.75, "probability": 0.0123}
AUDIT = {"place": "runs/one/audit", "class_names": None, "num_rows": 5000, "num_against": 1234, "shown": [SUSPECT]}


@pytest.fixture
def asked(monkeypatch):
    """What the two questions were asked with, which are answered at once."""
    heard = []

    def answer(found):
        def question(*arguments, progress, **given):
            heard.append((*arguments, given))
            progress.note("a note")
            return found

        return question

    monkeypatch.setattr("fisher_ray.attribution.score", answer(SCORES))
    monkeypatch.setattr("fisher_ray.attribution.audit", answer(AUDIT))
    return heard


def test_scores_are_asked_for_and_told_as_a_table(asked, capsys):
    options = ["--queries", "{format: images, path: photos}", "--rows", "3:9", "--by", "influence", "--top", "2"]
    options += ["--target", "taken", "--full", "--name", "some", "--set", "runtime.num_workers=2", "--fresh"]
    assert exit_code(["score", "runs/one", *options, "--address", "auto"]) == 0

    ((run, queries, given),) = asked
    assert (run, queries) == ("runs/one", {"format": "images", "path": "photos"})
    assert given.items() >= {"rows": (3, 9), "by": "influence", "top": 2, "target": "taken", "full": True}.items()
    assert given.items() >= {"name": "some", "address": "auto", "fresh": True}.items()
    assert list(given["overrides"]) == ["runtime.num_workers=2"]
    told = capsys.readouterr()
    words = ["most helpful", "most harmful", "cat", "31 eel 0.125", "7 dog 0.0625"]
    assert [word for word in words if word not in told.out] == []
    assert told.out.splitlines()[-1] == "report: runs/one/scores/some/report.html"
    assert "a note" in told.err


def test_scores_are_by_default_of_all_test_rows(asked):
    assert exit_code(["score", "runs/one", "--quiet"]) == 0
    ((_, queries, given),) = asked
    assert queries == "test"
    assert given.items() >= {"rows": None, "by": "kernel", "top": 10, "target": "label", "full": False}.items()
    assert given.items() >= {"name": None, "address": None, "fresh": False, "overrides": ()}.items()


def test_an_audit_is_asked_for_and_told_as_a_table(asked, capsys):
    assert exit_code(["audit", "runs/one", "--top", "7", "--set", "runtime.num_workers=1", "--quiet"]) == 0
    ((run, given),) = asked
    assert (run, given.pop("overrides")) == ("runs/one", ["runtime.num_workers=1"])
    assert given == {"top": 7, "address": None, "fresh": False}
    told = capsys.readouterr().out
    words = ["1234", "suggested", "-0.750", "0.012", "1,234 of 5,000 training samples are taken for another class"]
    assert [word for word in words if word not in told] == []
    assert told.splitlines()[-1] == "report: runs/one/audit/report.html"


@pytest.mark.parametrize(("command", "found"), [("score", SCORES), ("audit", AUDIT)])
def test_answers_are_told_as_json_lines(asked, command, found, capsys):
    assert exit_code([command, "runs/one", "--json"]) == 0
    note, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert (note["event"], note["text"]) == ("note", "a note")
    assert done.pop("time") > 0
    assert done == {"event": "done", "place": found["place"], "results": found}


@pytest.mark.parametrize("command", ["score", "audit"])
@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("x"), 2), (DataError("x"), 3), (StoppedError("x"), 4), (KeyboardInterrupt(), 4), (KeyError("x"), 1)],
)
def test_a_question_that_fails_ends_with_the_code_of_its_failure(monkeypatch, command, error, code, capsys):
    def fail(*arguments, **given):
        raise error

    monkeypatch.setattr(f"fisher_ray.attribution.{command}", fail)
    assert exit_code([command, "runs/one"]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")


def test_verify_and_inspect_refuse_what_is_no_store(tmp_path, capsys):
    for command in ("verify", "inspect"):
        assert exit_code([command, str(tmp_path / "gone")]) == 3
        assert str(tmp_path / "gone") in capsys.readouterr().err


def test_verify_names_a_changed_chunk_and_inspect_describes_a_whole_store(tmp_path, capsys):
    import numpy as np

    from fisher_ray.store import save_arrays

    url = str(tmp_path / "metric.zarr")
    save_arrays(url, {"eigvals": np.arange(64.0)}, {"damping": 0.5})
    assert exit_code(["verify", url]) == 0
    assert exit_code(["inspect", url]) == 0
    assert "eigvals" in capsys.readouterr().out

    chunk = next(
        path
        for path in (tmp_path / "metric.zarr" / "eigvals").rglob("*")
        if path.is_file() and path.name != "zarr.json"
    )
    raw = bytearray(chunk.read_bytes())
    raw[3] ^= 1
    chunk.write_bytes(raw)
    assert exit_code(["verify", url]) == 3
    shown = capsys.readouterr()
    assert "eigvals" in shown.out
    assert shown.err.startswith(f"error: {url} does not hold what was written: 1 problem")
