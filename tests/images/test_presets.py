"""Presets of the field for pictures compose and read the layout of their data, here of made-up pictures."""

from pathlib import Path

import pytest
from PIL import Image

from fedlr.config.schema import compose_experiment
from fedlr.models.vision import tiny_vit
from fedlr.simulations.federation import assemble
from fedlr.training.threads import torch_threads

SMALL = ("data.image_size=16", "adapter.target_modules=[q_proj,v_proj]")
GROUPS = {
    "lora_fair_domainnet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "lora_fair_nico": ("autumn", "dim", "grass", "outdoor", "rock", "water"),
}


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (number * 7 % 256, number * 3 % 256, number)).save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A word that puts a small ViT in the place of the preset's."""
    folder = tmp_path_factory.mktemp("vit")
    base = tiny_vit(label_names=["a", "b"], seed=3)
    base.network.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    return f"model.name_or_path={folder}"


@pytest.mark.parametrize("name", GROUPS)
def test_domains_as_folders_are_the_clients_of_the_paper(name: str, model: str, tmp_path: Path) -> None:
    for number in range(72):
        group = GROUPS[name][number % 6]
        draw(tmp_path / "data" / group / ("bird", "cat")[number // 6 % 2] / f"{number}.png", number)
    e = compose_experiment([f"experiment={name}", *SMALL, model, f"data.path={tmp_path}/data"])
    with torch_threads(1):
        f = assemble(e, seed=0)
    assert len(f.clients) == 6 and f.label_names == ("bird", "cat") and len(f.test) > 0
    assert compose_experiment([f"experiment={name}", f"data.path={tmp_path}/data"]).adapter.rank == 16


def test_cifar_is_read_by_its_own_columns(model: str, tmp_path: Path) -> None:
    names = compose_experiment(["experiment=cifar10_private"]).data.section()["labels"]
    lines = ["img,label,part"]
    for number in range(120):
        draw(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{names[number % 10]},{'test' if number % 5 == 0 else 'train'}")
    (tmp_path / "cifar.csv").write_text("\n".join(lines))
    split = ("data.split_column=part", "data.train_split=train", "partition.alpha=100", "partition.min_examples=1")
    e = compose_experiment(["experiment=cifar10_private", *SMALL, model, f"data.path={tmp_path}/cifar.csv", *split])
    with torch_threads(1):
        f = assemble(e, seed=0)
    assert len(f.clients) == 10 and len(f.test) == 24 and f.label_names == tuple(names)
    assert e.privacy.is_private and e.method["name"] == "head"
