"""What a hostile server may send: terms and requests, one thing wrong with each."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fedlr.adapters.state import HEAD, LORA_A, LORA_B, SIDE_A, SIDE_B, AdapterState, Slot
from fedlr.flower.messages import Request
from fedlr.flower.records import RecordDict, facts_of, from_record, to_record
from fedlr.flower.terms import Terms
from fedlr.rounds.round import RoundRequest
from tests.client.device_files import (
    LABELS,
    LANGUAGE,
    PATH,
    PICTURES,
    enrolled,
    language_terms,
    picture_task,
    picture_terms,
    terms_tree,
)

NAN, INF = math.nan, math.inf
RULES = "fedlr.client_rules."  # as protocol 1 spells them
REDOS = "(([a-z])+.)+[A-Z]([a-z])+$"


def noise(key: str, value: Any) -> dict[str, Any]:
    """Change a constant of the mechanism, in the trainer too where it is there as well."""
    both = {"sample_rate", "divisor"} & {key}
    return {f"mechanism.{key}": value} | {f"trainer.{key}": value for key in both}


def section(target: str, /, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


# What a server may say in the terms of an experiment, by dotted key; `...` leaves the key out.
TERMS: Mapping[str, Mapping[str, Any]] = {
    # the mechanism
    "a clip bound of a billion": noise("max_grad_norm", 1e9),
    "a clip bound below float32's grain": noise("max_grad_norm", 1e-44),
    "a clip bound that is not finite": noise("max_grad_norm", INF),
    "a clip bound that is no number": noise("max_grad_norm", NAN),
    "a negative clip bound": noise("max_grad_norm", -1.0),
    "no noise": noise("noise_multiplier", 0.0),
    "next to no noise": noise("noise_multiplier", 1e-200),
    "a little noise": noise("noise_multiplier", 0.05),
    "noise that is no number": noise("noise_multiplier", NAN),
    "nothing but noise": noise("noise_multiplier", 1e30),
    "every row in every step": noise("sample_rate", 1.0),
    "more than every row": noise("sample_rate", 1.5),
    "a sample rate that is no number": noise("sample_rate", NAN),
    "a sample rate of text": noise("sample_rate", "0.2"),
    "another sample rate than is accounted": {"trainer.sample_rate": 0.25},
    "another divisor than is accounted": {"trainer.divisor": 4.0},
    "a divisor near zero": noise("divisor", 1e-300),
    "a divisor of zero": noise("divisor", 0.0),
    "a divisor that blows steps up": noise("divisor", 0.01),
    "a divisor without an end": noise("divisor", 1e300),
    "no mechanism at all": {"mechanism": None},
    "a codec that sends the largest noise": {"codec": {"_target_": "top_k", "keep": 0.1}},
    "a codec that nobody has": {"codec": {"_target_": "os.system"}},
    "a codec of nothing": {"codec": {"_target_": "projection", "keep": 0.0}},
    "a codec beside what must be remembered to the bit": {
        "codec": {"_target_": "int8"},
        "client_rule": {
            "_target_": "fedlr.client_rules.scaffold.ScaffoldClient",
            "lr": 0.5,
            "optimizer": "torch.optim.SGD",
        },
    },
    "a smaller delta than the device's ledger has": {"mechanism.delta": 1e-9},
    "a delta that is no probability": {"mechanism.delta": 2.0},
    "a mechanism without its noise": {"mechanism.noise_multiplier": ...},
    "noise from a seed": {"randomness": "seeded"},
    "noise from somewhere else": {"randomness": "server"},
    # how long
    "a million steps": {"trainer.num_steps": 1_000_000},
    "no steps": {"trainer.num_steps": 0},
    "two and a half steps": {"trainer.num_steps": 2.5},
    "a billion rounds": {"num_rounds": 1_000_000_000},
    "a negative number of rounds": {"num_rounds": -3},
    # memory and time
    "texts of a billion tokens": {"max_length": 1_000_000_000},
    "a trillion tokens at a time": {"trainer.token_budget": 10**12},
    "a billion tokens at a time": {"trainer.token_budget": 10**9},
    "a rank of a million": {"adapter.rank": 1_000_000},
    "a scale of a billion": {"adapter.lora_alpha": 2e9},
    "a scale near zero": {"adapter.lora_alpha": 1e-30},
    "a scale that is no number": {"adapter.lora_alpha": NAN},
    "sizes for LoRA": {"adapter.sizes": {"r": 8}},
    "a pattern that never ends": {"adapter.target_modules": REDOS},
    "a pattern that ends": {"adapter.target_modules": ".*query"},
    "a pattern among names": {"adapter.target_modules": ["query", REDOS]},
    "a million names": {"adapter.target_modules": ["query"] * 1_001},
    "names of a megabyte": {"adapter.target_modules": ["q" * 500_000]},
    "layers without an end": {"adapter.layers": list(range(2_000))},
    "ranks without an end": {"adapter.client_ranks": [1] * 2_000},
    "a huge text": {"name": "x" * 1_000_000},
    "a deep text": {"adapter.sizes": json.loads("[" * 900 + "]" * 900)},
    # code
    "os.system as optimizer": {"trainer.optimizer": section("os.system", command="true")},
    "eval as optimizer": {"trainer.optimizer": section("builtins.eval", source="1")},
    "a partial as optimizer": {"trainer.optimizer": section("functools.partial", func="os.system")},
    "get_method as optimizer": {"trainer.optimizer": section("hydra.utils.get_method", path="os.system")},
    "an optimizer that looks like one": {"trainer.optimizer": section("torch.optim.SGD.__init__", lr=1.0)},
    "an optimizer that reads twice": {"trainer.optimizer": section("torch.optim.LBFGS", lr=1.0)},
    "an optimizer from a file": {"trainer.optimizer": section("hostile.Optimizer", lr=1.0)},
    "a hidden second target": {"trainer.optimizer": section("torch.optim.SGD", lr=1.0, target="os.system")},
    "a section as learning rate": {"trainer.optimizer.lr": section("os.system", command="true")},
    "text as learning rate": {"trainer.optimizer.lr": "1.0"},
    "a learning rate that is no number": {"trainer.optimizer.lr": NAN},
    "a learning rate without an end": {"trainer.optimizer.lr": INF},
    "a huge learning rate": {"trainer.optimizer.lr": 1e300},
    "a large weight decay": {"trainer.optimizer.weight_decay": 1e7},
    "a negative learning rate": {"trainer.optimizer.lr": -1.0},
    "an optimizer on a graph": {"trainer.optimizer.differentiable": True},
    "an argument nobody knows": {"trainer.optimizer.callback": 1},
    "os.system after the noise": {"trainer.after_noise": section("os.system", command="true")},
    "an export after the noise": {"trainer.after_noise": section("fedlr.models.export.export_adapter", folder="/tmp")},
    "get_method after the noise": {"trainer.after_noise": section("hydra.utils.get_method", path="os.system")},
    "a rule within rules": {"client_rule": section(f"{RULES}chain.Chain", rules=[])},
    "os.system as client rule": {"client_rule": section("os.system", command="true")},
    "a rule with a text": {"client_rule": section(f"{RULES}preconditioned.LoraPlus", ratio=2.0, optimizer="os.system")},
    "a rule of text": {"client_rule": "fedlr.client_rules.proximal.FedProx"},
    "a clipping whose bound rounds away": {"trainer.engine": "opacus", "trainer.grad_sample_mode": "ghost"},
    "another clipping": {"trainer.grad_sample_mode": "none"},
    "another engine": {"trainer.engine": "hostile.engine"},
    "a start that reads the data": {"adapter.init_lora_weights": "eva"},
    "a start from a file": {"adapter.init_lora_weights": "/etc/passwd"},
    # what it is all about
    "another adapter": {"adapter.system": "vera"},
    "an adapter nobody knows": {"adapter.system": "../../hostile"},
    "other labels": {"label_names": ["guilty", "innocent"]},
    "the labels the other way round": {"label_names": ["positive", "negative"]},
    "one label more": {"label_names": ["negative", "positive", "patient zero"]},
    "a weight of a label that nobody has": {"label_weights": {"patient zero": 2.0}},
    "a weight below zero": {"label_weights": {"negative": -1.0}},
    "a weight beyond all bounds": {"label_weights": {"negative": 1e30}},
    "a weight that is code": {"label_weights": {"negative": {"_target_": "os.system"}}},
    "pairs of texts where there is one": {"pairs": True},
    "no labels": {"label_names": ...},
    # of another task
    "a task nobody knows": {"task": {"name": "os.system"}},
    "a task without a name": {"task": {}},
    "pictures, of a device that has texts": {"task": picture_task()},
    "a language model, of an owner who did not allow it": language_terms(),
    "numbers, of a device that has labels": {"task": {"name": "text_regression", "score_range": [0.0, 1.0]}},
    "a template of its own": language_terms({"task.template": "{{ ''.__class__.__mro__ }}"}),
    "a template from a file": language_terms({"task.template": "/etc/passwd"}),
    "a tokenizer from a file": language_terms({"task.reading_sha256": "/etc/passwd"}),
    "a tokenizer without a hash": language_terms({"task.reading_sha256": ...}),
    "answers without an end": language_terms({"task.max_response": 10**9}),
    "answers of no token": language_terms({"task.max_response": 0}),
    "labels of conversations": language_terms({"label_names": list(LABELS)}),
    "conversations in pairs": language_terms({"pairs": True}),
    "pictures in pairs": picture_terms({"pairs": True}),
    "a key of a task that nobody knows": picture_terms({"task.fetch": "http://hostile"}),
    "another model": {"model_sha256": "f" * 64},
    "no hash of a model": {"model_sha256": "any"},
    "the head of another seed": {"seed": 1},
    "no experiment": {"experiment_id": ...},
    "an experiment outside its folder": {"experiment_id": "../../../../../../../tmp/xxxxxxx"},
    "a name that moves the cursor": {"name": "tiny\x1b[2J\nall is well"},
    "a later protocol": {"protocol": 2},
    "a key nobody knows": {"on_device": "os.system"},
}  # fmt: skip


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


FINE = ones(16, 2)


def side(lora_A: torch.Tensor, lora_B: torch.Tensor) -> dict[Slot, torch.Tensor]:
    return {Slot(f"side/{PATH}", SIDE_A): lora_A, Slot(f"side/{PATH}", SIDE_B): lora_B}


def poisoned(value: float) -> torch.Tensor:
    tensor = torch.zeros(16, 2)
    tensor[3, 1] = value
    return tensor


# What a server may say in one request: facts, and tensors by group; the sane ones are replaced.
REQUESTS: Mapping[str, tuple[Mapping[str, Any], Mapping[Slot, torch.Tensor]]] = {
    "a round after the last": ({"round_index": 3}, {}),
    "a negative round": ({"round_index": -1}, {}),
    "a round of another kind": ({"round_index": "0"}, {}),
    "a negative client": ({"client_id": -1}, {}),
    "nothing to train": ({"block": []}, {}),
    "a head to train that terms keep frozen": ({"block": [HEAD]}, {}),
    "the base to train": ({"block": ["base_layer"]}, {}),
    "a block of another system": ({"block": ["vera.lambda_b"]}, {}),
    "ten thousand blocks": ({"block": [[f"layer.{n}", LORA_B] for n in range(10_001)]}, {}),
    "nothing to send": ({"personal": [LORA_B]}, {}),
    "something personal nobody knows": ({"personal": ["data"]}, {}),
    "a rank above the adapter's": ({"rank": 3}, {}),
    "a rank above what it broadcasts": (
        {"rank": 2},
        {Slot(f"broadcast/{PATH}", LORA_A): ones(1, 16), Slot(f"broadcast/{PATH}", LORA_B): ones(16, 1)},
    ),
    "a rank beside what is personal": ({"rank": 1, "block": [LORA_A, LORA_B], "personal": [LORA_B]}, {}),
    "another scale": ({"scale": 1e9}, {}),
    "a scale that is no number": ({"scale": NAN}, {}),
    "another adapter than it says": ({"enrolled_sha256": "0" * 64}, {}),
    "an enrolled adapter that is no number": ({}, {Slot(f"enrolled/{PATH}", LORA_B): poisoned(NAN)}),
    "an enrolled adapter without an end": ({}, {Slot(f"enrolled/{PATH}", LORA_B): torch.zeros(2_000, 2)}),
    "an enrolled role nobody knows": ({}, {Slot(f"enrolled/{PATH}", "noise"): FINE}),
    "a personal head that nobody trains, and nothing else": ({"personal": [LORA_B, HEAD]}, {}),
    "values that are no numbers": ({}, {Slot(f"broadcast/{PATH}", LORA_B): poisoned(NAN)}),
    "values without an end": ({}, {Slot(f"broadcast/{PATH}", LORA_B): poisoned(INF)}),
    "values near the end of float32": ({}, {Slot(f"broadcast/{PATH}", LORA_B): poisoned(3e38)}),
    "values near the other end": ({}, {Slot(f"broadcast/{PATH}", LORA_B): poisoned(-3e38)}),
    "no values": ({}, {Slot(f"broadcast/{PATH}", LORA_B): torch.zeros(16, 0)}),
    "too many values": ({}, {Slot(f"broadcast/{PATH}", LORA_B): torch.zeros(2_000, 2)}),
    "a factor of a higher rank": ({}, {Slot(f"broadcast/{PATH}", LORA_B): torch.zeros(16, 3)}),
    "a factor of four sides": ({}, {Slot(f"broadcast/{PATH}", LORA_B): torch.zeros(16, 1, 1, 2)}),
    "a role nobody knows": ({}, {Slot(f"broadcast/{PATH}", "noise"): FINE}),
    "a path that moves the cursor": ({}, {Slot("broadcast/\x1b[2J", LORA_B): FINE}),
    "a group nobody knows": ({}, {Slot(f"data/{PATH}", LORA_B): FINE}),
    "controls that are no numbers": ({}, {Slot(f"control/{PATH}", LORA_B): poisoned(NAN)}),
    "too many controls": ({}, {Slot(f"control/{PATH}", LORA_B): torch.zeros(2_000, 2)}),
    "half a side": ({}, {Slot(f"side/{PATH}", SIDE_A): ones(2, 16)}),
    "a side without an end": ({}, side(ones(3_000, 2), ones(2, 3_000))),
    "a side that does not fit itself": ({}, side(ones(2, 16), ones(16, 3))),
    "a side of numbers in a row": ({}, side(ones(32), ones(32))),
}  # fmt: skip
OWN_READER = {"_target_": "tests.client.device_files.rows_of_their_own", "labels": list(LABELS)}
VERA = {"policy__allowed_adapters": ["vera"]}
BOUNDS = {"policy__max_trained_values": 3_000, "policy__max_side_values": 5_000, "policy__max_experiments": 2}
# Seen only by a device of another kind: its settings, then the terms.
OTHER_DEVICES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "noise for a device without a budget": ({"privacy__epsilon": None, "policy__allow_no_privacy": True}, {}),
    "fresh noise for a ledger of seeded noise": (
        {"privacy__randomness": "seeded", "policy__allow_seeded_randomness": True},
        {},
    ),
    "sizes that are a pattern": (VERA, {"adapter.system": "vera", "adapter.sizes": {"exclude_modules": REDOS}}),
    "sizes that are a bomb": (VERA, {"adapter.system": "vera", "adapter.sizes": {"vera_dropout": 0, "r": 10**9}}),
    "sizes in a row": (VERA, {"adapter.system": "vera", "adapter.sizes": {"layers_pattern": [1, 2]}}),
    "sizes within sizes": (VERA, {"adapter.system": "vera", "adapter.sizes": {"rank_pattern": {REDOS: 1}}}),
    "an experiment after the last": ({"num_experiments": 2}, {}),
    "a task that the owner's own reader does not name": (
        {"data": OWN_READER, "policy__allowed_tasks": ["text_classification"]},
        {"task": picture_task()},
    ),
    "texts, of a device that has conversations": (LANGUAGE, {}),
    "the vocabulary to train": (LANGUAGE, language_terms({"adapter.train_head": True})),
    "conversations of a billion tokens": (LANGUAGE, language_terms({"max_length": 10**9})),
    "a range of numbers that the owner did not declare": (
        {"data": {"_target_": "scored_table", "path": "letters.csv", "score_range": [0, 5]}},
        {"task": {"name": "text_regression", "score_range": [0.0, 1.0]}, "label_names": ...},
    ),
    "a range of numbers without an end": (
        {"data": {"_target_": "scored_table", "path": "letters.csv", "score_range": [0, 5]}},
        {"task": {"name": "text_regression", "score_range": [0.0, INF]}, "label_names": ...},
    ),
    "labels that the owner did not declare": (
        {"data": {"_target_": "multilabel_table", "path": "letters.csv", "labels": ["a", "b"]}},
        {"task": {"name": "text_multilabel", "labels": ["b", "a"]}, "label_names": ...},
    ),
    "another template": (LANGUAGE, language_terms({"task.reading_sha256": "f" * 64})),
    "another language model": (LANGUAGE, language_terms({"model_sha256": "f" * 64})),
    "pixels of another scale": (PICTURES, picture_terms({"task.reading_sha256": "f" * 64})),
}


class Case(NamedTuple):
    """What a server says that is consistent in all else, and to which device."""

    terms: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}
    tensors: Mapping[Slot, torch.Tensor] = {}
    device: Mapping[str, Any] = {}

    def record(self) -> RecordDict:
        tree = terms_tree(self.terms)
        adapter = enrolled(tree["adapter"]["system"], self.facts.get("scale", scale_of(tree["adapter"])))
        given = {
            Slot(s.path.removeprefix("enrolled/"), s.role): t for s, t in self.tensors.items() if "enrolled" in s.path
        }
        adapter = replace(adapter, tensors={**adapter.tensors, **given})
        sane = sane_request(adapter).record()
        facts = facts_of(sane) | {"terms": json.dumps(tree)} | dict(self.facts)
        return to_record(from_record(sane) | dict(self.tensors), facts)


CASES: Mapping[str, Case] = (
    {name: Case(terms) for name, terms in TERMS.items()}
    | {name: Case({}, facts, tensors) for name, (facts, tensors) in REQUESTS.items()}
    | {name: Case(terms, device=device) for name, (device, terms) in OTHER_DEVICES.items()}
)
AFTER_THE_MODEL = (  # which must be loaded to have a hash
    *("another model", "the head of another seed"),
    *("another template", "another language model", "pixels of another scale"),
)


def scale_of(adapter: Mapping[str, Any]) -> float:
    rank, alpha = adapter["rank"], adapter["lora_alpha"]
    return alpha / rank if adapter["system"] == "lora" else 1.0


def sane_request(adapter: AdapterState | None = None, terms: Mapping[str, Any] | None = None) -> Request:
    """Return the first round, the adapter's last block to be trained."""
    adapter = adapter or enrolled()
    block = frozenset({LORA_B if Slot(PATH, LORA_B) in adapter.tensors else max(adapter.tensors).role})
    task = RoundRequest(0, adapter.select(block), block)
    read = Terms.read(json.dumps(terms_tree(terms)))
    return Request(read, 0, task, adapter.fingerprint(), adapter.scale, adapter)
