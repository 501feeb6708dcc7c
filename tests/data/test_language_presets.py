"""Published settings of language models: each composes, with and without privacy, and reads the columns of its data.

The columns are those of the named data sets, as the programs read them that published the settings; rows are made up.
"""

from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

from fedlr.config.schema import compose_experiment
from fedlr.data.conversations import ASSISTANT, SYSTEM, USER, Turn
from fedlr.models.causal import tiny_random_causal
from fedlr.runs.tables import load_examples
from fedlr.tasks.causal_lm import CausalLM

ALPACA = {"instruction": "say {}", "input": "loud", "output": "word {}"}
SAID = (Turn(USER, "say 0\n\nloud"), Turn(ASSISTANT, "word 0"))


class Preset(NamedTuple):
    """Where its data are, its columns, what a row becomes, and what was published of clients, rounds and LoRA."""

    path: str
    columns: dict[str, str]
    turns: tuple[Turn, ...]
    federation: tuple[int, int, int]  # clients, in a round, rounds
    lora: tuple[int, float]
    batch: int
    rate: float


def flowertune(path: str, clients: int, asked: int) -> Preset:
    return Preset(path, ALPACA, SAID, (clients, asked, 200), (32, 64), 16, 5e-5)


PRESETS = {
    "flowertune_general": flowertune("vicgalle/alpaca-gpt4", 20, 2),
    "flowertune_finance": flowertune("FinGPT/fingpt-sentiment-train", 50, 5),
    "flowertune_medical": flowertune("medalpaca/medical_meadow_medical_flashcards", 20, 2)._replace(
        turns=(Turn(USER, "loud"), Turn(ASSISTANT, "word 0"))
    ),
    "flowertune_code": flowertune("lucasmccabe-lmi/CodeAlpaca-20k", 10, 2),
    "openfedllm_alpaca": flowertune("vicgalle/alpaca-gpt4", 20, 2),
    "fedit_dolly": Preset(
        "databricks/databricks-dolly-15k",
        {"instruction": "say {}", "context": "loud", "response": "word {}", "category": "open_qa"},
        SAID,
        (10, 1, 10),
        (8, 16),
        64,
        3e-4,
    ),
    "gemma_dialogues": Preset(
        "Samsung/samsum",
        {"id": "{}", "dialogue": "A: say {}", "summary": "word {}"},
        (Turn(SYSTEM, "Summarize the following dialogue:"), Turn(USER, "A: say 0"), Turn(ASSISTANT, "word 0")),
        (1, 1, 1),
        (32, 32),
        1024,
        3e-3,
    ),
}


def copy_of(preset: Preset, folder: Path) -> Path:
    splits = {
        split: datasets.Dataset.from_list(
            [{name: text.format(first + i) for name, text in preset.columns.items()} for i in range(size)]
        )
        for split, first, size in (("train", 0, 30), ("test", 100, 6))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_a_language_model_reads_the_columns_of_its_data(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    words = [f"experiment={name}", "privacy.accountant=rdp"]
    e = compose_experiment(words)
    assert e.name == name and e.data.section()["path"] == preset.path and e.data.public
    assert (e.num_clients, e.cohort_size, e.num_rounds) == preset.federation
    assert (e.adapter.rank, e.adapter.lora_alpha) == preset.lora
    assert e.trainer.number_divisor() == preset.batch and e.trainer.optimizer.section()["lr"] == preset.rate
    assert abs(e.trainer.sample_rate * (e.data.rows_per_client or 0) - preset.batch) < 0.01 * preset.batch
    assert e.num_rounds * e.cohort_size <= e.num_clients * e.max_participations
    assert e.privacy.is_private and not compose_experiment([*words[:1], "privacy=none"]).privacy.is_private
    rows = [] if e.data.num_test is None else ["data.num_test=6"]
    data, held_out = load_examples(
        compose_experiment([*words, *rows, f"data.path={copy_of(preset, tmp_path)}"]), seed=0
    )
    assert len(data) == (30 if e.data.num_test is None else 24) and len(held_out) == 6
    assert preset.turns in (*data.turns, *held_out.turns)
    base = tiny_random_causal(seed=0)
    read = CausalLM("chatml" if e.task.section().get("template") is None else "alpaca").encode(
        base, data, max_length=e.data.max_length
    )
    assert len(read) == len(data) and read.num_scored.min() > 0 and read.num_truncated == 0
