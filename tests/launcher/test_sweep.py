import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from contract.settings.checks import SettingsError
from launcher import CONFIGS, sweep


def test_commas_and_ranges_multiply_and_the_last_word_varies_fastest():
    assert sweep.points(["seed=range(2)", "tau=0.1,0.2"]) == [
        {"seed": 0, "tau": 0.1},
        {"seed": 0, "tau": 0.2},
        {"seed": 1, "tau": 0.1},
        {"seed": 1, "tau": 0.2},
    ]


def test_a_list_in_brackets_is_one_value_and_lists_sweep_too():
    assert sweep.points(["k=[1,10]"]) == [{"k": [1, 10]}]
    assert sweep.points(["k=[1],[2,3]"]) == [{"k": [1]}, {"k": [2, 3]}]


def test_a_range_gives_the_numbers_that_people_type():
    assert [p["tau"] for p in sweep.points(["tau=range(0.1,1,0.2)"])] == [0.1, 0.3, 0.5, 0.7, 0.9]


@given(st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_every_number_comes_back_as_it_was_said(numbers):
    word = "tau=" + ",".join(map(repr, numbers))
    assert [p["tau"] for p in sweep.points([word])] == numbers


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_every_quoted_text_comes_back_as_it_was_said(text):
    word = "job_name=" + QuotedString(text, Quote.single).with_quotes()
    assert sweep.points([word]) == [{"job_name": text}]


@given(st.lists(st.sampled_from(["seed=0,1", "tau=0.1,0.2", "epochs=range(3)", "hflip=0"]), unique=True))
def test_a_sweep_has_as_many_points_as_its_lists_multiply_to(words):
    sizes = {"seed": 2, "tau": 2, "epochs": 3, "hflip": 1}
    expected = 1
    for word in words:
        expected *= sizes[word.partition("=")[0]]
    points = sweep.points(words)
    assert len(points) == expected == len({tuple(p.items()) for p in points})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("~tau", "cannot be taken away"),
        ("tau=interval(0,1)", "not enumerable"),
        ("data=glob(*)", "not enumerable"),
        ("hydra.run.dir=x", "not supported"),
        ("data@x=digits", "not supported"),
        ("job_name=été", "'job_name='"),
        ("job_name=(", "needs quotes"),
    ],
)
def test_what_is_not_in_the_grammar_is_refused_in_one_line_that_names_the_word(word, said):
    with pytest.raises(SettingsError, match=re.escape(said)) as error:
        sweep.points([word])
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_is_said_twice_with_two_values_is_refused_and_an_alias_is_the_same_key():
    with pytest.raises(SettingsError, match="dataset=fake: data was given before, as digits"):
        sweep.points(["data=digits", "dataset=fake"])
    assert sweep.points(["data=fake", "dataset=fake"]) == [{"data": "fake"}]


def test_a_plus_before_a_key_changes_nothing():
    assert sweep.points(["+tau=1", "++seed=2"]) == [{"tau": 1, "seed": 2}]


def test_patching_gives_what_hydra_composes():
    said = {"worker": "main_lmim", "data": "fake", "tau": 0.3, "proj.mlp_dim": 64, "env.nproc": 2, "then": ["main_knn"]}
    words = ["worker=main_lmim", "data=fake", "tau=0.3", "proj.mlp_dim=64", "env.nproc=2", "then=[main_knn]"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        expected = OmegaConf.to_container(compose("config", words))
    assert sweep.compose(said) == expected


def test_a_choice_of_groups_is_composed_once_however_many_values_are_swept():
    sweep._base.cache_clear()
    for seed in range(100):
        sweep.compose({"worker": "main_lmim", "seed": seed})
    assert sweep._base.cache_info().misses == 1


def test_interpolations_are_resolved_after_the_patches():
    found = sweep.compose({"worker": "main_lmim", "seed": 7, "job_name": "s${seed}", "output_dir": "${job_name}/x"})
    assert found["output_dir"] == "s7/x"
    with pytest.raises(SettingsError, match="nowhere"):
        sweep.compose({"worker": "main_lmim", "job_name": "${nowhere}"})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "worker: missing; choose one of worker="),
        ({"worker": "main_lmin"}, "worker=main_lmin: unknown; did you mean main_lmim?"),
        ({"worker": "main_lmim", "data": "nets"}, "data=nets: unknown; valid: "),
        ({"worker": "main_lmim", "epochs.x": 1}, "epochs.x=1: epochs is a value"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(said, expected):
    with pytest.raises(SettingsError) as error:
        sweep.compose(said)
    assert expected in str(error.value)


def test_composing_leaves_no_litter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep._base.cache_clear()
    sweep.compose({"worker": "main_lmim"})
    assert list(tmp_path.iterdir()) == []
