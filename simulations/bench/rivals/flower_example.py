"""Private LoRA as in Flower's public examples for Hugging Face models: everything is loaded for every message.

After examples/quickstart-huggingface and examples/flowertune-llm of Flower's repository: the raw data set is a global
of the module; each message loads tokenizer and model, attaches PEFT, tokenises the client's own texts by
`datasets.Dataset.map`, trains, and answers with PEFT's state dict. What a step computes is ours, from the same streams,
so that results can be compared.
"""

from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlr.adapters.state import LORA_B, Slot
from fedlr.config.build import build, build_optimizer
from fedlr.config.schema import Experiment, compose_experiment
from fedlr.data.partition import Partition
from fedlr.data.table import LabelledText
from fedlr.models.network import resolve
from fedlr.models.peft_state import train_only
from fedlr.privacy.mechanism import Mechanism
from fedlr.privacy.sampling import PoissonSampler
from fedlr.runs.prepare import private_mechanism
from fedlr.runs.tables import load_examples
from fedlr.simulations.bench.rivals.flower_cached import content, reply
from fedlr.streams import SeededRandomness
from fedlr.tasks.examples import Share
from fedlr.tasks.losses import class_losses
from fedlr.tasks.tokenise import TokenisedText
from fedlr.training.gradients import HookGradients
from fedlr.training.local import LocalTraining, train_client

BLOCK = frozenset({LORA_B})
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

app = ClientApp()


@dataclass(frozen=True)
class RawData:
    """What the examples keep in a global: texts and who holds them, nothing that was computed."""

    experiment: Experiment
    mechanism: Mechanism | None
    texts: datasets.Dataset
    num_labels: int
    partition: Partition


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load, attach, tokenise, train, send back."""
    torch.set_num_threads(1)
    client = int(context.node_config["partition-id"])
    overrides, arrays, _ = content(message)
    data = raw_data(overrides)
    e = data.experiment
    folder = resolve(str(e.model.section()["name_or_path"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=data.num_labels, **NO_DROPOUT)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=e.adapter.rank,
        lora_alpha=int(e.adapter.lora_alpha),
        target_modules=e.adapter.target_modules,
    )
    model = get_peft_model(network, lora)
    set_peft_model_state_dict(model, arrays)
    mine = tokenised(data.texts.select(data.partition.indices[client]), tokenizer, max_length=e.data.max_length)
    train_privately(model, Share.whole(mine), data, client=client)
    return reply(message, ArrayRecord(get_peft_model_state_dict(model)))


def tokenised(partition: datasets.Dataset, tokenizer: Any, *, max_length: int) -> TokenisedText:
    """Tokenise a client's part of the data set as the examples do; return it as our steps read it."""

    def tokenize(examples: dict[str, Any]) -> Any:
        return tokenizer(examples["text"], truncation=True, max_length=max_length, add_special_tokens=True)

    columns = partition.map(tokenize, batched=True).remove_columns("text")
    ids = columns["input_ids"][:]
    return TokenisedText(
        ids=np.fromiter(chain.from_iterable(ids), dtype=np.int32),
        offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        labels=np.asarray(columns["label"][:], dtype=np.int64),
        pad_id=tokenizer.pad_token_id,
        num_truncated=0,
    )


def train_privately(model: PeftModel, share: Share, data: RawData, *, client: int) -> None:
    """Take the client's private steps with Opacus hooks."""
    e = data.experiment
    trained = train_only(model, BLOCK)
    gradients = HookGradients(model, trained, loss=class_losses)
    training = LocalTraining(
        num_steps=e.trainer.num_steps,
        optimizer=build_optimizer(e.trainer),
        token_budget=e.trainer.token_budget,
        divisor=e.trainer.number_divisor(),
        sampler=PoissonSampler(e.trainer.sample_rate),
    )
    train_client(
        model,
        gradients,
        share,
        training=training,
        mechanism=data.mechanism,
        randomness=SeededRandomness(e.seed or 0),
        client_id=client,
        round_index=0,
        trained=trained,
    )
    gradients.close()


@cache
def raw_data(overrides: tuple[str, ...]) -> RawData:
    """Return this process's copy of the texts, and the rows of each client."""
    e = compose_experiment(overrides)
    seed = e.seed or 0
    texts, _ = load_examples(e, seed=seed)
    assert isinstance(texts, LabelledText)
    partition = build(e.partition.section(), "partition", data=texts, num_clients=e.num_clients, seed=seed)
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": list(texts.texts), "label": texts.labels.tolist()})
    return RawData(e, private_mechanism(e)[1], table, len(texts.label_names), partition)


def start_arrays(model: PeftModel) -> ArrayRecord:
    """Return what the server sends in the first round: every tensor of the adapter and the head."""
    return ArrayRecord(get_peft_model_state_dict(model))


def trained_tensors(model: PeftModel, arrays: ArrayRecord) -> dict[Slot, Tensor]:
    """Return the trained tensors of an answer."""
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    return {slot: parameter.detach() for slot, parameter in train_only(model, BLOCK).items()}
