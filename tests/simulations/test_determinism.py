"""The same experiment and seed give the same run: what may change it, and by how much.

A worker is single-threaded and the server's arithmetic too, so the number of workers, torch's threads and the order of
the clients change nothing in the adapter, not a bit. Only evaluation and a cached prefix use several threads at once.

Mutants killed: a run that draws from torch's global generator; a server that sums in order of arrival; baselines that
share the main run's noise.
"""

import json
import os
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlr.simulations.simulate as simulation
from fedlr.rounds.round import Dropout, run_round
from fedlr.simulations.simulate import make_pool, simulate, with_other_noise
from fedlr.streams import OsRandomness
from fedlr.training.threads import torch_threads
from tests.simulations.small_runs import experiment, federation, lines, quiet, rounds

WHOLE = ("config.yaml", "partition.json", "privacy.json", "ledger.jsonl", "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return rounds(federation(), tmp_path_factory.mktemp("reference") / "run")


def test_same_seed_gives_the_same_files_byte_for_byte(tmp_path: Path) -> None:
    e = experiment(f"tracking.output_dir={tmp_path}")
    first = simulate(e, say=lambda line: None)
    torch.manual_seed(123)  # a global seed has no say
    np.random.seed(123)
    with torch_threads(2):  # nor has what the process was doing before
        second = simulate(e, say=lambda line: None)
        assert torch.get_num_threads() == 2
    for name in WHOLE:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert lines(first / name) == lines(second / name)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    assert [s.pop("seconds") > 0 for s in summaries] == [True, True]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_number_of_workers_changes_no_bit_of_the_training(tmp_path: Path, reference: tuple, num_workers: int) -> None:
    adapter, metrics, clients = rounds(federation(f"runtime.num_workers={num_workers}"), tmp_path / "run")
    assert (adapter, clients) == (reference[0], reference[2])
    for row, same in zip(metrics, reference[1], strict=True):
        for key in ("loss", "ece"):  # evaluation uses all threads
            assert row.pop(key) == pytest.approx(same[key], rel=1e-6)
        assert row == {key: value for key, value in same.items() if key not in ("loss", "ece")}


def test_number_of_workers_changes_no_bit_over_a_cached_prefix(tmp_path: Path) -> None:
    one, two = (
        rounds(federation("runtime.cache_prefix=true", "adapter.layers=[1]", f"runtime.num_workers={n}"), tmp_path / n)
        for n in ("1", "2")
    )
    assert (one[0], one[2]) == (two[0], two[2])
    for row, same in zip(one[1], two[1], strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-6)  # evaluation uses all threads


def test_order_in_which_clients_finish_changes_no_bit() -> None:
    f = federation("method=fedit")

    class Shuffled:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def train(self, task: object, cohort: list[int]) -> Iterator[object]:
            with closing(make_pool(f.without_privacy(), None)) as pool:
                outcomes = list(pool.train(task, random.Random(self.seed).sample(cohort, len(cohort))))
            return iter(random.Random(self.seed + 1).sample([*outcomes, Dropout(9, "refused", "x")], 5))

    results = [run_round(f.start, [0, 1, 2, 3], pool=Shuffled(seed), method=f.method) for seed in range(3)]
    assert len({state.adapter.fingerprint() for state, _ in results}) == 1
    assert {diagnostics.trained for _, diagnostics in results} == {(0, 1, 2, 3)}


def test_another_seed_gives_another_run(tmp_path: Path, reference: tuple) -> None:
    other = rounds(federation(seed=1), tmp_path / "run")
    assert other[0] != reference[0]
    assert other[1] != reference[1]


def test_another_seed_of_noise_alone_gives_another_adapter(tmp_path: Path, reference: tuple) -> None:
    other = rounds(with_other_noise(federation()), tmp_path / "run")
    assert other[0] != reference[0]
    assert [row["client_id"] for row in other[2]] == [row["client_id"] for row in reference[2]]  # same cohorts


def test_clients_alone_train_under_noise_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = federation("tracking.run_alone=true", "tracking.run_no_privacy=true")
    used = []

    def watched(of: object, ledger: object) -> object:
        used.append(of)
        return make_pool(of, ledger)

    monkeypatch.setattr(simulation, "make_pool", watched)
    simulation.run_baselines(f, tmp_path, progress=quiet(f.experiment))

    no_privacy, alone = used
    assert no_privacy.mechanism is None
    assert alone.mechanism == f.mechanism
    drawn = [noise(of.randomness) for of in (f, alone)]
    assert not np.intersect1d(*drawn).size
    # The mutant that hands its own randomness on is seen by the same check.
    assert np.intersect1d(noise(f.randomness), noise(f.randomness)).size


def noise(randomness: object) -> np.ndarray:
    """Return the first numbers of every stream that a run of four clients, two rounds and two steps uses."""
    keys = [{"client": c, "round_index": r, "step": s} for c in range(4) for r in range(2) for s in range(2)]
    return np.concatenate([randomness.noise(**key).standard_normal(50) for key in keys])


def test_randomness_of_the_operating_system_never_repeats(tmp_path: Path) -> None:
    f = replace(federation(), randomness=OsRandomness())
    assert with_other_noise(f) is f
    assert rounds(f, tmp_path / "one")[0] != rounds(f, tmp_path / "two")[0]


def test_a_product_has_the_same_bits_wherever_its_operands_lie() -> None:
    # Fails on some processors without the variable that `import fedlr` sets; those of one maker show nothing.
    assert os.environ["MKL_CBWR"] == "AUTO"
    rows, weight, bias = torch.randn(5, 16), torch.randn(3, 16), torch.randn(3)
    expected = torch.nn.functional.linear(rows, weight, bias)
    buffer = torch.empty(rows.numel() + 64)
    for start in range(64):
        moved = buffer[start : start + rows.numel()].view_as(rows)
        moved.copy_(rows)
        assert torch.equal(torch.nn.functional.linear(moved, weight, bias), expected)
