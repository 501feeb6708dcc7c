"""Whatever a person types: one line that names the value and what is allowed, exit code 2, and nothing written.

Mutants this file kills: unknown keys let through (Pydantic's extra="ignore", Hydra's struct flag off), lax types
(strict=False), a run directory made before the checks, the offline switch set after the hub libraries read it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from fedlr.simulations import cli

ROOT = Path(__file__).parents[1]

# Words after `experiment=tiny` (words that name another experiment stand alone), and what the message must say.
MISSPELT = {
    "nuum_rounds=3": ["'nuum_rounds'", "did you mean num_rounds?"],
    "epsilon=3": ["'epsilon'", "did you mean privacy.epsilon?"],
    "methd=fedsvd": ["'methd'", "did you mean method?"],
    "privacy.epsilonn=3": ["'privacy.epsilonn'", "did you mean privacy.epsilon?"],
    "model.hiden_size=3": ["'model.hiden_size'", "did you mean model.hidden_size?"],
    "partition.alfa=3": ["'partition.alfa'", "did you mean partition.alpha?"],
    "data.num_exampels=9": ["'data.num_exampels'", "did you mean data.num_examples?"],
    "data.path=x.csv": ["'data.path'", "data.num_examples"],
    "trainer.optimizer.lrr=3": ["'trainer.optimizer.lrr'", "did you mean trainer.optimizer.lr?"],
    "trainer.optimiser.lr=3": ["'trainer.optimiser'", "did you mean trainer.optimizer?"],
    "method=lora_fair method.aggregate.penaltyy=1": ["'method.aggregate.penaltyy'", "method.aggregate.penalty?"],
    "method.aggregate.paths=x": ["method.aggregate._target_", "a part's name", "null"],
    "+new.key=1": ["known key, got 'new'", "num_rounds"],
    "++model.depth=1": ["'model.depth'", "model.num_layers"],
    "hydra.run.dir=x": ["'hydra.run.dir'"],
    "method@other=fedsvd": ["'method@other'", "method"],
    "~method": ["a value for method, got none"],
    "~privacy.epsilon": ["a value for privacy.epsilon, got none"],
    "~nothing": ["'nothing' does not exist"],
    "method=fedsdv": ["lora_fair_ridge", "got 'fedsdv'; did you mean fedsvd?"],
    "method=fed/svd": ["method to be one of", "got 'fed/svd'"],
    "model=3": ["model to be one of", "tiny", "got '3'"],
    "privacy=": ["privacy to be one of client, dp, none, got ''"],
    "experiment=tyni": ["got 'tyni'; did you mean tiny?"],
    "-m experiment=tiny method=fedsvd,fedsdv": ["got 'fedsdv'"],
}
TYPES = {
    "num_rounds=three": ["num_rounds", "integer", '"three"'],
    "num_rounds=2.5": ["num_rounds", "integer", "2.5"],
    "num_rounds=[1,2]": ["num_rounds", "integer", "[1, 2]"],
    "num_rounds=true": ["num_rounds", "integer", "true"],
    "num_rounds=null": ["num_rounds", "integer", "null"],
    "num_rounds=": ["num_rounds", "integer", '""'],
    "privacy.epsilon=high": ["privacy.epsilon", "number", '"high"'],
    "privacy.epsilon=true": ["privacy.epsilon", "number", "true"],
    "adapter.train_head=1": ["adapter.train_head", "boolean", "got 1"],
    "adapter.target_modules=3": ["adapter.target_modules", "string or a list", "got 3"],
    "adapter.layers=0": ["adapter.layers", "list", "got 0"],
    "model.hidden_size=wide": ["model.hidden_size", "integer", '"wide"'],
    "model.hidden_size='32'": ["model.hidden_size", "integer", '"32"'],
    "partition.alpha=true": ["partition.alpha", "number", "true"],
    "partition.alpha=null": ["partition.alpha", "number", "null"],
    "partition.alpha.x=1": ["partition.alpha", "number"],
    "trainer.optimizer=3": ["trainer.optimizer", "section", "got 3"],
    "trainer.optimizer.lr=fast": ["trainer.optimizer.lr", "number", '"fast"'],
    "model._target_=3": ["model._target_", "string", "got 3"],
    "tracking.output_dir=null": ["tracking.output_dir", "string", "null"],
    "name=${seed}": ["name", "string", "got 0"],
    "name=${oops}": ["'oops' not found", "name"],
}
RANGES = {
    "num_clients=0": ["num_clients", "1", "got 0"],
    "num_clients=1000": ["1000 clients", "480"],
    "cohort_size=7": ["cohort_size <= num_clients=6, got 7"],
    "seed=-1": ["seed", "0, got -1"],
    "seed=4294967296": ["seed", "less than 4294967296"],
    "name=a/b": ["name", "letters", '"a/b"'],
    "name=..": ["name", '".."'],
    "weighting=size": ["weighting", "'uniform' or 'examples'", '"size"'],
    "weighting=examples data.public=false": ["weighting=uniform", "data.public=true"],
    "data.num_test=700": ["data.num_test in [1, 598]", "got 700"],
    "data.num_examples=1": ["data.num_examples", "got 1"],
    "data.num_labels=9": ["data.num_labels in [2, 8], got 9"],
    "data.max_length=2": ["data.max_length in [3, 64]", "got 2"],
    "data.max_length=500": ["data.max_length <= model.max_length=64", "got 500"],
    "data.labels=A,B": ["data.labels=A,B", "data.labels=[A,B]"],
    "partition.alpha=0": ["partition.alpha", "got 0"],
    "partition.alpha=inf": ["partition.alpha", "finite", "got inf"],
    "partition=by_group": ["set num_clients=4"],
    "partition=dirichlet_by_label partition.min_examples=400": ["partition.min_examples in [0, 80]", "got 400"],
    "model.hidden_size=33": ["model.hidden_size", "multiple of model.num_heads=2", "got 33"],
    "model.max_length=0": ["model.max_length", "got 0"],
    "runtime.num_workers=0": ["runtime.num_workers", "got 0"],
    "trainer.token_budget=0": ["trainer.token_budget", "got 0"],
    "trainer.num_steps=0": ["trainer.num_steps", "got 0"],
    "trainer.divisor=0": ["trainer.divisor", "between 1e-09 and 1e+09 or 'auto', got 0"],
    "trainer.sample_rate=0": ["trainer.sample_rate", "greater than 0, got 0"],
    "trainer.sample_rate=1.5": ["trainer.sample_rate", "equal to 1, got 1.5"],
    "trainer.sample_rate=nan": ["trainer.sample_rate", "NaN"],
    "trainer.grad_sample_mode=fast": ["trainer.grad_sample_mode", "'hooks', 'ghost' or 'loop'", '"fast"'],
}
PRIVACY = {
    "privacy.epsilon=0": ["privacy.epsilon", "between 0.0001 and 1e+06, got 0"],
    "privacy.epsilon=-1": ["privacy.epsilon", "between 0.0001 and 1e+06, got -1"],
    "privacy.epsilon=nan": ["privacy.epsilon", "finite", "NaN"],
    "privacy.epsilon=inf": ["privacy.epsilon", "finite", "Infinity"],
    "privacy.delta=0": ["privacy.delta", "greater than 0, got 0"],
    "privacy.delta=1": ["privacy.delta", "less than 1, got 1"],
    "privacy.delta=2": ["privacy.delta", "less than 1, got 2"],
    "privacy.delta=0.02": ["privacy.delta below 1/", "got 0.02"],
    "privacy.noise_multiplier=0": ["privacy.noise_multiplier", "greater than 0, got 0"],
    "privacy.noise_multiplier=1e-160": ["privacy.noise_multiplier", "1e-30", "1e-160"],
    "privacy.noise_multiplier=1e-16": ["privacy.noise_multiplier", "[0.001, 1e+06]", "1e-16"],
    "privacy=dp privacy.epsilon=null": ["privacy=dp", "privacy.epsilon=None"],
    "privacy.noise_multiplier=0.1": ["privacy.noise_multiplier", "epsilon 6", "got 0.1"],
    "privacy.max_grad_norm=0": ["privacy.max_grad_norm", "equal to 0.000001, got 0"],
    "privacy.max_grad_norm=-1": ["privacy.max_grad_norm", "equal to 0.000001, got -1"],
    "privacy.max_grad_norm=1e-45": ["privacy.max_grad_norm", "1e-30", "got 1e-45"],
    "privacy.max_grad_norm=1e-10": ["privacy.max_grad_norm", "0.000001", "got 1e-10"],
    "privacy.max_grad_norm=1e30": ["privacy.max_grad_norm", "1000000", "got 1e+30"],
    "privacy.noise_multiplier=1e12": ["privacy.noise_multiplier", "1000000000", "got 1000000000000.0"],
    "privacy.noise_multiplier=1e7": ["privacy.noise_multiplier", "1e+06", "got 10000000.0"],
    "trainer.divisor=1e-300": ["divisor", "1e-30", "got 1e-300"],
    "trainer.divisor=1e-8": ["divisor", "1e-06", "got 1e-08"],
    "privacy.accountant=pld privacy.delta=1e-14": ["privacy.delta", "1e-10", "got 1e-14", "privacy.accountant=rdp"],
    "privacy.max_participations=4": ["privacy.max_participations <= num_rounds=3, got 4"],
    "privacy.max_participations=1": ["privacy.max_participations >= 2", "got 1"],
    "privacy.accountant=prv": ["privacy.accountant", "'pld' or 'rdp'", '"prv"'],
    "privacy.randomness=oss": ["privacy.randomness", "'seeded' or 'os'", '"oss"'],
    "privacy.randomness=os seed=null tracking.run_alone=false runtime.base_dtype=bfloat16": [
        "runtime.base_dtype=float32",
        "privacy.randomness=os",
        "got bfloat16",
    ],
    "privacy.randomness=os": ["seed=null", "privacy.randomness=os", "seed=0"],
    "privacy=none privacy.epsilon=3": ["privacy=none", "privacy.epsilon=3"],
    "privacy=none privacy.noise_multiplier=2": ["privacy.noise_multiplier=2", "privacy.epsilon"],
}
ADAPTER = {
    "adapter.rank=0": ["adapter.rank", "got 0"],
    "adapter.rank=64": ["adapter.rank <= 32", "got 64"],
    "adapter.rank=2000000000": ["adapter.rank <= 32", "got 2000000000"],
    "adapter.lora_alpha=0": ["adapter.lora_alpha", "got 0"],
    "adapter.target_modules=[qurey]": ["adapter.target_modules", "query", "'qurey'"],
    "adapter.target_modules=[query,qurey]": ["adapter.target_modules", "'qurey'"],
    "adapter.target_modules=[]": ["adapter.target_modules", "[query, value]", "got []"],
    "adapter.target_modules='(query'": ["adapter.target_modules", "regular expression", "(query"],
    "adapter.target_modules=nothing": ["adapter.target_modules", "query", "'nothing'"],
    "adapter.target_modules=query adapter.layers=[1]": ["adapter.layers", "list names"],
    "adapter.layers=[0,5]": ["adapter.layers in 0 to 1, got 5"],
    "adapter.layers=[-1]": ["adapter.layers", "got -1"],
    "adapter.layers=[]": ["adapter.layers", "null for all", "got []"],
    "adapter.init_lora_weights=eva": ["adapter.public={path: FILE}", "adapter.init_lora_weights=eva", "got null"],
    "adapter.init_lora_weights=eva privacy=none": ["adapter.public={path: FILE}", "reads public texts"],
    "adapter.init_lora_weights=xavier": ["true, false, gaussian or orthogonal", '"xavier"'],
    "adapter.init_lora_weights=pissa runtime.base_dtype=bfloat16": ["runtime.base_dtype=float32", "pissa", "bfloat16"],
    "adapter.init_lora_weights=pissa_niter_4": ["pissa is the whole decomposition", '"pissa_niter_4"'],
    "adapter.init_lora_weights=olora adapter.public.path=x.csv": ["adapter.public=null", "olora", "x.csv"],
    "adapter.init_lora_weights=loftq": ["changes the base model's own weights", '"loftq"'],
    "adapter.init_lora_weights=1": ["adapter.init_lora_weights", "got 1"],
    "adapter.init_lora_weights=orthogonal adapter.rank=3": ["adapter.init_lora_weights", "adapter.rank=3 is odd"],
    "runtime.cache_prefix=true": ["runtime.cache_prefix", "adapter.layers"],
}
CHOICES = {
    "method=fedsvd method.personal=[lora_B]": ["method.personal", "not all", "lora_B"],
    "method=fedit method.personal=lora_A": ["method.personal"],
    "method=fedit +method.client._target_=always +method.client.roles=[lora_B]": [
        "method.client",
        "always",
    ],
    "method=fedprox method.client.mu=-1": ["method.client.mu", "got -1"],
    "method=rolora method.block_schedule.roles=[lora_B]": ["two different roles", "lora_B"],
    "method=renewal method.finalise.period=0": ["method.finalise.period", "got 0"],
    "method=rank_budget method.finalise.min_rank=0": ["method.finalise.min_rank", "got 0"],
    "method=rank_growth method.finalise.start_share=2": ["method.finalise.start_share", "got 2"],
    "method=rank_energy method.finalise.keep=0": ["method.finalise.keep", "got 0"],
    "method=drop_lora method.finalise.share=1.5": ["method.finalise.share", "got 1.5"],
    "method=selective_layers method.block_schedule.explore_every=0": ["method.block_schedule.explore_every", "got 0"],
    "method=fedavgm method.aggregate.momentum=1": ["method.aggregate.momentum", "got 1"],
    "method=la_lora trainer=adamw": ["SGD without momentum", "AdamW"],
    "method=la_lora trainer.num_steps=1": ["trainer.num_steps >= 2", "la_lora"],
    "method=scaffold trainer=adamw": ["SGD", "AdamW"],
    "method=flora runtime.base_dtype=bfloat16": ["runtime.base_dtype=float32", "flora"],
    "method=fedsa_lora runtime.num_processes=2": ["runtime.num_processes=1", "fedsa_lora"],
    "adapter.client_ranks=[2] method=fedsvd": ["adapter.client_ranks", "flexlora", "fedsvd"],
    "adapter.client_ranks=[9] method=flexlora": ["adapter.client_ranks", "adapter.rank=4", "[9]"],
    "adapter.client_ranks=[] method=flexlora": ["adapter.client_ranks", "[]"],
    "adapter.client_ranks=[2] method=flexlora trainer.engine=opacus": ["trainer.engine=fused", "adapter.client_ranks"],
    "adapter.client_memory_mb=[0] method=flexlora": ["adapter.client_memory_mb", "0"],
    "adapter.client_memory_mb=[] method=flexlora": ["adapter.client_memory_mb", "[]"],
    "method=hetlora trainer.engine=opacus": ["trainer.engine=fused", "hetlora"],
    "trainer.after_noise._target_=fedlr.methods.client_rules.nope": [
        "trainer.after_noise",
        "fedlr.methods.client_rules.nope",
    ],
    "trainer.after_noise._target_=torch.optim.SGD": ["trainer.after_noise"],
}
TARGETS = {
    "trainer.optimizer._target_=torch.optim.AdamX": ["trainer.optimizer._target_", "did you mean torch.optim.Adam"],
    "trainer.optimizer._target_=os.getcwd": ["trainer.optimizer._target_", "torch optimizer", "'os.getcwd'"],
    "trainer.optimizer.lr=-1": ["trainer.optimizer", "SGD", "Invalid learning rate: -1"],
    "trainer.optimizer.lr=inf": ["trainer.optimizer.lr", "finite", "got inf"],
    "method._target_=metod": ["method._target_", "did you mean method?"],
    "method.name=[x]": ["method.name", '["x"]'],
    "method._target_=collections.OrderedDict": ["method"],
    "method.aggregate._target_=fedlr.nope.x": ["method.aggregate._target_", "'fedlr.nope.x'"],
    "method.aggregate=weighted": ["method.aggregate", "did you mean weighted_mean?"],
    "method.aggregate=fair": ["method.aggregate", "a part", "'fair'", "lora_fair"],
    "method.aggregate=7": ["method.aggregate", "section", "got 7"],
    "method.aggregate={_target_: weighted_mean, x: 1}": ["method.aggregate", "x"],
    "method.aggregate=torch.stack": ["method.aggregate", "'torch.stack'"],
    "method.finalise=null": ["method.finalise", "section", "null"],
    "~method.finalise": ["a value for method.finalise, got none"],
    "method.block_schedule.roles=[lora_C]": ["method.block_schedule.roles", "lora_A, lora_B, head", "lora_C"],
    "method=lora_fair method.aggregate.penalty=-1": ["method.aggregate.penalty", "at least 0, got -1"],
    "model._target_=fedlr.models.network.tinny": ["model._target_", "'fedlr.models.network.tinny'"],
    "model._target_=math.pi": ["model._target_", "function or a class", "math.pi"],
}
PLACES = {
    "data=table": ["a value for data.path, got none"],
    "data=table data.path=nope.csv": ["no file 'nope.csv'"],
    "data=table data.path=.": ["'.' is a folder"],
    "data=table data.path=nobody/reviews": ["'nobody/reviews'", "offline", "runtime.offline=false"],
    "data=table data.path=3": ["data.path", "string", "got 3"],
    "model=pretrained": ["a value for model.name_or_path, got none"],
    "model=pretrained model.name_or_path=./nothere": ["model.name_or_path", "existing folder", "'./nothere'"],
    "model=pretrained model.name_or_path=pkg:no_such_model/x": ["model.name_or_path", "pip install", "no-such-model"],
    "model=pretrained model.name_or_path=pkg:torch/nomodel": ["model.name_or_path", "'nomodel'", "torch"],
    "model=pretrained model.name_or_path=nobody/encoder": ["'nobody/encoder'", "runtime.offline=false"],
    "model=pretrained model.name_or_path=.": ["model.name_or_path", "no config.json"],
    f"tracking.output_dir={ROOT / 'README.md'}": ["tracking.output_dir", "README.md is a file"],
    "tracking.output_dir=/proc/nowhere": ["tracking.output_dir", "'/proc/nowhere'"],
    "tracking.output_dir=": ["tracking.output_dir", "not empty"],
}
SYNTAX = {
    "foo": ["KEY=VALUE, got 'foo'"],
    "=3": ["KEY=VALUE, got '=3'", "no key"],
    "a==b": ["KEY=VALUE, got 'a==b'"],
    "adapter.target_modules=[query": ["KEY=VALUE, got 'adapter.target_modules=[query'"],
    "--num_rounds=3": ["-m or --multirun, got '--num_rounds=3'"],
    "-x": ["-m or --multirun, got '-x'"],
    "method=fedsvd,fedit": ["-m", "method=fedsvd,fedit without it"],
    "-m seed=1,2 seed=3": ["once, got seed again"],
    "-m seed=1,x": ["seed", "integer", '"x"'],
}
CASES = {**MISSPELT, **TYPES, **RANGES, **PRIVACY, **ADAPTER, **CHOICES, **TARGETS, **PLACES, **SYNTAX}


def words(typed: str) -> list[str]:
    return typed.split() if "experiment=" in typed else ["experiment=tiny", *typed.split()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # the command sets them itself: restored after the test
    return tmp_path


@pytest.mark.parametrize(("typed", "fragments"), CASES.items(), ids=CASES)
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    typed: str, fragments: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.simulate(words(typed)) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("fedlr simulate: "), told
    assert [fragment for fragment in fragments if fragment not in told.err] == [], told.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("typed", ["num_rounds=three", "model.hiden_size=3", "-x", "data=table data.path=nope.csv"])
def test_the_plan_refuses_the_same(typed: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.plan(words(typed)) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("fedlr plan: ") and told.err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_an_unknown_label_in_the_data_is_named_with_its_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "reviews.csv").write_text("text,label\nthe film is good,good\nthe film is bad,bda\n" * 20)
    assert cli.simulate(words("data=table data.path=reviews.csv data.labels=[good,bad] data.num_test=5")) == 2
    error = capsys.readouterr().err
    assert (
        "reviews.csv, row 3" in error
        and "the label is not one of 'good', 'bad'" in error
        and "bda" not in error
        and error.count("\n") == 1
    )
    assert [path.name for path in here.iterdir()] == ["reviews.csv"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "locked").mkdir(mode=0o500)
    # root may write anywhere, so the question itself is answered here
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    assert cli.simulate(words("tracking.output_dir=locked")) == 2
    assert "Expected tracking.output_dir to be writable, got 'locked'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "fragment"),
    [
        ("experiment=tiny nuum_rounds=3", "did you mean num_rounds?"),
        ("experiment=tiny trainer.optimizer._target_=torch.optim.AdamX", "did you mean torch.optim.Adam"),
        ("experiment=nope", "experiment to be one of"),
        ("experiment=tiny -x", "-m or --multirun, got '-x'"),
    ],
)
def test_the_installed_command_behaves_the_same(typed: str, fragment: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedlr", "simulate", *typed.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert fragment in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_key_is_found_before_the_heavy_libraries_load() -> None:
    code = (
        "import sys; from fedlr.simulations.cli import simulate; simulate(['experiment=tiny', 'nuum=1']); "
        "print([name for name in ('torch', 'transformers', 'peft', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_hub_libraries_that_are_loaded_already_are_told_to_stay_offline(here: Path) -> None:
    import huggingface_hub

    from fedlr.config.offline import go_offline

    try:
        go_offline(False)
        assert not huggingface_hub.is_offline_mode()
    finally:
        go_offline(True)
    assert huggingface_hub.is_offline_mode()
