"""Ray's own launcher with ``cluster/aws.yaml``, in front of an AWS that moto plays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private import providers
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS

CONFIG = Path(__file__).parents[2] / "cluster" / "aws.yaml"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher writes a key there
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-west-2"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        for name in ("fisher-ray-head", "fisher-ray-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=name)
        yield _bootstrap_config(yaml.safe_load(CONFIG.read_text()), no_config_cache=True)
        providers._provider_instances.clear()


def launch(config: dict[str, Any], group: str) -> Any:
    provider = providers._get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    tags = dict.fromkeys((TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS), group)
    (instance,) = provider.create_node(config["available_node_types"][group]["node_config"], tags, 1).values()
    return instance


def test_ray_starts_a_head_without_work_and_spot_workers_with_gpus(config):
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert (
        config["available_node_types"]["gpu"]["resources"].items()
        >= {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}.items()
    )
    head, gpu = launch(config, "head"), launch(config, "gpu")
    assert (head.instance_lifecycle, gpu.instance_lifecycle) == (None, "spot")
    assert head.iam_instance_profile["Arn"].endswith("/fisher-ray-head")
    assert gpu.iam_instance_profile["Arn"].endswith("/fisher-ray-worker")
    assert head.security_groups == gpu.security_groups
