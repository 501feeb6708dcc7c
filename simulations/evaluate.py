"""The released adapter of a finished run, scored on public rows: beside the base model, where that has answers itself.

What is read of the run is data: its configuration names parts of fedlr, its adapter must be the one that it wrote, and
the base model the one that it trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlr.config.build import build, build_method, build_task, naming
from fedlr.config.schema import Experiment
from fedlr.data.choices import ChoiceFormat, load_questions
from fedlr.data.conversations import Conversations
from fedlr.errors import InputError
from fedlr.models.network import AdaptedModel, BaseModel
from fedlr.models.products import has_onednn
from fedlr.models.released import open_released
from fedlr.rounds.evaluate import evaluate
from fedlr.runs.directory import FINISHED, SUMMARY, read_json, recorded_experiment
from fedlr.runs.evaluations import EvaluationEntry, Sample
from fedlr.runs.prepare import whole_and_working
from fedlr.runs.selection import BEST
from fedlr.runs.verdict import binomial_interval
from fedlr.simulations.harness import check_harness, harness_scores
from fedlr.simulations.public_rows import HELD_OUT, NOT_COVERED, check_not_trained_on, files_sha256, public_rows
from fedlr.tasks.chat import with_template
from fedlr.tasks.evaluation import Evaluation
from fedlr.tasks.greedy import answer_scores, greedy_answers, prompts_of, rouge_scorer
from fedlr.tasks.multiple_choice import ChoiceScores, choose
from fedlr.tasks.task import Task
from fedlr.training.threads import torch_threads

CAUSAL_LM = "CAUSAL_LM"


@dataclass(frozen=True)
class Asked:
    """What to score a run on, and by what."""

    on: str | None = None  # a table, or `public_rows.HELD_OUT`
    changes: Mapping[str, Any] = field(default_factory=dict)  # of how the table is read
    questions: Mapping[ChoiceFormat, str] = field(default_factory=dict)  # files of multiple choice
    generate: int | None = None  # tokens of an answer, at most; None: none is generated
    show: int = 0  # answers to keep, as text
    harness: tuple[str, ...] = ()  # names of tasks
    harness_tasks: str | None = None  # a folder with more of them


@dataclass(frozen=True)
class Opened:
    """A finished run whose adapter lies on its base model."""

    experiment: Experiment
    seed: int
    label_names: list[str]
    task: Task
    base: BaseModel
    model: nn.Module  # as it computes
    adapter_sha256: str

    @property
    def arms(self) -> tuple[str, ...]:
        """Return what is scored: of a classifier the base alone has no head of these classes."""
        return ("base", "released") if self.base.task_type == CAUSAL_LM else ("released",)

    def as_arm(self, arm: str) -> Any:
        """Return a context in which the model is that of an arm."""
        return self.model.disable_adapter() if arm == "base" else nullcontext()  # type: ignore[operator]


def evaluate_run(
    run_dir: Path, asked: Asked, *, own_parts: Sequence[str] = (), say: Callable[[str], None]
) -> tuple[list[EvaluationEntry], str]:
    """Score a run's released adapter, and return the scores and its SHA-256; nothing is written.

    Raises:
        InputError: the run is not finished or was changed, a table cannot be used, or holds rows of clients.
    """
    experiment = on_this_machine(recorded_experiment(run_dir, own_parts=own_parts), say=say)
    check_asked(asked, experiment)
    summary = read_json(run_dir / SUMMARY)
    for path in asked.questions.values():
        check_not_trained_on(experiment, path)
    if chose_by(experiment, asked.on):
        say(f"note: the run chose its model, or when to stop, by {asked.on}: these scores flatter it")
    questions = {name: load_questions(Path(path), format=name) for name, path in asked.questions.items()}
    with torch_threads(experiment.runtime.num_workers):
        run = open_run(run_dir, experiment, summary)
        if personal := build_method(experiment).personal:
            say(f"note: each client kept its own {', '.join(personal)}: scored is what all share, with the start's")
        found = [] if asked.on is None else of_rows(run, asked, say=say)
        for name, path in asked.questions.items():
            say(f"choosing among the answers to {len(questions[name])} questions of {path}")
            told = {arm: of_questions(run, arm, questions[name]) for arm in run.arms}
            size, sha256 = len(questions[name]), files_sha256(path)
            found.append(EvaluationEntry(name, path, sha256, size, told["released"], told.get("base")))
        if asked.harness:
            found += of_harness(run, asked)
    return found, run.adapter_sha256


def chose_by(experiment: Experiment, table: str | None) -> bool:
    """Return whether a run chose what it released by the rows of a table, so that their score is no fair figure."""
    validation = experiment.data.validation_path
    chooses = experiment.release == BEST or experiment.patience is not None
    if table in (None, HELD_OUT) or validation is None or not chooses:
        return False
    if table == validation:
        return True
    try:
        chosen = files_sha256(validation)
    except InputError:  # it has gone
        return False
    return chosen is not None and chosen == files_sha256(str(table))


def on_this_machine(experiment: Experiment, *, say: Callable[[str], None]) -> Experiment:
    """Return the experiment with a processor and a library that are here: what trained on a GPU, or by oneDNN, can be
    scored without.
    """
    runtime, other = experiment.runtime, dict[str, str]()
    if runtime.device.startswith("cuda") and not torch.cuda.is_available():
        say(f"note: the run computed on {runtime.device}, which is not here: scored on the cpu, it rounds otherwise")
        other["device"] = "cpu"
    if runtime.matmul == "onednn" and not has_onednn():
        say("note: the run multiplied by oneDNN, which this PyTorch lacks: scored without, it rounds otherwise")
        other["matmul"] = "auto"
    return experiment.model_copy(update={"runtime": runtime.model_copy(update=other)}) if other else experiment


def check_asked(asked: Asked, experiment: Experiment) -> None:
    """Refuse what is asked of a task that has no such scores, before anything is loaded.

    Raises:
        InputError: which names the option.
    """
    if not (asked.on or asked.questions or asked.harness):
        raise InputError(
            "Expected --on TABLE (or held-out), --hellaswag FILE, --mmlu FILE or --harness TASKS, got none"
        )
    is_causal = experiment.task.target == "causal_lm"
    of_language: dict[str, object] = {
        "--generate": asked.generate,
        "--harness": asked.harness,
        "--show": asked.show,
    }
    of_language |= {f"--{name}": path for name, path in asked.questions.items()}
    if not is_causal and (one := next((name for name, value in of_language.items() if value), None)):
        raise InputError(f"Expected {one} of a language model, got a run of task={experiment.task.target}")
    if asked.generate and not asked.on:
        raise InputError("Expected --on TABLE (or held-out) with --generate, whose prompts are asked, got none")
    if asked.show and not asked.generate:
        raise InputError("Expected --generate TOKENS with --show, whose answers are kept, got none")
    if asked.show and asked.on == HELD_OUT and not experiment.data.public:
        raise InputError(
            "Expected data.public=true of a run whose held-out rows are shown, got false: --show writes rows as text; "
            "name a table of your own with --on"
        )
    if asked.changes and not asked.on:
        raise InputError(f"Expected --on TABLE with data.{next(iter(asked.changes))}, got none")
    if asked.generate:
        rouge_scorer()
    if asked.harness:
        check_harness()


def open_run(run_dir: Path, experiment: Experiment, summary: Mapping[str, Any]) -> Opened:
    """Return a finished run with its base model and its released adapter.

    Raises:
        InputError: it is not finished, an older version wrote it, or base model or adapter are others.
    """
    if summary.get(FINISHED) is not True:
        raise InputError(f"Expected a finished run, got {run_dir}; `fedlr resume {run_dir}` finishes it")
    files, seed, names = summary.get("adapter_files"), summary.get("seed"), summary.get("label_names")
    if not isinstance(files, dict) or not isinstance(names, list) or type(seed) is not int:
        raise InputError(
            f"Expected adapter_files, seed and label_names in {run_dir / SUMMARY}, got none: an older version wrote "
            "it, and nothing says what its adapter was; run it again"
        )
    label_names = [str(name) for name in names]
    task = build_task(experiment, label_names)
    outputs = task.declared_outputs(experiment.data.section(), label_names)
    base: BaseModel = build(experiment.model.section(), "model", label_names=outputs, seed=seed)
    if base.fingerprint != summary.get("base_sha256"):
        raise InputError(
            f"Expected the base model of the run (SHA-256 {summary.get('base_sha256')!s:.16}), got another from "
            f"{base.source} ({base.fingerprint:.16}...)"
        )
    model: AdaptedModel = open_released(base, run_dir / "adapter", files=files)
    runtime = experiment.runtime.model_copy(update={"cache_prefix": False})
    _, working = whole_and_working(runtime, model)
    return Opened(experiment, seed, label_names, task, base, working.eval(), str(summary.get("adapter_sha256")))


def of_rows(run: Opened, asked: Asked, *, say: Callable[[str], None]) -> list[EvaluationEntry]:
    """Score the rows of a table, by the run's task and by what the model answers."""
    assert asked.on is not None
    rows = public_rows(run.experiment, asked.on, changes=asked.changes, label_names=run.label_names, seed=run.seed)
    say(f"{len(rows.table):,} of {rows.name}: {NOT_COVERED}")
    max_length = run.experiment.data.max_length
    with naming("data", "max_length"):
        run.task.check(run.base, rows.table, max_length=max_length)
        examples = run.task.encode(run.base, rows.table, max_length=max_length)
    told = {}
    for arm in run.arms:
        with run.as_arm(arm):
            told[arm] = measures_of(evaluate(run.model, examples, task=run.task), run.experiment.task.target)
    about = (rows.name, rows.sha256, len(rows.table))
    found = [EvaluationEntry("rows", *about, told["released"], told.get("base"))]
    if asked.generate is not None:
        assert isinstance(rows.table, Conversations)
        say(f"answering {len(rows.table):,} prompts, {len(run.arms)} times, with at most {asked.generate} tokens each")
        told, samples = of_answers(run, rows.table, asked)
        found.append(EvaluationEntry("answers", *about, told["released"], told.get("base"), samples))
    return found


