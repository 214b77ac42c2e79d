"""What the files under ``cluster/`` say, against the structures that Ray, the clouds and Kubernetes take."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import ray
import yaml
from botocore.exceptions import ParamValidationError
from botocore.validate import validate_parameters
from packaging.requirements import Requirement
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from fisher_ray.config import Config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ["aws.yaml", "gcp.yaml", "on_premises.yaml"]
"""For ``ray up``."""
APPLIED = ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml", "kuberay/service_account.yaml"]
"""For ``kubectl apply``."""
OWN_NAMES = {"annotations", "env_vars", "limits", "rayStartParams", "requests"}
"""Mappings whose keys are the user's, not the structure's."""


@cache
def text(name: str) -> str:
    return (CLUSTER / name).read_text()


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@cache
def structure(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "structures" / f"{name}.json").read_text())


def check(value: Any, definition: str, name: str) -> None:
    found = structure(name)
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": found["$defs"]}).validate(value)


def check_launched(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def check_applied(document: dict[str, Any]) -> None:
    check(document, document.get("kind", "RayCluster"), "kuberay")


@cache
def run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def check_instance(provider: str, node: dict[str, Any]) -> None:
    if provider == "gcp":
        check(node, "Instance", "compute")
    else:
        validate_parameters({**node, "MinCount": 1, "MaxCount": 1}, run_instances())


def cluster_spec(name: str) -> dict[str, Any]:
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def start_commands(name: str) -> list[str]:
    """Return the commands that start Ray, Ray's own defaults included where a file leaves them."""
    config = prepare_config(load(name))
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def misspellings(value: Any) -> Iterator[Any]:
    """Yield a copy of ``value`` for each key of the structure, at any depth, with that key misspelled."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {(f"{key}x" if name == key else name): kept for name, kept in value.items()}
            if key not in OWN_NAMES:
                yield from ({**value, key: wrong} for wrong in misspellings(inner))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], wrong, *value[place + 1 :]] for wrong in misspellings(inner))


def all_refused(check: Callable[[Any], None], value: Any, *refusals: type[Exception]) -> int:
    """Check that every misspelling is refused, and return how many there were."""
    wrongs = [*misspellings(value)]
    for wrong in wrongs:
        with pytest.raises(refusals):
            check(wrong)
    return len(wrongs)


def blocks() -> list[str]:
    """Return the README's shell blocks."""
    return re.findall(r"^```sh\n(.*?)^```$", text("README.md"), re.MULTILINE | re.DOTALL)


def job_commands() -> list[list[str]]:
    """Return the words after ``python jobs/run.py`` of every job that the README or a file submits."""
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    lines.append(load("kuberay/rayjob.yaml")["spec"]["entrypoint"])
    return [shlex.split(line.partition("python jobs/run.py")[2]) for line in lines if "python jobs/run.py" in line]


# -- structure


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_file_and_no_key_misspelled(name):
    config = load(name)
    check_launched(config)
    for key in config.keys() - {"provider"}:  # what a provider may hold is the provider's own affair
        wrong = {(f"{kept}x" if kept == key else kept): value for kept, value in config.items()}
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            check_launched(wrong)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_no_misspelled_way_to_log_in(name):
    config = load(name)
    all_refused(lambda wrong: check_launched({**config, "auth": wrong}), config["auth"], jsonschema.ValidationError)


@pytest.mark.parametrize("group", ["head", "gpu"])
@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_takes_no_misspelled_type_of_node(name, group):
    config = load(name)
    types = config["available_node_types"]
    own = {**types[group], "node_config": {}, "resources": {}}  # what these hold is for the cloud to judge

    def check_type(wrong: dict[str, Any]) -> None:
        check_launched({**config, "available_node_types": {**types, group: wrong}})

    check_type(own)
    assert all_refused(check_type, own, jsonschema.ValidationError) == len(own)


