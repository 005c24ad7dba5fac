import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from launcher import plan
from tests.house import build

settings.register_profile("shared", deadline=None)  # another process may have the machine for a while
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Plans must not depend on the machine that the tests run on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan.visible_gpus.cache_clear()
    yield
    plan.visible_gpus.cache_clear()


@pytest.fixture
def house(tmp_path):
    yield build(tmp_path / "house")
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # what a failed test left, found by this test's own folder
        try:
            if str(tmp_path) in path.read_bytes().decode(errors="replace"):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue
