"""What `fedlr server terms` writes, a device's doctor reads: accepted, or refused as the run would be.

Mutants these tests reject: terms of another seed or run than the directory's; a doctor that takes another base model
for the server's; a file that is overwritten, or left half written.
"""

from pathlib import Path

import pytest

from fedlr.client.doctor import doctor, read_terms
from fedlr.server.cli import server
from fedlr.server.run import Run
from tests.client.device_files import LABELS, client_yaml, device_settings
from tests.server.whole_federation import SMALL, experiment

MODEL = ("model.hidden_size=16", "model.num_layers=1")  # of `device_files`
WORDS = (*SMALL, *MODEL, "deployment.rehearsal=true")  # its seed is the model's too
SEEDED = {"privacy__randomness": "seeded", "policy__allow_seeded_randomness": True}


def written(out: Path, *more: str) -> int:
    return server(["terms", "--out", str(out), *WORDS, *more])


def examined(settings: Path, terms: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    doctor([str(settings), "--terms", str(terms), "--no-join"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[1] == "terms"]
    return line


def test_a_device_accepts_the_file_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "terms.json", tmp_path / "device"
    assert written(out) == 0 and "the terms of tiny" in capsys.readouterr().out
    assert read_terms(out).label_names == list(LABELS)
    device_settings(folder, **SEEDED)
    settings = folder / "client.yaml"
    assert examined(settings, out, capsys).startswith("ok ")
    client_yaml(folder, policy__max_rounds=1, **SEEDED)
    assert "policy.max_rounds" in examined(settings, out, capsys)
    client_yaml(folder, **SEEDED)
    assert written(tmp_path / "other.json", "model.hidden_size=24") == 0
    assert "Expected the base model" in examined(settings, tmp_path / "other.json", capsys)


def test_the_terms_of_a_run_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released = ("privacy.randomness=os", "seed=null")
    run = Run(experiment(*MODEL, *released), tmp_path / "run", say=print)
    out = tmp_path / "terms.json"
    assert written(out, "--run-dir", str(tmp_path / "run"), *released) == 0
    assert read_terms(out) == run.served.terms
    capsys.readouterr()
    for wrong, message in {
        ("num_rounds=3",): "which exists",
        ("--run-dir", str(tmp_path)): "directory of a server's run",
        ("--run-dir", str(tmp_path / "run"), *released, "num_rounds=9"): "another num_rounds",
        ("--run-dir",): "after --run-dir",
        ("data.labels=[a]",): "labels",
    }.items():
        name = out if "exists" in message else tmp_path / "new.json"
        assert written(name, *wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "new.json").exists()
    assert server(["terms", *WORDS]) == 2 and "--out FILE" in capsys.readouterr().err
    assert written(tmp_path / "no/such/terms.json") == 2
    assert "No such file" in capsys.readouterr().err
