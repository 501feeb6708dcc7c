"""A run that trains the head alone: the encoder reads each text once, and what comes of it is the same."""

from pathlib import Path

import numpy as np
import pytest

from fedlr.adapters.state import HEAD, LORA_B
from fedlr.errors import InputError
from fedlr.simulations.costs import measure, num_states, state_places
from fedlr.simulations.federation import Federation, assemble, prepare
from fedlr.simulations.plan import make_plan
from fedlr.training.threads import torch_threads
from tests.families import save_family
from tests.simulations.small_runs import experiment, rounds

POOLED = ("model=pretrained", "model.pooling=mean_normalised", "adapter.train_head=true")
HEAD_ALONE = ("method=head", "trainer.sample_rate=1.0", "trainer.optimizer.lr=20.0", "privacy.epsilon=1e4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.name_or_path={save_family('bert', tmp_path_factory.mktemp('base') / 'bert')}"


def assembled(*overrides: str) -> Federation:
    with torch_threads(1):
        return assemble(experiment(*overrides), seed=0)


def test_a_head_on_cached_features_learns_what_it_learns_on_the_whole_model(base: str, tmp_path: Path) -> None:
    both = [assembled(base, *POOLED, *HEAD_ALONE, f"runtime.cache_prefix={cached}") for cached in ("true", "false")]
    cached, whole = both
    assert cached.caches_features and not whole.caches_features
    assert cached.test.hidden.shape == (len(whole.test), 17) and set(cached.test.lengths) == {1}
    assert {slot.role for slot in cached.start.adapter.select(cached.request().block)} == {HEAD}
    assert {slot.role for slot in cached.request().broadcast} == {HEAD}
    metrics = []
    for f, name in zip(both, ("cached", "whole"), strict=True):
        _, found, _ = rounds(f, tmp_path / name)
        metrics.append([(row["accuracy"], row["loss"]) for row in found])
    np.testing.assert_allclose(metrics[0], metrics[1], rtol=1e-5)
    assert metrics[0][0][1] == pytest.approx(np.log(2)) and metrics[0][-1][1] != metrics[0][0][1]


def test_features_are_cached_only_where_no_round_can_change_them(base: str) -> None:
    upper = ("runtime.cache_prefix=true", "adapter.layers=[1]")
    assert not assembled(base, *POOLED, *upper).caches_features
    assert not assembled(base, *POOLED, *HEAD_ALONE, *upper, "adapter.init_lora_weights=false").caches_features
    assert not assembled(base, *POOLED, *HEAD_ALONE, *upper, "adapter.init_lora_weights=pissa").caches_features
    own_class = assembled(base, "model=pretrained", "adapter.train_head=true", *HEAD_ALONE, *upper)
    assert not own_class.caches_features and own_class.test.hidden.shape == (own_class.test.lengths.sum(), 16)


def test_a_plan_counts_one_row_of_features_per_text(base: str) -> None:
    e = experiment(base, *POOLED, *HEAD_ALONE, "runtime.cache_prefix=true")
    f = prepare(e, seed=0)
    with torch_threads(1):
        costs = measure(f)
    assert costs.state_bytes == 17 * 4 and num_states(f, f.test) == len(f.test)
    assert state_places(f, costs) == ((len(f.test) + len(f.clients[0].table)) * 17 * 4, 0)
    text = make_plan(e)
    assert "34 trained values" in text and "pass the frozen layers once" in text


def test_a_frozen_head_is_refused_where_it_is_zero_and_told_of_where_it_is_random(base: str) -> None:
    frozen = (base, "model=pretrained", "model.pooling=mean_normalised")
    with pytest.raises(InputError, match=r"adapter\.train_head=true with model\.head_std=0"):
        prepare(experiment(*frozen), seed=0)
    told = {
        "frozen": prepare(experiment(*frozen, "model.head_std=0.1"), seed=0).notes,
        "no privacy": prepare(experiment(*frozen, "model.head_std=0.1", "privacy=none"), seed=0).notes,
        "trained": prepare(experiment(base, *POOLED, "model.head_std=0.1"), seed=0).notes,
    }
    assert {name for name, notes in told.items() if any("random and never trains" in note for note in notes)} == {
        "frozen"
    }
    with pytest.raises(InputError, match=r"adapter\.train_head=true for method=head"):
        prepare(experiment(*frozen, *HEAD_ALONE), seed=0)


def test_a_start_that_reads_gradients_is_refused_behind_a_head_of_zeros(base: str, tmp_path: Path) -> None:
    table = tmp_path / "public.csv"
    table.write_text("text,label\n" + "a good film,a\na bad film,b\n" * 20)
    start = ("adapter.init_lora_weights=lora_ga", f"adapter.public={{path: '{table}', labels: [a, b]}}")
    with pytest.raises(InputError, match=r"model\.head_std above 0"):
        prepare(experiment(base, *POOLED, *start), seed=0)


def test_targets_of_auto_are_those_of_peft_for_the_models_type(base: str) -> None:
    f = prepare(experiment(base, *POOLED, "adapter.target_modules=auto", "adapter.layers=[1]"), seed=0)
    paths = {slot.path for slot in f.start.adapter.tensors if slot.role == LORA_B}
    assert {path.rpartition(".")[2] for path in paths} == {"query", "value"} and all(".1." in path for path in paths)


def test_a_model_type_that_peft_has_no_targets_for_is_refused_by_name(tmp_path: Path) -> None:
    place = save_family("albert", tmp_path / "albert")
    with pytest.raises(InputError, match=r"adapter\.target_modules.*albert, got auto"):
        prepare(experiment(f"model.name_or_path={place}", *POOLED, "adapter.target_modules=auto"), seed=0)
