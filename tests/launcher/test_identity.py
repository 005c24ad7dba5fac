import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import launches, rundirs, sweep
from launcher.identity import digest

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def only(*words):
    (run,) = launches.of_launch(sweep.points(["worker=main_lmim", *words])).runs
    return run


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value, chance):
    keys = list(value)
    chance.shuffle(keys)
    assert digest({k: value[k] for k in keys}) == digest(value)


def test_the_order_of_words_does_not_matter():
    words = ["tau=0.1", "epochs=3", "proj.mlp_dim=64", "seed=4", "data=fake", "env.nproc=1"]
    expected = only(*words).identity
    for _ in range(5):
        random.Random(0).shuffle(words)
        assert only(*words).identity == expected


@given(st.floats(min_value=1e-6, max_value=1e6))
def test_the_spelling_of_a_number_does_not_matter(value):
    spellings = {repr(value), f"{value:.17e}", f"'{value!r}'"}
    if value.is_integer():
        spellings.add(str(int(value)))
    assert len({only(f"tau={s}").identity for s in spellings}) == 1


@given(a=st.floats(0.01, 10), b=st.floats(0.01, 10))
def test_another_number_is_another_run(a, b):
    assert (only(f"tau={a!r}").identity == only(f"tau={b!r}").identity) == (a == b)


@pytest.mark.parametrize(
    "word",
    [
        "env.workers=3",
        "env.grace_s=9",
        "output_dir=elsewhere",
        "job_name=x",
        "log_every=1",
        "resume=False",
        "then=[main_knn]",
    ],
)
def test_where_and_how_a_run_is_made_is_not_who_it_is(word):
    (run, *_) = launches.of_launch(sweep.points(["worker=main_lmim", word])).runs
    assert run.identity == only().identity


def test_the_seed_is_in_the_identity_and_not_in_the_group():
    runs = launches.of_launch(sweep.points(["worker=main_lmim", "seed=0,1", "then=[main_knn]"])).runs
    assert len({r.identity for r in runs}) == 4
    assert len({r.group for r in runs}) == 2


def test_hardware_does_not_change_who_a_run_is_where_the_local_batch_does_not_matter():
    base = ["avg_sim_coeff=0", "effective_batch_size=256"]
    runs = [only(*base, f"env.nproc={n}", "env.ngpu=0", f"batch_size={b}") for n, b in ((1, 256), (2, 64), (4, 32))]
    assert len({r.identity for r in runs}) == 1
    assert [r.settings.accum_iter for r in runs] == [1, 2, 2]
    assert only("batch_size=64", "accum_iter=2").identity != only("batch_size=128").identity  # the regulariser sees it


def test_big_data_is_known_by_its_class_folders_or_its_declared_name(tmp_path):
    for root in ("here", "there"):
        for name in ("cat", "dog"):
            (tmp_path / root / "train" / name).mkdir(parents=True)
    (tmp_path / "more" / "train" / "cat").mkdir(parents=True)
    words = ["data=imagefolder"]
    here, there, more = (only(*words, f"data_path={tmp_path / p}").identity for p in ("here", "there", "more"))
    assert here == there != more
    named = [only(*words, f"data_path={tmp_path / p}", "data.fingerprint=pets").identity for p in ("here", "more")]
    assert named[0] == named[1] != here


def finished(run, tmp_path):
    rundirs.prepare(run, tmp_path / "capsules" / "x", None, None)
    (run.folder / rundir.DONE).write_text("{}")
    return run


def test_an_encoder_is_known_by_the_run_that_made_it_or_by_its_content(tmp_path):
    out = f"output_dir={tmp_path / 'runs'}"
    parent = finished(only(out), tmp_path)

    def knn(encoder):
        (run,) = launches.of_launch(sweep.points(["worker=main_knn", out, f"encoder='{encoder}'"])).runs
        return run

    by_path, by_prefix = knn(parent.folder), knn(parent.identity[:6])
    assert by_path.identity == by_prefix.identity
    assert by_path.parents == (parent.identity,)
    assert by_prefix.settings.encoder == str(parent.folder)
    _, planned = launches.of_launch(sweep.points(["worker=main_lmim", out, "then=[main_knn]"])).runs
    assert planned.identity == by_path.identity

    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (knn(tmp_path / name) for name in ("a.pt", "b.pt", "c.pt"))
    assert a.identity == b.identity != c.identity
    assert knn("timm:vit_small").settings.encoder == "timm:vit_small"
    a, b, c = (knn(f"timm:vit_small@{tmp_path / name}") for name in ("a.pt", "b.pt", "c.pt"))
    assert a.identity == b.identity != c.identity
    assert a.identity not in {knn(tmp_path / "a.pt").identity, knn(f"timm:vit_base@{tmp_path / 'a.pt'}").identity}
    assert a.settings.encoder == f"timm:vit_small@{tmp_path / 'a.pt'}"


def test_an_encoder_that_is_not_there_is_refused_with_what_is_accepted(tmp_path):
    out = f"output_dir={tmp_path}"
    for encoder in ("nowhere", "abcdef", "x" * 300, "'hub:vit'", "'timm:'", "'timm:vit_small@nowhere'"):
        with pytest.raises(SettingsError, match="expected a run directory, an identity"):
            launches.of_launch(sweep.points(["worker=main_knn", out, f"encoder={encoder}"]))
    with pytest.raises(SettingsError, match="encoder: missing; expected a run directory"):
        launches.of_launch(sweep.points(["worker=main_knn", out]))
    run = only(out)
    rundirs.prepare(run, tmp_path / "capsules" / "x", None, None)
    with pytest.raises(SettingsError, match=r"not finished; .* then=\[\.\.\.\]"):
        launches.of_launch(sweep.points(["worker=main_knn", out, f"encoder={run.identity}"]))


def test_an_encoder_that_was_never_trained_is_known_by_its_architecture():
    def detect(*words):
        (found,) = launches.of_launch(sweep.points(["worker=main_detection", *words])).runs
        return found

    default, same, other, later = (
        detect(*words) for words in ((), ("encoder=new:resnet10_slim",), ("encoder=new:resnet18",), ("seed=1",))
    )
    assert default.settings.data.name == "digits_on_photos"
    assert default.identity == same.identity
    assert len({default.identity, other.identity, later.identity}) == 3
    assert default.group == later.group != other.group
    with pytest.raises(SettingsError, match=r"encoder=new:resnet51: unknown; did you mean new:resnet50\?"):
        detect("encoder=new:resnet51")


def test_a_second_encoder_is_known_by_its_content(tmp_path):
    weights = tmp_path / "oracle.pt"
    words = [f"output_dir='{tmp_path}'", f"encoder='{weights}'", "features=dino", f"oracle='{weights}'"]

    def identity() -> str:
        (run,) = launches.of_launch(sweep.points(["worker=main_knn", *words])).runs
        assert run.settings.oracle == str(weights)
        return run.identity

    weights.write_bytes(b"one")
    first = identity()
    words[2:] = [f"oracle='{tmp_path}/other.pt'", "features=dino"]
    (tmp_path / "other.pt").write_bytes(b"two")
    weights = tmp_path / "other.pt"
    assert identity() != first
    weights.write_bytes(b"one")
    assert identity() == first
