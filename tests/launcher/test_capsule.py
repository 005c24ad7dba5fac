import json
import os
import subprocess

import pytest

from contract.settings.checks import SettingsError
from launcher import capsule


def git(root, *words):
    subprocess.run(
        ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True
    )


@pytest.fixture(params=["with git", "without git"])
def root(request, tmp_path):
    root = tmp_path / "code"
    for name in (
        "setup.cfg",
        "workers/main_x.py",
        "workers/models/mask_token.py",
        "tests/test_x.py",
        "with blank; $(x) é.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    if request.param == "with git":
        git(tmp_path, "init", "-q", root)
        (root / ".gitignore").write_text("ignored/\n*.pyc\n")
        git(root, "add", ".")
        git(root, "commit", "-qm", "first")
        (root / "ignored").mkdir()
        (root / "ignored" / "big").write_text("x")
    else:
        (root / ".gitignore").write_text("")
    capsule._is_output.cache_clear()
    return root


def test_a_capsule_holds_the_code_and_not_tests_output_data_links_or_secrets(root, tmp_path):
    for name in (
        ".env",
        "server.pem",
        "id_rsa",
        ".netrc",
        "my_credentials.json",
        "api_token.txt",
        "secrets/a.py",
        "prod.env",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("hush")
    for name in ("mine/capsules/x", "pictures/cat.jpg", "old_runs/submissions/y", "new.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe")
    made = capsule.collect([root / "mine", root / "pictures"], root)
    assert set(made.files) == {
        ".gitignore", "setup.cfg", "workers/main_x.py", "workers/models/mask_token.py", "with blank; $(x) é.txt",
        "new.py",
    }  # fmt: skip
    place = made.store(tmp_path / "out")
    assert (place / "new.py").read_text() == "x"
    assert not [p for p in place.rglob("*") if p.is_file() and p.read_text() == "hush"]


def test_equal_code_is_one_capsule_and_changed_code_another(root, tmp_path):
    first = capsule.collect(root=root)
    place = first.store(tmp_path)
    assert capsule.collect(root=root).store(tmp_path) == place
    (root / "workers/main_x.py").write_text("other")
    second = capsule.collect(root=root).store(tmp_path)
    assert second != place
    assert (place / "workers/main_x.py").read_text() == "workers/main_x.py"  # later edits reach no queued job
    assert sorted(p.name for p in place.parent.iterdir()) == sorted([place.name, second.name])


def test_a_capsule_that_could_not_be_completed_leaves_nothing(root, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    made = capsule.collect(root=root)
    monkeypatch.setattr(capsule.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        made.store(tmp_path / "out")
    assert list((tmp_path / "out" / "capsules").iterdir()) == []


def test_too_much_code_is_refused_with_the_largest_files(root, monkeypatch):
    monkeypatch.setattr(capsule, "CAP_MB", 1)
    (root / "weights.bin").write_bytes(bytes(2**20))
    with pytest.raises(SettingsError, match=r"above 1 MB; add to \.gitignore: weights\.bin \(1\.0 MB\)"):
        capsule.collect(root=root)


def test_commit_and_difference_are_kept_and_the_secrets_are_not_in_it(tmp_path):
    root = tmp_path / "code"
    root.mkdir()
    (root / "setup.cfg").write_text("")
    (root / "a.py").write_text("x = 1\n")
    (root / ".env").write_text("A=1\n")
    git(tmp_path, "init", "-q", root)
    capsule_without_commit = capsule.collect(root=root).store(tmp_path / "before")
    assert json.loads((capsule_without_commit / "commit.json").read_text())["commit"] is None
    git(root, "add", "-f", ".")
    git(root, "commit", "-qm", "first")
    (root / "a.py").write_text("x = 2\n")
    (root / ".env").write_text("A=hush\n")
    place = capsule.collect(root=root).store(tmp_path)
    described = json.loads((place / "commit.json").read_text())
    assert len(described["commit"]) == 40
    assert described["dirty"]
    diff = (place / "diff.patch").read_text()
    assert "+x = 2" in diff
    assert "hush" not in diff


def test_an_installation_takes_our_packages_and_not_its_neighbours(tmp_path):
    for name in ("workers/a.py", "contract/b.py", "numpy/c.py", "workers/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert capsule.collect(root=tmp_path).files == ("contract/b.py", "workers/a.py")
