import pytest

from launcher import closure


@pytest.fixture
def tree(tmp_path, monkeypatch):
    files = {
        "contract/__init__.py": "",
        "contract/settings/__init__.py": "",
        "contract/settings/main_x.py": "",
        "workers/__init__.py": "",
        "workers/main_x.py": "from workers import models\nfrom workers.data import load\nimport json\n",
        "workers/data/__init__.py": "import importlib\nload = lambda n: importlib.import_module(f'workers.data.{n}')\n",
        "workers/data/digits.py": "",
        "workers/data/stl.py": "",
        "workers/models/__init__.py": "from .vit import Vit\n",
        "workers/models/vit.py": "class Vit:\n    depth = 2\n",
        "workers/models/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closure, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    for each in (closure._stems, closure._code, closure._read):
        each.cache_clear()


def code(*values):
    forget()
    return closure.code("main_x", values)


def test_the_closure_is_what_is_imported_and_what_is_chosen_by_name(tree):
    assert set(code("digits").files) == {
        "contract/__init__.py",
        "contract/settings/__init__.py",
        "contract/settings/main_x.py",
        "workers/__init__.py",
        "workers/main_x.py",
        "workers/data/__init__.py",
        "workers/data/digits.py",
        "workers/models/__init__.py",
        "workers/models/vit.py",
    }
    assert "workers/data/stl.py" in code().files  # no name says which: all count


def test_comments_docstrings_and_layout_do_not_count_and_code_does(tree):
    before = code("digits")
    vit = tree / "workers/models/vit.py"
    vit.write_text('"""A model."""\n# why\nclass Vit:\n    """Deep."""\n\n    depth = 2  # blocks\n')
    assert code("digits").hash == before.hash
    vit.write_text("class Vit:\n    depth = 3\n")
    after = code("digits")
    assert after.hash != before.hash
    assert after.changed(before.files) == ["workers/models/vit.py"]
    (tree / "workers/models/unused.py").write_text("x = 1")
    assert code("digits").hash == after.hash


def test_every_worker_of_ours_has_a_closure_without_the_other_workers():
    forget()
    files = closure.code("main_lmim", ["digits"]).files
    assert "workers/main_lmim.py" in files
    assert "workers/data/digits.py" in files
    assert not {"workers/main_knn.py", "workers/data/fake.py", "contract/settings/main_knn.py"} & set(files)
