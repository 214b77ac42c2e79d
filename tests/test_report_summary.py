import json

from fisher_ray.config import Config
from fisher_ray.report import summarise
from tests.test_config import minimal


def stages(**replaced):
    made = {
        "base": {"seconds": 10.0, "result": {}},
        "basis": {"seconds": 1.0, "result": {"layers": [{"name": "fc", "shape": [3, 5], "coordinates": 7}]}},
        "metric": {
            "seconds": 3.0,
            "result": {"rank": 8, "num_samples": 400, "trace": 3.0, "fingerprint": "ab"},
        },
        "features/train": {"seconds": 4.0, "result": {"num_rows": 1000}},
        "features/test": {"seconds": 1.0, "result": {"num_rows": 500}},
        "linear": {"seconds": 6.0, "result": {"path": [{"penalty": 0.1, "accuracy": 0.7}]}},
        "trained_on": {"seconds": 15.5, "result": {"correct": 700, "total": 1000, "epochs": 4.25, "steps": 9}},
        "report": {
            "result": {
                "total": 1000,
                "num_classes": 3,
                "correct": {
                    "base": 600,
                    "linear_probe_ridge": 640,
                    "linear_probe_logistic": 655,
                    "fisher_linear": 710,
                },
            }
        },
    }
    return made | replaced


def test_results_are_what_the_stages_counted_and_took():
    results, details = summarise(Config.from_dict(minimal()), stages(), {"python": "3"}, {"test": {7: "torn"}}, 2)

    assert results["accuracy"] == {
        "base": 0.6,
        "linear_probe": 0.64,
        "linear_probe_logistic": 0.655,
        "trained_on": 0.7,
        "fisher_linear": 0.71,
        "gradnet": None,
    }
    assert results["seconds"] == {"base": 10.0, "metric": 4.0, "features": 5.0, "linear": 6.0, "trained_on": 15.5}
    assert results["samples_per_second"] == {"metric": 100.0, "features": 300.0}
    assert (results["num_test"], results["num_features"], results["views"]) == (1000, 24, 1)
    assert details["skipped"] == [{"split": "test", "row": 7, "reason": "torn"}]
    assert details["environment"]["python"] == "3"
    assert details["metric"] == {"trace": 3.0}
    assert details["num_halvings"] == 2


def gradnet_stages():
    """What GradNet's own stages leave behind."""
    fitted = {"num_parameters": 99, "widths": [5, 5], "step": 20, "stored_validation": 0.5, "path": []}
    tested = {"total": 1000, "num_classes": 3, "correct": {"base": 600, "gradnet": 650}}
    return {
        "gradnet/ranges": {"seconds": 1.0, "result": {}},
        "gradnet/entries": {"seconds": 4.0, "result": {"num_rows": 1000, "num_kept": 77}},
        "gradnet": {"seconds": 8.0, "result": fitted},
        "gradnet/validation": {"seconds": 2.0, "result": {"gradnet": 0.66, "base": 0.61, "num_rows": 40}},
        "gradnet/test": {"seconds": 3.0, "result": tested},
    }


def test_gradnet_beside_the_linear_model_has_an_accuracy_and_a_time():
    results, details = summarise(Config.from_dict(minimal(gradnet={})), stages(**gradnet_stages()), {}, {})

    assert (results["accuracy"]["gradnet"], results["accuracy"]["fisher_linear"]) == (0.65, 0.71)
    assert (results["seconds"]["gradnet"], results["num_features"]) == (18.0, 24)
    assert results["samples_per_second"]["gradnet entries"] == 250.0
    assert details["verdict"].startswith("The linear model on Fisher features gets 71.0 %")
    assert (details["gradnet"]["validation"], details["gradnet"]["base"]) == (0.66, 0.61)


def test_of_gradnet_alone_there_are_results_without_metric_and_features():
    made = gradnet_stages() | {"base": {"seconds": 1.0, "result": {}}}
    made["report"] = {"result": made["gradnet/test"]["result"]}
    results, details = summarise(Config.from_dict(minimal(linear={"model": "gradnet"})), made, {}, {})

    assert results["accuracy"] == {
        "base": 0.6,
        "linear_probe": None,
        "trained_on": None,
        "fisher_linear": None,
        "gradnet": 0.65,
    }
    assert results["num_features"] == 77
    assert results["seconds"]["metric"] == 0.0
    assert details["verdict"] == ("GradNet gets 65.0 % of 1,000 test samples right: 5.0 points above the base network.")


def test_the_verdict_names_the_best_probe_and_says_what_is_worse():
    made = stages(trained_on={"seconds": 1.0, "result": {"correct": 730, "total": 1000, "epochs": 4.25}})
    _, details = summarise(Config.from_dict(minimal()), made, {}, {})

    assert details["verdict"] == (
        "The linear model on Fisher features gets 71.0 % of 1,000 test samples right: 11.0 points above the base "
        "network, 5.5 points above the best linear probe and 2.0 points below the base network trained on for the same "
        "time (4.2 passes over the same data)."
    )


def test_training_on_that_diverged_or_was_left_out_has_no_accuracy():
    for result, ending in [({"correct": None, "total": 0, "epochs": 0.1}, "diverged."), (None, "best linear probe.")]:
        made = stages()
        made["trained_on"] = {"seconds": 1.0, "result": result}
        if result is None:
            del made["trained_on"]
        results, details = summarise(Config.from_dict(minimal()), made, {}, {})
        assert results["accuracy"]["trained_on"] is None
        assert details["verdict"].endswith(ending)


def test_the_probe_beside_a_logistic_model_is_logistic():
    config = Config.from_dict(minimal(linear={"model": "logistic"}))
    results, _ = summarise(config, stages(), {}, {})

    assert (results["accuracy"]["linear_probe"], results["accuracy"]["linear_probe_ridge"]) == (0.655, 0.64)


def test_a_time_that_was_asked_for_is_not_called_the_same():
    config = Config.from_dict(minimal(trained_on={"seconds": 90.0}))
    _, details = summarise(config, stages(), {}, {})

    assert "the base network trained on for 90 s (" in details["verdict"]


def test_a_network_without_a_hidden_layer_is_compared_without_a_probe():
    made = stages()
    made["report"]["result"]["correct"] = {"base": 710, "fisher_linear": 710}
    del made["trained_on"]
    results, details = summarise(Config.from_dict(minimal()), made, {}, {})

    assert results["accuracy"]["linear_probe"] is None
    assert details["verdict"] == (
        "The linear model on Fisher features gets 71.0 % of 1,000 test samples right: 0.0 points above the base "
        "network."
    )


def test_skipped_rows_are_listed_by_split_in_their_order():
    skipped = {"shallow": {9: "torn", 2: "NaN"}, "test": {}}
    _, details = summarise(Config.from_dict(minimal()), stages(), {}, skipped)

    assert [(item["split"], item["row"]) for item in details["skipped"]] == [("shallow", 2), ("shallow", 9)]


def test_one_score_a_sample_gives_as_many_features_as_the_rank():
    config = Config.from_dict(minimal(scores={"labels": "sampled"}))

    assert summarise(config, stages(), {}, {})[0]["num_features"] == 8


def test_stages_that_took_no_time_have_finite_rates():
    made = stages()
    for record in made.values():
        record["seconds"] = 0.0
    results, _ = summarise(Config.from_dict(minimal()), made, {}, {})

    assert json.loads(json.dumps(results, allow_nan=False)) == results
