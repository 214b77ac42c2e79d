"""Whole runs on what users have: folders of pictures, and a network of transformers by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

import fisher_ray
from fisher_ray import pipeline
from fisher_ray.config import Config
from fisher_ray.data.digits import SPLITS
from fisher_ray.data.digits import digits as load_digits
from fisher_ray.errors import ConfigError, ModelError
from fisher_ray.models import digits_transform
from tests.integration.runs import DEMO, QUICK, Listening, bits, digits

FOLDERS = '{{format: images, path: "{}"}}'


def pixels(image: Image.Image, generator: torch.Generator | None) -> torch.Tensor:
    return digits_transform(np.asarray(image.convert("L"), np.float32) / 240, generator)


def write_folders(place: Path) -> None:
    for split in SPLITS:
        parts = load_digits(split)
        for row in range(len(parts)):
            picture, label = parts[row]
            folder = place / split / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 240).astype(np.uint8)).save(folder / f"{row:04d}.png")


@pytest.mark.slow
def test_a_run_on_folders_of_pictures(ray_session, tmp_path):
    write_folders(tmp_path)
    data = [f"data.{split}={FOLDERS.format(split)}" for split in SPLITS]
    data += [f"data.root={tmp_path}", "data.transform=tests.integration.test_sources:pixels"]
    results = fisher_ray.run(digits(tmp_path / "run", *data))
    accuracy = results["accuracy"]
    assert results["num_test"] == 597
    assert accuracy["fisher_linear"] > max(0.9, accuracy["base"] + 0.1)
    again = Listening()
    assert pipeline.run(digits(tmp_path / "run", *data), progress=again)["accuracy"] == accuracy
    assert again.stages == []
    Image.new("L", (8, 8)).save(tmp_path / "shallow/class 3/another.png")
    with pytest.raises(fisher_ray.ResumeMismatchError, match="data"):
        pipeline.run(digits(tmp_path / "run", *data), progress=Listening())


def vit(place: Path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))
    model.save_pretrained(place)
    return str(place)


def with_vit(output: Path, place: str, *overrides: str) -> Config:
    factory = "transformers:AutoModelForImageClassification.from_pretrained"
    model = f"{{factory: '{factory}', kwargs: {{pretrained_model_name_or_path: '{place}'}}, pretrained: true}}"
    quick = [key for key in QUICK if not key.startswith("base.")]
    return Config.from_yaml(DEMO, [*quick, "base=null", f"model={model}", f"output={output}", *overrides])


@pytest.mark.slow
def test_a_run_with_a_network_of_transformers_by_its_name(ray_session, tmp_path):
    place = vit(tmp_path / "vit")
    results = fisher_ray.run(with_vit(tmp_path / "run", place, "runtime.num_workers=2"))
    accuracy = results["accuracy"]
    assert accuracy["base"] < 0.4  # of weights that were never trained
    assert accuracy["fisher_linear"] > 0.8
    one = with_vit(tmp_path / "one", place)
    fisher_ray.run(one.model_copy(update={"trained_on": None}))
    changing = ("report/", "linear/predictions")
    kept = [
        {name: digest for name, digest in bits(tmp_path / run).items() if not name.startswith(changing)}
        for run in ("run", "one")
    ]
    assert kept[0] == kept[1]


def test_a_network_is_trained_here_or_loaded_or_comes_trained_and_only_one_of_these(tmp_path):
    for wrong in ("base={steps: 1}", "model.checkpoint=x.pt", "model.pretrained=false"):
        with pytest.raises(ConfigError, match="only one of them"):
            with_vit(tmp_path / "run", "anywhere", wrong)


def test_a_pretrained_network_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"from_pretrained' called with .* raised OSError"):
        fisher_ray.run(with_vit(tmp_path / "run", str(tmp_path / "nothing")))
