"""Federations in processes of their own: they answer, their errors are fatal, and wrong numbers are seen.

Mutants this file kills: a worker that passes a refusal off as an answer, a client that gets another's update, one step
of noise that differs.
"""

import io
import json
import threading
from pathlib import Path

import pytest
import torch

from fedlr.adapters.state import Slot
from fedlr.simulations.bench.cohort import TOLERANCES, compare
from fedlr.simulations.bench.contestants import Contestant, Process, by_slot, in_threads
from fedlr.simulations.bench.federations import OPACUS, ours, overrides
from fedlr.simulations.bench.outcome import BenchmarkFailed
from fedlr.simulations.bench.settings import Settings
from fedlr.simulations.bench.worker import Session, by_name, serve

from safetensors.torch import load_file  # isort: skip


def settings(folder: Path) -> Settings:
    return Settings("tiny", folder, lambda line: None)


def session(folder: Path, *more: str, num_clients: int = 3) -> Session:
    made = Session(folder)
    s = settings(folder)
    told = made.assemble([*overrides(s, num_clients=num_clients, num_steps=2, batch=6), *more])
    assert told["num_clients"] == num_clients and told["unit"] == pytest.approx(0.1 / 8)
    return made


def updates(made: Session, clients: list[int], *, round_index: int = 0) -> dict[int, dict[Slot, torch.Tensor]]:
    made.train(round_index, clients, keep="u")
    return {c: by_slot(load_file(made.folder / f"u-{c}.safetensors")) for c in clients}


def test_fused_and_opacus_agree_and_what_differs_is_seen(tmp_path: Path) -> None:
    mine = session(tmp_path, *ours(settings(tmp_path)))
    theirs = session(tmp_path, *OPACUS)
    fused, opacus = updates(mine, [0, 1, 2]), updates(theirs, [0, 1, 2])
    look = {"unit": 0.1 / 8, "tolerance": TOLERANCES["float32"]}
    assert compare("ours", fused, opacus, **look).difference < TOLERANCES["float32"]
    for wrong in (
        {**fused, 1: fused[0], 0: fused[1]},
        {0: fused[0], 1: fused[1]},
        {**fused, 2: updates(mine, [2], round_index=1)[2]},
    ):
        with pytest.raises(BenchmarkFailed):
            compare("ours", wrong, opacus, **look)
    with pytest.raises(RuntimeError, match="refused"):
        mine.train(0, [0])  # its round is in the ledger already
    for made in (mine, theirs):
        made.close()


def test_a_whole_round_leaves_the_mean(tmp_path: Path) -> None:
    made = session(tmp_path, *ours(settings(tmp_path)))
    made.round(3, keep=str(tmp_path / "mean.safetensors"))
    mean = by_slot(load_file(tmp_path / "mean.safetensors"))
    again = session(tmp_path, *ours(settings(tmp_path)))
    each = updates(again, [0, 1, 2])
    for slot, tensor in mean.items():
        assert torch.allclose(tensor, sum(each[c][slot] for c in range(3)) / 3, atol=1e-6)
    for one in (made, again):
        one.close()


def test_tensors_keep_their_slots_in_a_file() -> None:
    tensors = {Slot("a.b|c", "lora_B"): torch.ones(2), Slot("head", "head"): torch.zeros(1)}
    assert {slot: t.tolist() for slot, t in by_slot(by_name(tensors)).items()} == {
        slot: t.tolist() for slot, t in tensors.items()
    }


def test_an_error_is_answered_and_ends_the_worker(tmp_path: Path) -> None:
    commands = "\n".join(json.dumps({"do": do}) for do in ("round", "round")) + "\n"
    answers = io.StringIO()
    assert serve(Session(tmp_path), io.StringIO(commands), answers) == 1
    (line,) = answers.getvalue().splitlines()
    assert "error" in json.loads(line)


def test_the_first_error_of_several_threads_is_raised_after_all_have_ended() -> None:
    ended = threading.Event()

    def crash() -> None:
        raise BenchmarkFailed("worker 1 crashed")

    def work() -> None:
        ended.set()

    with pytest.raises(BenchmarkFailed, match="worker 1"):
        in_threads([(crash, ()), (work, ())])
    assert ended.is_set()


def test_a_process_that_cannot_start_its_federation_is_fatal(tmp_path: Path) -> None:
    with Process("ours", tmp_path) as process:
        with pytest.raises(BenchmarkFailed, match=r"ours, asked to assemble: .*no_such"):
            process.ask("assemble", overrides=["experiment=no_such"])
        with pytest.raises(BenchmarkFailed, match="asked to train: it ended"):
            process.ask("train", round_index=0, clients=[0])


@pytest.mark.slow
def test_several_processes_share_out_the_clients(tmp_path: Path) -> None:
    s = settings(tmp_path)
    words = [*overrides(s, num_clients=9, num_steps=1, batch=4), *OPACUS]
    with Contestant("rival", tmp_path, words, num_processes=2) as rival:
        rival.train(0, range(9), keep="u")
        found = rival.updates("u")
        assert sorted(found) == list(range(9)) and rival.updates("u") == {}
        with pytest.raises(BenchmarkFailed, match="rival [01], asked to train: "):
            rival.train(1, [0, 1, 2, 3, 99])
