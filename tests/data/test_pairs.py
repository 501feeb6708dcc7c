"""Rows of two texts: both are read together, both decide where a row lies, and a model is told which is which.

Mutants killed: a hash of the first text alone, segment ids that are not shuffled with their rows, a cached prefix whose
key forgets segment ids.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlr.data.placement as places
import fedlr.models.prefix
from fedlr.client.trainee import Trainee
from fedlr.config.build import build
from fedlr.config.schema import compose_experiment
from fedlr.data.partition import iid
from fedlr.data.placement import num_shared_texts, split_train_test, whole_rows
from fedlr.data.store import TableStore
from fedlr.data.table import LabelledText, load_table
from fedlr.errors import InputError
from fedlr.flower.terms import Terms
from fedlr.models.network import tiny_random
from fedlr.models.prefix import encode_prefix, without_prefix
from fedlr.models.tuners.attach import attach
from fedlr.models.usage import code_of_card
from fedlr.simulations.devices import write_devices
from fedlr.simulations.federation import assemble, prepare
from fedlr.simulations.simulate import simulate
from fedlr.tasks.reading import check_reading
from fedlr.tasks.tokenise import tokenise
from fedlr.training.threads import torch_threads
from tests.client.device_files import device_settings, terms_tree
from tests.training.small_models import mutant

LABELS = ("no", "yes")
WORDS = ("river", "stone", "garden", "winter", "letter", "music")
TINY = (
    *("experiment=tiny", "data=table", "data.text_pair_column=second", "data.labels=[no,yes]", "data.public=true"),
    *("data.num_test=0.25", "data.max_length=24", "num_clients=2", "cohort_size=2", "num_rounds=1"),
    *("trainer.sample_rate=0.5", "partition=iid", "runtime.num_workers=1"),
)


def pairs(*rows: tuple[str, str]) -> LabelledText:
    firsts, seconds = zip(*rows, strict=True)
    return LabelledText(firsts, np.arange(len(rows)) % 2, LABELS, None, "here", pairs=seconds)


def made_up(num_rows: int = 80) -> LabelledText:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, size=size)) for size in generator.integers(1, 9, size=2 * num_rows)]
    return pairs(*zip(texts[:num_rows], texts[num_rows:], strict=True))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    data = made_up()
    rows = zip(data.texts, data.pairs or (), data.labels, strict=True)
    path.write_text("\n".join(json.dumps({"text": a, "second": b, "label": LABELS[label]}) for a, b, label in rows))
    return path


def base(**sizes: int):
    return tiny_random(label_names=LABELS, seed=0, **sizes)


def test_both_texts_are_read_together_and_the_longer_is_cut_first() -> None:
    data, tokenizer = made_up(), base().tokenizer
    found = tokenise(data, tokenizer, max_length=12)
    whole = tokenizer(list(data.texts), list(data.pairs or ()))["input_ids"]
    assert found.num_truncated == sum(len(ids) > 12 for ids in whole) > 0
    for i, (one, other) in enumerate(zip(data.texts, data.pairs or (), strict=True)):
        ids = found.ids[found.offsets[i] : found.offsets[i + 1]].tolist()
        types = found.token_type_ids[found.offsets[i] : found.offsets[i + 1]].tolist()
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (one, other))
        while len(first) + len(second) > 9:
            (first if len(first) > len(second) else second).pop()
        assert sorted([len(first), len(second)]) == sorted([types.count(0) - 2, types.count(1) - 1])
        if len(whole[i]) <= 12:
            assert ids == [2, *first, 3, *second, 3]
            assert types == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_segment_ids_follow_their_rows_and_reach_the_model() -> None:
    data = made_up()
    found = tokenise(data, base().tokenizer, max_length=24)
    inputs, _ = found.batch([7, 3])
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    for place, row in enumerate((7, 3)):
        expected = base().tokenizer(
            data.texts[row], data.pairs[row], padding="max_length", max_length=len(inputs["input_ids"][0])
        )
        for name in inputs:
            assert inputs[name][place].tolist() == expected[name], name
    network = base().network.eval()
    without = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    assert not torch.equal(network(**inputs).logits, network(**without).logits)


def test_single_texts_have_no_segment_ids() -> None:
    data = LabelledText(made_up().texts, made_up().labels, LABELS, None, "here")
    found = tokenise(data, base().tokenizer, max_length=24)
    assert found.token_type_ids is None and set(found.batch([0])[0]) == {"input_ids", "attention_mask"}


def test_both_texts_decide_where_a_row_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    same_first = pairs(*(("the same", f"other {i}") for i in range(40)))
    same_second = pairs(*((f"other {i}", "the same") for i in range(40)))
    for data in (same_first, same_second):
        assert 5 < len(split_train_test(data, num_test=0.5, seed=1)[1]) < 35
    twins = pairs(("So  Good", "yes"), ("so good", " YES"), ("so", "good yes"), ("so good yes", ""))
    assert len(set(map(places.content, whole_rows(twins)))) == 3
    parts = iid(pairs(*([("a b", "c"), ("A  b", "C")] * 5)), num_clients=3, seed=0)
    assert sorted(map(len, parts.indices)) == [0, 0, 10] and num_shared_texts(same_first, [np.arange(40)]) == 0

    monkeypatch.setattr(places, "whole_rows", lambda data: data.texts)
    with pytest.raises(InputError, match="both sides"):
        split_train_test(same_first, num_test=0.5, seed=1)


def test_a_cached_prefix_gives_the_logits_of_pairs_and_its_key_knows_segment_ids(tmp_path: Path) -> None:
    e = compose_experiment(["experiment=tiny", "adapter.layers=[1]"])
    model = attach(base(), e.adapter, seed=0).eval()
    data = tokenise(made_up(), base().tokenizer, max_length=24)
    rows = np.arange(6)
    cached = encode_prefix(model, data.subset(rows), token_budget=10_000)
    with torch.no_grad():
        whole = model(**data.batch(rows)[0]).logits
        upper = without_prefix(model)(**cached.batch(rows)[0]).logits
    assert torch.equal(whole, upper)

    blind = mutant(fedlr.models.prefix, ('"token_types": _digest(data.token_type_ids)', '"token_types": ""'))
    other = data.__class__(data.ids, data.offsets, data.labels, data.pad_id, 0, np.zeros_like(data.token_type_ids))
    for module, differ in ((fedlr.models.prefix, True), (blind, False)):
        store = TableStore(tmp_path / str(differ))
        one, two = (module.encode_prefix(model, texts, store=store).hidden for texts in (data, other))
        assert (not np.array_equal(one, two)) == differ


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_pairs_train_and_the_card_opens_them(
    engine: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, f"data.path={table}", f"tracking.output_dir={tmp_path}", f"trainer.engine={engine}"]
    e = compose_experiment([*words, "adapter.train_head=true", "trainer.num_steps=2"])
    run_dir = simulate(e, say=lambda line: None)
    code = code_of_card((run_dir / "adapter" / "README.md").read_text())
    assert code is not None
    monkeypatch.chdir(run_dir / "adapter")
    space: dict = {"__name__": "__main__"}
    exec(compile(code, "card", "exec"), space)
    test = load_table(table, text_pair_column="second", labels=LABELS)
    test = split_train_test(test, num_test=0.25, seed=0)[1]
    chances = space["classify"](list(zip(test.texts, test.pairs or (), strict=True)))
    loss = -torch.log(chances[range(len(test)), test.labels.tolist()]).mean().item()
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(loss - last["loss"]) < 1e-4


def test_devices_read_the_rows_of_the_simulation(table: Path, tmp_path: Path) -> None:
    e = compose_experiment([*TINY, f"data.path={table}"])
    with torch_threads(1):
        federation = assemble(e, seed=3)
        (tmp_path / "ca.crt").write_text("")
        from fedlr.client.settings import load_settings

        paths = write_devices(e, tmp_path, seed=3, address="127.0.0.1:1", root_certificates=tmp_path / "ca.crt")
        terms = Terms.of(
            e,
            federation.mechanism,
            experiment_id="0" * 32,
            seed=3,
            model_sha256=federation.base.fingerprint,
            label_names=LABELS,
            pairs=federation.has_pairs,
        )
        for client_id, path in enumerate(paths):
            share = Trainee.prepare(load_settings(path), terms, say=lambda line: None).share
            own = federation.clients[client_id]
            mine = own.table.subset(own.rows)
            assert np.array_equal(share.table.ids, mine.ids)
            assert np.array_equal(share.table.token_type_ids, mine.token_type_ids)
            assert share.table.token_type_ids.any()


def test_a_device_with_other_rows_than_the_terms_say_is_refused(tmp_path: Path) -> None:
    from fedlr.client.policy import PolicyRefusal, check_terms

    settings = device_settings(tmp_path)
    with pytest.raises(PolicyRefusal, match="pairs.*data.text_pair_column to the column of the second text"):
        check_terms(Terms.read(json.dumps(terms_tree({"pairs": True}))), settings)
    of_pairs = device_settings(tmp_path / "pairs", data__text_pair_column="second")
    with pytest.raises(PolicyRefusal, match="pairs.*data.text_pair_column to null"):
        check_terms(Terms.read(json.dumps(terms_tree())), of_pairs)
    with pytest.raises(InputError, match="no column 'second'"):
        build(of_pairs.data.section(), "data", seed=0)


def test_terms_of_single_texts_say_nothing_new() -> None:
    one, two = (Terms.read(json.dumps(terms_tree(changes))) for changes in ({}, {"pairs": True}))
    assert "pairs" not in one.text() and Terms.read(one.text()) == one
    assert Terms.read(two.text()).pairs and two.sha256() != one.sha256()


def test_what_cannot_tell_two_texts_apart_is_refused() -> None:
    from tokenizers.processors import TemplateProcessing

    end_to_end = base()
    end_to_end.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    check_reading(end_to_end, max_length=24)
    with pytest.raises(InputError, match="writes them end to end.*data.text_pair_column=null"):
        check_reading(end_to_end, max_length=24, has_pairs=True)
    no_types = base()
    no_types.network.bert.embeddings.token_type_embeddings = torch.nn.Embedding(1, 32)
    check_reading(no_types, max_length=24)
    with pytest.raises(InputError, match=r"token_type_ids up to 1.*tokenizer that the model was trained with"):
        check_reading(no_types, max_length=24, has_pairs=True)
    with pytest.raises(InputError, match=r"max_length in \[5, 64\]"):
        tokenise(made_up(), base().tokenizer, max_length=4)


def test_a_run_without_the_second_column_reads_the_first_alone(table: Path) -> None:
    f = prepare(compose_experiment([*TINY, f"data.path={table}", "data.text_pair_column=null"]), seed=0)
    assert not f.has_pairs and f.clients[0].table.token_type_ids is None
