"""Codecs: what a message may be, what decoding makes of it, and that the mean stays right where it is linear.

Mutants these tests reject: a form that follows the values; rounding to the nearest in place of by chance; one stream
for all clients; a projection without D / K, or one for each client; places that are not looked at.
"""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedlr.adapters.state import Slot
from fedlr.errors import InputError
from fedlr.methods.codecs.codec import Codec, Exact, Place, decoded, encoded, num_coded_bytes, part
from fedlr.methods.codecs.projection import Projection
from fedlr.methods.codecs.rounding import Bfloat16, Int8
from fedlr.methods.codecs.top_k import TopK

B, HEAD = Slot("encoder.layer", "lora_B"), Slot("classifier.weight", "head")
CODECS = (Exact(), Bfloat16(), Int8(), Projection(0.25), Projection(1.0), TopK(0.1))
HERE = Place(seed=3, client=5, round_index=2)


def random_tensors(seed: int, scale: float = 1.0) -> dict[Slot, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {B: scale * torch.randn(160, 8, generator=generator), HEAD: scale * torch.randn(2, 33, generator=generator)}


def way(codec: Codec, change: Mapping[Slot, Tensor], place: Place = HERE) -> dict[Slot, Tensor]:
    return codec.decode(codec.encode(change, place), change, place)


def flat(tensors: Mapping[Slot, Tensor]) -> Tensor:
    return torch.cat([tensors[slot].double().reshape(-1) for slot in sorted(tensors)])


def error(codec: Codec, change: Mapping[Slot, Tensor], place: Place = HERE) -> float:
    return float((flat(way(codec, change, place)) - flat(change)).norm() / flat(change).norm())


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("values", ["random", "zeros", "tiny", "one"])
def test_every_message_has_the_form_that_the_shapes_alone_give(codec: Codec, values: str) -> None:
    change = random_tensors(0, 1e-30 if values == "tiny" else 1.0)
    if values in ("zeros", "one"):
        change = {slot: torch.zeros_like(tensor) for slot, tensor in change.items()}
        change[B][7, 1] = float(values == "one")
    message = codec.encode(change, HERE)
    form = codec.form(change)
    assert {slot: (tuple(t.shape), t.dtype) for slot, t in message.items()} == form
    assert sum(t.numel() * t.element_size() for t in message.values()) == num_coded_bytes(codec, change)
    again = way(codec, change)
    assert {slot: t.shape for slot, t in again.items()} == {slot: t.shape for slot, t in change.items()}
    assert all(torch.isfinite(t).all() for t in again.values())
    assert values != "zeros" or not any(t.any() for t in again.values()), "who did not move did not move"


def test_bytes_are_what_each_codec_says() -> None:
    change = random_tensors(0)  # 1,280 and 66 numbers
    sizes = {type(codec).__name__: num_coded_bytes(codec, change) for codec in (Exact(), Bfloat16(), Int8(), TopK(0.1))}
    assert sizes == {"Exact": 4 * 1346, "Bfloat16": 2 * 1346, "Int8": 1346 + 8, "TopK": 8 * (128 + 7)}
    assert num_coded_bytes(Projection(0.25), change) == 4 * (3 * math.ceil(0.25 * 427) + math.ceil(0.25 * 66))


@pytest.mark.parametrize("codec", [Exact(), Projection(0.25)], ids=repr)
def test_the_mean_of_what_is_decoded_is_what_is_decoded_of_the_mean(codec: Codec) -> None:
    changes = [random_tensors(seed) for seed in range(4)]
    mean = {slot: torch.stack([c[slot] for c in changes]).mean(dim=0) for slot in changes[0]}
    several = [flat(way(codec, change, Place(3, client, 2))) for client, change in enumerate(changes)]
    torch.testing.assert_close(torch.stack(several).mean(dim=0), flat(way(codec, mean)), atol=1e-6, rtol=1e-6)
    messages = [codec.encode(change, Place(3, client, 2)) for client, change in enumerate(changes)]
    summed = {slot: torch.stack([m[slot] for m in messages]).mean(dim=0) for slot in messages[0]}
    torch.testing.assert_close(flat(codec.decode(summed, mean, HERE)), flat(way(codec, mean)), atol=1e-6, rtol=1e-6)


def test_a_whole_projection_and_all_places_lose_nothing() -> None:
    assert error(Projection(1.0), random_tensors(1)) < 1e-6
    assert error(TopK(1.0), random_tensors(1)) == 0.0


def test_the_error_of_a_projection_is_what_its_docstring_says_and_its_mean_is_right() -> None:
    change = {B: random_tensors(1)[B][:64]}  # 512 numbers
    rounds = torch.stack([flat(way(Projection(0.25), change, Place(3, 0, index))) for index in range(400)])
    x = flat(change)
    # Of one update sqrt(4 - 1), spread by about 1 / sqrt(128); of the mean of n rounds sqrt(3 / n) within 10 of its sd.
    assert float((rounds[0] - x).norm() / x.norm()) == pytest.approx(math.sqrt(3), rel=0.35)
    assert float((rounds.mean(dim=0) - x).norm() / x.norm()) == pytest.approx(math.sqrt(3 / 400), rel=0.35)


def test_bfloat16_is_off_by_a_256th_at_most_and_int8_by_less_than_its_scale() -> None:
    change = random_tensors(2)
    for slot, tensor in way(Bfloat16(), change).items():
        assert ((tensor - change[slot]).abs() <= change[slot].abs() / 256).all()
    for slot, tensor in way(Int8(), change).items():
        assert ((tensor - change[slot]).abs() <= change[slot].abs().max() / 127 * (1 + 1e-5)).all()


def test_rounding_by_chance_is_right_on_average_and_clients_draw_their_own() -> None:
    change = {B: torch.full((100, 40), 0.3)}
    change[B][0, 0] = 127.0
    found = torch.stack([way(Int8(), change, Place(3, client, 0))[B] for client in range(20)])
    assert set(found.unique().tolist()) == {0.0, 1.0, 127.0}
    share = float(found.reshape(20, -1)[:, 1:].mean())  # of 80,000 draws: sd 0.0016, so 7 of them is one in 1e11
    assert share == pytest.approx(0.3, abs=0.0115)
    both = float(
        (found[0] * found[1]).reshape(-1)[1:].mean()
    )  # 0.09 where they are independent, 0.3 where they are one
    assert both == pytest.approx(0.09, abs=0.04)
    assert torch.equal(found[0], way(Int8(), change, Place(3, 0, 0))[B]), "a message that is made again is the same"


def test_the_largest_changes_are_kept_where_they_are_and_of_equal_ones_the_first() -> None:
    change = {B: torch.tensor([[1.0, -5.0], [3.0, -3.0], [0.0, 3.0]])}
    assert way(TopK(0.5), change)[B].tolist() == [[0.0, -5.0], [3.0, -3.0], [0.0, 0.0]]


def hostile(name: str, codec: Codec, like: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
    message = dict(codec.encode(random_tensors(4), HERE))
    if name == "slot missing":
        del message[B]
    elif name == "another slot":
        message[Slot("x", "lora_B")] = torch.zeros(1)
    elif name == "shape":
        message[B] = message[B].reshape(-1)[:-1]
    elif name == "dtype":
        message[B] = message[B].double()
    else:
        message[B] = message[B].to(torch.float32) * math.nan
    return message


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("name", ["slot missing", "another slot", "shape", "dtype", "nan"])
def test_a_hostile_message_is_refused_in_one_sentence(name: str, codec: Codec) -> None:
    like = random_tensors(4)
    with pytest.raises(InputError, match=r"^Expected [^\n]* in a message, got [^\n]*$"):
        decoded(codec, hostile(name, codec, like), like, HERE)


@pytest.mark.parametrize("places", [[-1, 3], [0, 1280], [5, 5], [7, 2], [-(2**31), 2**31 - 1]])
def test_places_outside_a_tensor_twice_or_out_of_order_are_refused(places: list[int]) -> None:
    codec, like = TopK(2 / 1280), {B: torch.zeros(160, 8)}
    message = codec.encode(like, HERE) | {part(B, "places"): torch.tensor(places, dtype=torch.int32)}
    with pytest.raises(InputError, match="Expected ascending places within lora_B in a message"):
        decoded(codec, message, like, HERE)


@pytest.mark.parametrize("codec", CODECS[1:], ids=repr)
def test_what_travels_is_the_change_from_what_was_sent_down(codec: Codec) -> None:
    down = random_tensors(6, 1000.0)
    moved = {slot: tensor + 1e-2 * random_tensors(7)[slot] for slot, tensor in down.items()}
    arrived = decoded(codec, encoded(codec, moved, down, HERE), down, HERE)
    assert all(arrived[slot].dtype == down[slot].dtype for slot in down)
    off = flat(arrived) - flat(moved)
    assert float(off.norm()) <= 2.2 * float((flat(moved) - flat(down)).norm()), "of the change, not of the values"
    still = decoded(codec, encoded(codec, down, down, HERE), down, HERE)
    assert all(torch.equal(still[slot], down[slot]) for slot in down)
