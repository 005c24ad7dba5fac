"""The code of a submission, copied once: what is edited afterwards reaches no queued run.

``<output_dir>/capsules/<hash>/`` holds every tracked file and every untracked one that git does not ignore, and beside
them ``commit.json`` and ``diff.patch``. Output, data and what looks like a secret stay out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from contract.settings.checks import SettingsError
from launcher import ROOT

CAP_MB = 50
OURS = ("contract", "launcher", "workers", "analysis")
NOT_RUN = frozenset({"tests", "benchmarks"})  # top-level folders that no job needs
SECRET = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", ".pypirc", ".npmrc", ".git-credentials", ".ssh", ".aws", ".kube", "kubeconfig*",
    "*credential*", "*secret*", "*token*", "*password*",
)  # fmt: skip
COMMIT, DIFF = "commit.json", "diff.patch"


@dataclass(frozen=True)
class Capsule:
    root: Path
    hash: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]  # for looking like secrets

    def path(self, output_dir: Path) -> Path:
        return output_dir / "capsules" / self.hash

    def commit(self) -> str | None:
        return _git(self.root, "rev-parse", "--verify", "-q", "HEAD").decode().strip() or None

    def store(self, output_dir: Path) -> Path:
        """Copied, unless it is there already. A half-made copy is never seen under the final name."""
        final = self.path(output_dir)
        with contextlib.suppress(FileNotFoundError):
            os.utime(final)  # in use: prune leaves it alone
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=final.parent))
        try:
            for name in self.files:
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.root / name, target, follow_symlinks=False)
            (partial / COMMIT).write_text(json.dumps(self._record(), indent=2) + "\n")
            (partial / DIFF).write_bytes(self._diff())
            partial.chmod(0o755)
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():  # another launcher was faster: its copy is the same
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final

    def _record(self) -> dict[str, Any]:
        return {"commit": self.commit(), "dirty": bool(self._changed()), "left_out": list(self.left_out)}

    def _changed(self) -> list[str]:
        """Files of the capsule that differ from the commit; the secrets' differences are secret too."""
        if self.commit() is None:
            return []
        listed = _git(self.root, "diff", "HEAD", "--name-only", "--relative", "-z").split(b"\0")
        return sorted({os.fsdecode(name) for name in listed} & set(self.files))

    def _diff(self) -> bytes:
        changed = self._changed()
        return _git(self.root, "--literal-pathspecs", "diff", "HEAD", "--binary", "--", *changed) if changed else b""


def collect(exclude: Iterable[str | Path] = (), root: Path = ROOT) -> Capsule:
    """What would be copied; ``exclude`` are the folders of output and data. Raises SettingsError above CAP_MB."""
    apart = {Path(p).resolve() for p in exclude}
    sizes: dict[str, int] = {}
    left_out = []
    for name in sorted(_listed(root)):
        path = root / name
        parents = [root / p for p in PurePosixPath(name).parents][:-1]
        if PurePosixPath(name).parts[0] in NOT_RUN or any(p.resolve() in apart or _is_output(p) for p in parents):
            continue
        if _secret(name):
            left_out.append(name)
            continue
        try:
            status = path.lstat()
        except FileNotFoundError:  # tracked, and deleted since
            continue
        if not stat.S_ISREG(status.st_mode) or any(p.is_symlink() for p in parents):
            continue
        sizes[name] = status.st_size
    if sum(sizes.values()) > CAP_MB * 2**20:
        largest = sorted(sizes, key=lambda n: -sizes[n])[:5]
        raise SettingsError(
            f"the code in {root} is {sum(sizes.values()) / 2**20:.0f} MB, above {CAP_MB} MB; "
            f"add to .gitignore: {', '.join(f'{n} ({sizes[n] / 2**20:.1f} MB)' for n in largest)}"
        )
    return Capsule(root, _hash(root, sizes), tuple(sizes), tuple(left_out))


def hash_of(stored: Path) -> str:
    """Of a stored copy, as it is now: its name, unless somebody changed it. What was put there later is not counted."""
    found = (p.relative_to(stored) for p in stored.rglob("*") if p.is_file())
    names = (p.as_posix() for p in found if "__pycache__" not in p.parts and str(p) not in (COMMIT, DIFF))
    return _hash(stored, sorted(names))


def _hash(root: Path, names: Iterable[str]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name in names:
        path = root / name
        content = hashlib.blake2b(path.read_bytes()).hexdigest()
        hashed.update(f"{name}\0{os.access(path, os.X_OK)}\0{content}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()


def _listed(root: Path) -> Iterator[str]:
    listed = _git(root, "ls-files", "-co", "--exclude-standard", "-z")
    if listed:
        yield from {os.fsdecode(name) for name in listed.split(b"\0") if name}
        return
    # No git: all below a clone; of an installation, beside other people's packages, ours only.
    tops = [root] if (root / "setup.cfg").is_file() else [root / name for name in OURS]
    for top in tops:
        for folder, below, files in os.walk(top):
            below[:] = [
                d for d in below if d[0] != "." and d != "__pycache__" and not (Path(folder, d) / "pyvenv.cfg").exists()
            ]
            yield from (Path(folder, f).relative_to(root).as_posix() for f in files if not f.endswith(".pyc"))


@functools.cache
def _is_output(folder: Path) -> bool:
    return (folder / "capsules").is_dir() or (folder / "submissions").is_dir()


def _secret(name: str) -> bool:
    path = PurePosixPath(name)
    if path.suffix == ".py" and path.parts[0] in OURS:  # mask_token.py is a model
        return False
    return any(fnmatch.fnmatchcase(part.lower(), pattern) for part in path.parts for pattern in SECRET)


def _git(root: Path, *words: str) -> bytes:
    """What git prints, or nothing where there is no git, no repository or no commit."""
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return b""