def measures_of(found: Evaluation, task: str) -> dict[str, float]:
    """Return the numbers of an evaluation by the names that a reader knows."""
    first = {"causal_lm": "next tokens right", "text_regression": None, "text_multilabel": None}.get(task, "accuracy")
    told = {} if first is None else {first: found.accuracy}
    if found.scores is not None:
        scores = {name: value for name, value in asdict(found.scores).items() if name != "confusion"}
        told |= {name: value for name, value in scores.items() if value is not None}
    return {**told, "loss": found.loss, **found.measures}


def of_answers(
    run: Opened, data: Conversations, asked: Asked
) -> tuple[dict[str, dict[str, float]], tuple[Sample, ...]]:
    """Let the model answer each prompt greedily; return how close that is, and the first answers."""
    assert asked.generate is not None
    template = run.experiment.task.section().get("template")
    tokenizer = with_template(run.base.tokenizer, template)
    prompts = prompts_of(data, tokenizer, max_length=run.experiment.data.max_length)
    told, answers = {}, {}
    for arm in run.arms:
        with run.as_arm(arm):
            answers[arm], ended = greedy_answers(run.model, prompts, tokenizer, max_new_tokens=asked.generate)
        told[arm] = asdict(answer_scores(answers[arm], [prompt.wanted for prompt in prompts], ended))
    shown = range(min(asked.show, len(prompts)))
    samples = [Sample(prompts[n].text, prompts[n].wanted, answers["base"][n], answers["released"][n]) for n in shown]
    return told, tuple(samples)


