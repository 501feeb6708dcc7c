"""The plan says beforehand what the accountant, the ledger and the run say afterwards, and writes nothing.

Mutants this file kills: epsilon of the expected participation called the worst case; a plan of another draw of cohorts
than the run's; bytes of one client called bytes of a round.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers.models.bert.modeling_bert import BertEmbeddings

from fedlr.config.schema import compose_experiment
from fedlr.privacy.accountant import calibrate_noise_multiplier, epsilon
from fedlr.privacy.charges import read_ledger
from fedlr.privacy.mechanism import PrivacyBudget
from fedlr.privacy.sampling import PoissonSampler
from fedlr.runs.report.wording import epsilon_text
from fedlr.simulations import cli
from fedlr.simulations.costs import MOST_MEASURED, cohort_bytes, num_evaluations, num_passes, num_steps
from fedlr.simulations.federation import assemble, prepare
from fedlr.simulations.plan import make_plan, size

TINY = ("experiment=tiny", "num_rounds=4", "num_clients=6", "runtime.num_workers=1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    return tmp_path


def told(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} in\n{text}"
    return float(found[1])


def test_epsilons_are_the_accountants(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.plan(list(TINY)) == 0
    text = capsys.readouterr().out
    noise = calibrate_noise_multiplier(PrivacyBudget(6.0, 1e-5), sample_rate=0.2, num_steps=8, accountant="rdp")
    assert told(text, r"multiplier ([\d.]+)") == noise

    def spent(rounds: int) -> float:
        return float(epsilon_text(epsilon([(PoissonSampler(0.2).dp_event(noise), 2 * rounds)], 1e-5, accountant="rdp")))

    assert told(text, r"epsilon +([\d.]+) expected: .* 2 of 4 rounds") == spent(2)
    assert told(text, r"([\d.]+) worst case: 4 rounds") == spent(4) <= 6
    for what in ("a round, ", "in all 4", "memory", "time", "budget 6 at delta 1e-05", "512 trained values"):
        assert what in text
    assert list(here.iterdir()) == [], "a plan writes nothing"
    # Of 120 held-out rows, half of them negative, 72 right are the least whose exact interval lies above one half.
    assert told(text, r'120 held-out rows, "negative" is 50.0 % .* from ([\d.]+) % right') == 60.0
    assert ("adapter.train_head=true" in text, "hold out about 400" in text) == (True, True)


def test_the_busiest_client_is_the_one_of_the_run(here: Path) -> None:
    words = [*TINY, "cohort_size=2"]  # the busiest has 3 rounds with seed 0, and 2 with seed 1
    text = make_plan(compose_experiment(words))
    assert cli.simulate(words) == 0
    (run_dir,) = (here / "outputs" / "tiny").iterdir()
    header, charges, _ = read_ledger(run_dir / "ledger.jsonl")
    spent = {client: charges.epsilon(client, header) for client in range(6)}
    assert told(text, r"([\d.]+) for the busiest client in the cohorts of seed 0") == round(max(spent.values()), 3)
    busiest = max(len(charges.of(client)) for client in range(6))
    assert told(text, r"busiest client .*: (\d+) rounds") == busiest

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    up, down = re.search(r"([\d.]+) kB up and ([\d.]+) kB down a round", text).groups()
    assert float(up) == round(rows[1]["bytes_up"] / 1e3, 1) and float(down) == round(rows[1]["bytes_down"] / 1e3, 1)


def test_noise_that_does_not_last_is_said_to_end_early() -> None:
    text = make_plan(compose_experiment([*TINY, "privacy.noise_multiplier=0.8"]))
    event = PoissonSampler(0.2).dp_event(0.8)
    lasting = max(n for n in range(1, 5) if epsilon([(event, 2 * n)], 1e-5, accountant="rdp") <= 6)
    assert lasting < 4 and f"the budget lasts for {lasting} rounds of a client" in text


def test_without_privacy_the_plan_says_so() -> None:
    assert "none: epsilon is infinite" in make_plan(compose_experiment([*TINY, "privacy=none"]))


def test_plans_of_a_sweep_stand_one_below_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.plan([*TINY, "-m", "method=fedsvd,ffa_lora"]) == 0
    out = capsys.readouterr().out
    assert "tiny: fedsvd," in out and "\n\ntiny: ffa_lora," in out


def test_expected_participation_is_rounded_up() -> None:
    text = make_plan(compose_experiment([*TINY, "num_rounds=1", "cohort_size=1"]))
    assert "1 of 1 rounds" in text


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of texts of each pass through the embeddings, which come before every frozen layer."""
    seen: list[int] = []
    forward = BertEmbeddings.forward

    def counted(self: BertEmbeddings, input_ids: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(BertEmbeddings, "forward", counted)
    return seen


MANY = ("data.num_examples=6000", "data.num_test=2000", "trainer.sample_rate=0.9", "num_clients=3", "cohort_size=3")


@pytest.mark.parametrize(
    "choice", ["runtime.cache_prefix=true", "runtime.cache_prefix=false", "trainer.engine=opacus", "privacy=none"]
)
def test_a_plan_lets_few_texts_pass_the_model_however_many_there_are(choice: str, passed: list[int]) -> None:
    words = [*TINY, "adapter.layers=[1]", choice]
    assert "an estimate" in make_plan(compose_experiment([*words, *MANY]))
    of_many = sum(passed)
    assert 0 < of_many <= 16 * MOST_MEASURED < 6000 * 0.9 / 3


def test_a_plan_says_what_the_states_of_the_frozen_layers_take_and_keeps_none(here: Path) -> None:
    cached = [*TINY, "adapter.layers=[1]", "runtime.cache_prefix=true"]
    said: list[str] = []
    f = assemble(compose_experiment(cached), seed=0, say=said.append)
    num_bytes = f.test.hidden.nbytes + f.clients[0].table.hidden.nbytes
    in_memory = make_plan(compose_experiment(cached))
    assert f"{size(num_bytes)} for states" in in_memory and "disk" not in in_memory
    assert said[0] in in_memory and "600 rows" in said[0]
    stored = make_plan(compose_experiment([*cached, "runtime.cache_dir=kept"]))
    assert f"disk        {size(num_bytes)} for states of the frozen layers, in kept" in stored
    assert "less those that lie in runtime.cache_dir" in stored
    assert "in a temporary file" in make_plan(compose_experiment([*cached, "runtime.memory_gb=1e-5"]))
    assert list(here.iterdir()) == [], "a plan writes nothing"


def test_more_texts_and_more_processes_cost_more() -> None:
    cached = [*TINY, "adapter.layers=[1]", "runtime.cache_prefix=true"]
    one, many = (prepare(compose_experiment([*cached, f"runtime.num_processes={n}"]), seed=0) for n in (1, 3))
    assert (num_passes(one), num_passes(many)) == (1, 4), "each actor, and who drives them, has states of its own"
    assert num_evaluations(one) == 1 + 4 and num_steps(one) == 4 * 3 * 2
    scored = prepare(compose_experiment([*TINY, "method=fedsa_lora"]), seed=0)
    assert num_evaluations(scored) == 1 + 4 * 6, "a model of each client"
    rare = one.experiment.model_copy(
        update={"tracking": one.experiment.tracking.model_copy(update={"evaluate_every": 3})}
    )
    assert num_evaluations(replace(one, experiment=rare)) == 1 + 2, "every third, and the last"
    assert cohort_bytes(one) == 2 * 6 * 4 * one.num_trained_values


def test_a_plan_of_a_language_model_says_bytes_time_memory_and_whether_a_cache_pays() -> None:
    words = ["experiment=tiny_lm", "privacy=none", "num_rounds=2", "data.num_examples=60", "adapter.layers=[1]"]
    text = make_plan(compose_experiment(words))
    values = told(text, r"adapter +([\d,]+) trained values")
    assert told(text, r"bytes +([\d.]+) kB up") == pytest.approx(4 * values / 1000, abs=0.06)
    assert re.search(r"time +about .* held-out texts .*tokens", text) and re.search(r"memory +about [\d.]+ [MG]B", text)
    assert told(text, r"a row is read about ([\d.]+) times.*is not worth it") == pytest.approx(2 * 3 * 2 * 0.2 / 6)
    often = make_plan(compose_experiment([*words, "num_rounds=6"]))
    assert told(often, r"a row is read about ([\d.]+) times.*is worth it") == pytest.approx(1.2)
    kept = make_plan(compose_experiment([*words, "runtime.cache_prefix=true"]))
    assert "rows pass the frozen layers once" in kept and "a row is read" not in kept
