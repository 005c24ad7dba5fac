"""The rules of the house that a machine can check."""

from __future__ import annotations

import configparser
import dataclasses
import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import contract.settings

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("contract", "launcher", "workers", "analysis")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
MODULES = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]


def test_no_module_is_a_drawer_and_none_is_long():
    forbidden = {"utils", "util", "misc", "common", "helpers", "base", "core", "tools"}
    assert not [path for path in MODULES if path.stem in forbidden or path.parent.name in forbidden]
    long = {str(path.relative_to(ROOT)): n for path in MODULES if (n := len(path.read_text().splitlines())) > 450}
    assert not long


def test_nothing_below_tests_is_a_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_setup_cfg_lists_every_package():
    listed = set(SETUP["options"]["packages"].split()) - {"launcher.configs"}
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for name in PACKAGES for p in (ROOT / name).rglob("__init__.py")
    }
    assert listed == found


def test_every_folder_says_what_belongs_in_it():
    empty = [p for name in PACKAGES for p in (ROOT / name).rglob("__init__.py") if not p.read_text().startswith('"""')]
    assert not empty


def test_no_other_distribution_owns_our_top_level_names():
    owners = importlib.metadata.packages_distributions()
    assert not {name: owners[name] for name in PACKAGES if set(owners.get(name, ["sightline"])) - {"sightline"}}


def test_changelog_opens_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert first is not None
    assert first[1] == SETUP["metadata"]["version"]


def tracked(*patterns: str) -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, text=True, capture_output=True, check=False)
    return [ROOT / name for name in out.stdout.split("\0") if name] if out.returncode == 0 else []


def test_relative_links_in_markdown_lead_somewhere():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in tracked("*.md") or [ROOT / "README.md"]
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert not broken


def test_goldens_stay_below_ten_megabytes():
    assert sum(p.stat().st_size for p in (ROOT / "tests" / "golden").rglob("*") if p.is_file()) < 10e6


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    values.pop("defaults", None)
    return values


@pytest.mark.parametrize("worker", contract.settings.workers())
def test_yaml_and_settings_have_the_same_keys_and_defaults(worker):
    cls = contract.settings.of(worker)
    shared = {f.name for f in dataclasses.fields(contract.settings.Settings)} - {"worker"}
    said = read_yaml(ROOT / "configs" / "worker" / f"{worker}.yaml")
    missing = {key: "to be given" for key, value in said.items() if value == "???"}
    built = contract.settings.build(cls, {**said, **missing})
    declared = contract.settings.plain(cls(worker=worker, **missing))
    assert leaves(contract.settings.plain(built)) == leaves(declared)
    assert set(leaves(said)) == set(leaves({k: v for k, v in declared.items() if k not in shared}))


def test_every_worker_has_settings_and_a_yaml():
    workers = {p.stem for p in (ROOT / "workers").glob("*.py")} - {"__init__"}
    assert workers == set(contract.settings.workers()) == {p.stem for p in (ROOT / "configs" / "worker").glob("*.yaml")}


def test_the_default_environment_is_that_of_the_settings():
    said = read_yaml(ROOT / "configs" / "env" / "default.yaml")
    assert said == contract.settings.plain(contract.settings.Env())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_data_yaml_has_every_key_and_a_loader(path):
    said = read_yaml(path)
    contract.settings.build(contract.settings.Data, said)
    assert set(said) == {f.name for f in dataclasses.fields(contract.settings.Data)}
    assert (ROOT / "workers" / "data" / f"{said['name']}.py").is_file()


def test_shared_keys_of_the_top_config_are_those_of_the_settings():
    shared = contract.settings.plain(contract.settings.Settings(worker="main_lmim"))
    said = read_yaml(ROOT / "configs" / "config.yaml")
    assert said == {k: v for k, v in shared.items() if k not in ("worker", "data", "env")}