def of_questions(run: Opened, arm: str, questions: Sequence[Any]) -> dict[str, float]:
    """Let the model choose; return both accuracies with the 95 % interval of the first, and chance."""
    longest = max(run.experiment.data.max_length, getattr(run.base.network.config, "max_position_embeddings", 0))
    with run.as_arm(arm):
        found: ChoiceScores = choose(run.model, questions, run.base.tokenizer, max_length=longest)
    low, high = binomial_interval(found.num_right, found.num_questions)
    return {
        "accuracy": found.num_right / found.num_questions,
        "accuracy, from": low,
        "accuracy, to": high,
        "accuracy by length": found.num_right_by_length / found.num_questions,
        "chance": found.chance,
    }


def of_harness(run: Opened, asked: Asked) -> list[EvaluationEntry]:
    """Score the model on tasks of EleutherAI's harness."""
    told: dict[str, dict[str, Mapping[str, float]]] = {}
    sizes: dict[str, int] = {}
    for arm in run.arms:
        with run.as_arm(arm):
            scores = harness_scores(run.model, run.base.tokenizer, asked.harness, folder=asked.harness_tasks)
        for name, (num_rows, measures) in scores.items():
            told.setdefault(name, {})[arm] = measures
            sizes[name] = num_rows
    return [
        EvaluationEntry(f"harness {name}", name, None, sizes[name], one["released"], one.get("base"))
        for name, one in told.items()
    ]
