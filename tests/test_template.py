import json
import re
from collections.abc import Iterator

import jsonschema
import pytest
import yaml

from fisher_ray.config import Config, ConvergenceConfig, GradNetConfig, TrainedOnConfig, schema, template
from fisher_ray.config.template import WIDTH
from tests.test_config import CONFIGS

TEXT = template("fisher_ray.schema.json")


def uncommented(text: str) -> str:
    return re.sub(r"^( *)#(?=\w+:)", r"\1", text, flags=re.MULTILINE)


def test_the_template_is_a_configuration_with_the_defaults():
    config = Config.from_dict(yaml.safe_load(TEXT))
    assert config.model_dump(exclude_unset=True) == {
        "output": "runs/first",
        "data": {
            "train": {"format": "parquet", "path": "train-*.parquet", "rows": (0, 25000)},
            "shallow": {"format": "parquet", "path": "train-*.parquet", "rows": (25000, 50000)},
            "test": {"format": "parquet", "path": "test-*.parquet"},
            "transform": "fisher_ray.models:paper_transform",
        },
        "model": {"factory": "fisher_ray.models:paper_cnn"},
        "base": {"steps": 1800},
    }


def test_what_is_commented_out_has_every_key_with_its_default():
    whole = Config.from_dict(yaml.safe_load(uncommented(TEXT)))
    added = {"gradnet": GradNetConfig(), "trained_on": TrainedOnConfig(convergence=ConvergenceConfig())}
    assert whole == Config.from_dict(yaml.safe_load(TEXT)).model_copy(update=added)
    assert whole.model_fields_set == set(Config.model_fields)
    for name in ("data", "base", "scores", "compression", "metric", "store", "linear", "gradnet", "runtime"):
        section = getattr(whole, name)
        assert section.model_fields_set == set(type(section).model_fields)


def described(node: object) -> Iterator[tuple[str, str | None]]:
    if isinstance(node, dict):
        for name, field in node.get("properties", {}).items():
            yield name, field.get("description")
        for value in node.values():
            yield from described(value)


def test_every_key_says_what_it_means():
    sections = set(schema()["properties"]) - {"output", "seed", "gradnet", "trained_on"}  # their classes say it
    assert {name for name, text in described(schema()) if not text} <= sections
    assert max(map(len, TEXT.splitlines())) <= WIDTH + 2


def test_the_schema_takes_what_the_configuration_takes():
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    for path in (CONFIGS / "cifar10.yaml", CONFIGS / "digits.yaml"):
        validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(yaml.safe_load(TEXT))
    wrong = yaml.safe_load(TEXT) | {"metrik": {}}
    with pytest.raises(jsonschema.ValidationError, match="metrik"):
        validator.validate(wrong)
    assert json.loads(json.dumps(schema())) == schema()


def test_the_schema_knows_that_yaml_reads_the_word_true_as_a_value():
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(yaml.safe_load(TEXT) | yaml.safe_load("scores: {labels: true}"))
