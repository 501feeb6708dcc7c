"""A client with another seed and other signs in its decompositions is wrong exactly by what the entry ships.

Singular and eigenvectors have free signs: two machines may differ in them. That is simulated: on the client every
second vector is turned, left and right together.

Mutants this file kills: an entry that forgets what must be shipped, or ships what a client makes alike; shipping only
what a state_dict shows; a tensor of another shape that is loaded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft.tuners.psoft.layer
import pytest
import torch
from torch import Tensor

from fedlr.models.tuners import TUNERS
from fedlr.models.tuners.build import frozen_parts, load_parts, shipped_parts
from fedlr.simulations.tuner_measure.measure import Subject, client_error, subject

RIGHT, WRONG = 1e-6, 1e-3
MADE_FROM_SVD = ("mica", "lora_xs", "psoft", "tinylora", "frod")


def turned(n: int, like: Tensor) -> Tensor:
    return torch.tensor([-1.0, 1.0]).repeat(n)[:n].to(like)


@contextmanager
def other_machine() -> Iterator[None]:
    """Turn every second singular or eigenvector of what is computed inside."""
    svd, eigh, svd_lowrank = torch.linalg.svd, torch.linalg.eigh, torch.svd_lowrank

    def turned_svd(*given: Any, **words: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = (tensor.clone() for tensor in svd(*given, **words))
        signs = turned(S.shape[-1], U)
        U[..., : len(signs)] *= signs
        Vh[..., : len(signs), :] *= signs[:, None]
        return U, S, Vh

    def turned_eigh(*given: Any, **words: Any) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(*given, **words)
        return values, vectors * turned(vectors.shape[-1], vectors)

    def turned_lowrank(*given: Any, **words: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = svd_lowrank(*given, **words)
        signs = turned(S.shape[-1], U)
        return U * signs, S, V * signs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", turned_svd)
        patch.setattr(torch.linalg, "eigh", turned_eigh)
        patch.setattr(torch, "svd_lowrank", turned_lowrank)
        patch.setattr(peft.tuners.psoft.layer, "svd_lowrank", turned_lowrank)
        yield


def error_elsewhere(server: Subject, parts: dict[str, Tensor]) -> float:
    with other_machine():
        return client_error(server, seed=5, parts=parts)


@pytest.mark.parametrize("name", TUNERS)
def test_a_client_elsewhere_needs_what_the_entry_ships_and_no_more(name: str) -> None:
    server = subject(TUNERS[name])
    parts = shipped_parts(server.model, TUNERS[name])
    assert bool(parts) == bool(TUNERS[name].ships)
    assert error_elsewhere(server, parts) < RIGHT
    if parts:
        assert error_elsewhere(server, {}) > WRONG


@pytest.mark.parametrize("name", MADE_FROM_SVD)
def test_turned_signs_alone_break_a_client_that_was_shipped_nothing(name: str) -> None:
    server = subject(TUNERS[name])
    assert client_error(server, seed=5, parts={}) < RIGHT < WRONG < error_elsewhere(server, {})


@pytest.mark.parametrize("name", ["lora_frozen_a", "lora_frozen_b"])
def test_another_seed_alone_breaks_a_client_that_was_shipped_nothing(name: str) -> None:
    server = subject(TUNERS[name])
    assert client_error(server, seed=0, parts={}) < RIGHT < WRONG < client_error(server, seed=5, parts={})


@pytest.mark.parametrize("name", [name for name, entry in TUNERS.items() if entry.ships])
def test_each_pattern_that_is_shipped_is_needed(name: str) -> None:
    server = subject(TUNERS[name])
    for pattern in TUNERS[name].ships:
        others = tuple(other for other in TUNERS[name].ships if other != pattern)
        forgetful = replace(TUNERS[name], ships=others)
        assert error_elsewhere(server, shipped_parts(server.model, forgetful)) > WRONG, pattern


@pytest.mark.parametrize("name", ["lora_xs", "psoft"])
def test_a_state_dict_does_not_repair_a_client_with_turned_bases(name: str) -> None:
    server = subject(TUNERS[name])
    saved = {path: tensor for path, tensor in frozen_parts(server.model).items() if path in server.model.state_dict()}
    assert error_elsewhere(server, saved) > WRONG


def misshapen(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:1] for name, tensor in parts.items()}


def renamed(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"no.{name}": tensor for name, tensor in parts.items()}


@pytest.mark.parametrize("spoil", [misshapen, renamed])
def test_parts_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    server = subject(TUNERS["lora_xs"])
    with pytest.raises(ValueError, match="a frozen tensor that the model has"):
        load_parts(server.model, spoil(shipped_parts(server.model, server.tuner)))


def test_a_pattern_that_finds_nothing_is_an_error_of_the_entry() -> None:
    with pytest.raises(ValueError, match="no_such"):
        shipped_parts(subject(TUNERS["vera"]).model, replace(TUNERS["vera"], ships=("no_such.default",)))
