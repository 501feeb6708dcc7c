"""`fedlr server terms`: what an experiment asks of devices, as a file that `fedlr client doctor --terms FILE` reads."""

from pathlib import Path
from secrets import randbits

from fedlr.config.schema import Experiment
from fedlr.errors import InputError
from fedlr.files import write_whole
from fedlr.runs.commands import command, option, ready
from fedlr.runs.directory import new_identity, read_identity


@command
def terms(arguments: list[str]) -> None:
    """Write what an experiment asks of devices: fedlr server terms --out FILE [--run-dir DIR] experiment=NAME ...

    Send FILE to whoever runs a device, before the run: `fedlr client doctor client.yaml --terms FILE` says whether that
    device accepts it, has the same base model, and for how many rounds its budget pays. The words are those of
    `fedlr server run`. With --run-dir the terms are those of the run in DIR; without, and with seed=null, the run draws
    a seed of its own, which changes nothing that a device's owner decides. Nothing in FILE is secret.
    """
    out = option(arguments, "--out", "a file name")
    if out is None:
        raise InputError("Expected --out FILE, got none; --help shows the options")
    run_dir = option(arguments, "--run-dir", "a directory")
    chosen = [] if any(word.startswith("runtime=") for word in arguments) else ["runtime=superlink"]
    found = write_terms(ready([*chosen, *arguments]), Path(out), run_dir=None if run_dir is None else Path(run_dir))
    print(f"{out}: {found}; fedlr client doctor client.yaml --terms FILE reads it on a device")


def write_terms(experiment: Experiment, out: Path, *, run_dir: Path | None) -> str:
    """Write the terms to a file that is not there yet; return what they are of, in words.

    Raises:
        InputError: the experiment cannot run, the directory holds another one, or the file cannot be written.
    """
    from fedlr.server.federation import assemble  # heavy: torch and all that
    from fedlr.server.going_on import check_same

    if out.exists():
        raise InputError(f"Expected --out to be a new file, got {out}, which exists; remove it, or name another")
    identity = new_identity(randbits(32) if experiment.seed is None else experiment.seed)
    if run_dir is not None:
        if (found := read_identity(run_dir)) is None:
            raise InputError(f"Expected --run-dir to be the directory of a server's run, got {run_dir}")
        check_same(experiment, run_dir)
        identity = found
    # How the server computes is no part of the terms: its own texts need not pass the frozen layers.
    quick = experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"cache_prefix": False})})
    terms = assemble(quick, seed=identity["seed"], experiment_id=identity["experiment_id"]).terms
    write_whole(out, terms.text() + "\n")
    m = terms.mechanism
    noise = "no privacy" if m is None else f"noise multiplier {m.noise_multiplier:g}, sample rate {m.sample_rate:g}"
    of_rows = f"labels {', '.join(terms.label_names)}" if terms.label_names else f"rows of {terms.max_length} tokens"
    return (
        f"the terms of {terms.name}, task {terms.task_name}, {terms.num_rounds} rounds of {terms.trainer.num_steps} "
        f"steps, {noise}, {of_rows}, base model {terms.model_sha256[:12]}"
    )