@pytest.mark.parametrize("group", ["head", "gpu"])
@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_the_cloud_takes_the_instance_and_no_key_misspelled(provider, group):
    node = load(f"{provider}.yaml")["available_node_types"][group]["node_config"]
    check_instance(provider, node)
    refusals = ParamValidationError, jsonschema.ValidationError
    assert all_refused(lambda wrong: check_instance(provider, wrong), node, *refusals) > 8


@pytest.mark.parametrize("name", APPLIED)
def test_kubernetes_takes_the_file_and_no_key_misspelled(name):
    document = load(name)
    check_applied(document)
    assert all_refused(check_applied, document, jsonschema.ValidationError) >= 4


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"])
def test_the_autoscaler_understands_the_groups(name):
    resource = {"metadata": {"name": "fisher-ray", "namespace": "default"}, "spec": cluster_spec(name)}
    config = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    assert config["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    assert (config["available_node_types"]["gpu"]["min_workers"], config["max_workers"]) == (0, 8)


def test_the_cluster_of_one_run_is_the_one_that_stays_but_for_the_dashboard():
    one, staying = cluster_spec("kuberay/rayjob.yaml"), cluster_spec("kuberay/raycluster.yaml")
    assert one["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"  # KubeRay's operator asks there
    assert staying["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "127.0.0.1"
    assert one == staying


def test_ray_takes_the_runtime_environment_of_the_run():
    written = yaml.safe_load(load("kuberay/rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert RuntimeEnv(**written)["working_dir"].startswith("s3://")
    assert json.dumps(written["pip"]) in text("README.md")


# -- who works


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_no_work_lands_on_the_head_and_workers_have_gpus_and_come_and_go(name):
    config = prepare_config(load(name))
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    assert gpu["resources"]["GPU"] == 1
    assert (gpu["min_workers"], gpu["max_workers"], config["max_workers"]) == (0, 8, 8)


def test_hosts_that_are_there_are_all_used_by_the_autoscaler_that_can_start_them():
    config = prepare_config(load("on_premises.yaml"))
    (group,) = config["available_node_types"].values()
    assert group["min_workers"] == group["max_workers"] == len(config["provider"]["worker_ips"]) > 0
    (head,) = [command for command in start_commands("on_premises.yaml") if "--head" in command]
    assert "RAY_enable_autoscaler_v2=0" in head.partition("ray start")[0]
    assert {"--num-cpus=0", "--num-gpus=0", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= {*head.split()}


# -- versions


def test_one_version_of_ray_stands_everywhere_and_suits_the_package():
    written = {path.name: path.read_text() for path in CLUSTER.rglob("*") if path.is_file()}
    pins = re.compile(r"(?:\bray\[[\w,]+\]==|rayproject/ray:|rayVersion: \"|\bRay (?:is )?)(\d+\.\d+\.\d+)")
    versions = {name: {*pins.findall(content)} for name, content in written.items()}
    assert versions.pop("service_account.yaml") == set()
    assert versions == {name: {"2.60.0"} for name in versions}
    together = "\n".join(written.values())
    assert (
        len(re.findall(r"image:", together)) == len(re.findall(r"image: rayproject/ray:2\.60\.0-py312-", together)) == 4
    )
    assert len(re.findall(r"pip install", together)) == len(
        re.findall(r'pip install.* "ray\[default,train\]==', together)
    )
    (needed,) = [item for item in map(Requirement, project()["dependencies"]) if item.name == "ray"]
    assert needed.specifier.contains("2.60.0")
    assert needed.specifier.contains(ray.__version__)


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_package_is_installed_with_the_extras_of_ray_that_it_needs(name):
    (install,) = [command for command in load(name)["setup_commands"] if command.startswith("pip install")]
    assert '"ray[default,train]==' in install
    assert install.split()[-1] == "~/.fisher_ray/source"
    mounts = {remote.rpartition("/")[2]: local for remote, local in load(name)["file_mounts"].items()}
    needed = {"fisher_ray", "pyproject.toml", project()["readme"], *project()["license-files"]}
    assert {local for local in mounts.values() if not local.startswith("~")} == needed


# -- safety


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_is_started_with_token_authentication_and_the_token_reaches_every_host(name):
    assert len(start_commands(name)) == 2
    for command in start_commands(name):
        environment = command.partition("ray start")[0].replace(";", " ").split()
        assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= {*environment}
    assert load(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in load(name)["setup_commands"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_dashboard_is_on_the_loopback_address(name):
    (head,) = [command for command in start_commands(name) if "--head" in command]
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]


@pytest.mark.parametrize("name", ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"])
def test_a_cluster_on_kubernetes_asks_for_a_token_and_is_closed_to_the_outside(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]


def test_pods_get_their_rights_by_reference():
    account = load("kuberay/service_account.yaml")["metadata"]["name"]
    for group in groups(cluster_spec("kuberay/raycluster.yaml")):
        (container,) = group["template"]["spec"]["containers"]
        assert group["template"]["spec"]["serviceAccountName"] == account
        assert container["env"] == [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
        assert [*container["envFrom"][0]] == ["secretRef"]


SECRET = re.compile(
    r"(AKIA|ASIA)[0-9A-Z]{16}|PRIVATE KEY|\b[0-9a-f]{32,}\b|gh[pousr]_\w{20}|eyJ[\w-]{20}"
    r"|(?i:(secret_access_key|access_key_id|auth_token|password)['\"]?\s*[=:]\s*['\"]?(?!~/|\$)\w)"
)


@pytest.mark.parametrize(
    "path", sorted(path for path in CLUSTER.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_file_holds_a_secret(path):
    assert SECRET.search(path.read_text()) is None


@pytest.mark.parametrize(
    "line",
    [
        "aws_secret_access_key = wJalr",
        "RAY_AUTH_TOKEN=3f2a",
        "value: 0123456789abcdef0123456789abcdef",
        "AKIAIOSFODNN7EXAMPLE",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_a_secret_would_be_found(line):
    assert SECRET.search(line)


# -- commands


@pytest.mark.parametrize("place", range(5))
def test_the_commands_of_the_readme_are_shell_and_name_paths_that_exist(place):
    block = blocks()[place]
    subprocess.run(["bash", "-n"], input=block.encode(), check=True)
    for word in re.findall(r"(?<![\w/.~-])(?:cluster|jobs|fisher_ray)/[\w./-]*\w", block):
        assert (ROOT / word).exists(), word


def test_every_file_has_its_commands():
    assert len(blocks()) == 6
    commands = "\n".join(blocks())
    for path in CLUSTER.rglob("*.yaml"):
        assert f"cluster/{path.relative_to(CLUSTER)}" in commands


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_commands_of_a_file_are_shell(name):
    config = load(name)
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            subprocess.run(["bash", "-n"], input=command.encode(), check=True)
    for local in config["file_mounts"].values():
        assert local.startswith("~/.ray/") or (ROOT / local).exists()


@pytest.mark.parametrize("words", job_commands(), ids=" ".join)
def test_every_job_has_a_configuration_and_an_output_that_all_hosts_see(words):
    options = list(zip(words[::2], words[1::2], strict=True))
    assert {name for name, _ in options} == {"--config", "--output", "--set"}
    (path,) = [value for name, value in options if name == "--config"]
    (output,) = [value for name, value in options if name == "--output"]
    config = Config.from_yaml(ROOT / path, [value for name, value in options if name == "--set"])
    assert output.startswith(("s3://", "/"))
    assert config.data.root.startswith(("s3://", "/"))


def test_a_job_for_a_cluster_that_scales_says_how_many_workers_it_wants():
    scaling = [words for words in job_commands() if "/shared/runs/cifar10" not in words]
    assert len(scaling) == 4
    for words in scaling:
        config = Config.from_yaml(ROOT / words[1], [word for word in words if word.startswith("runtime.")])
        assert (config.runtime.num_workers, config.runtime.gpus_per_worker) == (8, 1)
        assert config.runtime.wait_s > 600  # a node has to be started, and its packages installed
