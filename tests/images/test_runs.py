"""Runs on pictures, from the configuration to the adapter: private or not, by every engine, for several methods."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedlr.config.schema import Experiment, compose_experiment
from fedlr.data.images import LabelledImages
from fedlr.errors import InputError
from fedlr.models.usage import code_of_card
from fedlr.models.vision import pretrained_images, tiny_vit
from fedlr.runs.tables import load_examples
from fedlr.simulations.federation import assemble
from fedlr.simulations.simulate import simulate
from fedlr.tasks.made_up_images import SHAPES, made_up_images
from fedlr.training.threads import torch_threads

SMALL = (
    "experiment=tiny_images",
    "data.num_examples=90",
    "data.num_test=24",
    "num_clients=3",
    "cohort_size=2",
    "num_rounds=2",
    "runtime.num_workers=1",
)
BY_GROUP = ("partition=by_group", "num_clients=null", "cohort_size=null", "data.num_test=0.3")


def composed(tmp_path: Path, *overrides: str) -> Experiment:
    return compose_experiment([*SMALL, f"tracking.output_dir={tmp_path}", *overrides])


def run(tmp_path: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    run_dir = simulate(composed(tmp_path, *overrides), say=lambda line: None)
    return run_dir, json.loads((run_dir / "summary.json").read_text())


def saved(tmp_path: Path, **sizes: int) -> Path:
    """Write a ViT with random weights as a model folder, with a head for other labels."""
    folder = tmp_path / "model"
    base = tiny_vit(label_names=["a", "b"], seed=3, **sizes)
    base.network.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ("privacy=none", "trainer.engine=opacus"),
        ("privacy=dp", "method=ffa_lora", "trainer.engine=opacus", "adapter.train_head=true"),
        ("privacy=dp", "method=fedit", "adapter.init_lora_weights=activations", *BY_GROUP),
        ("privacy=dp", "method=lora_fair", "adapter.layers=[1]", "runtime.cache_prefix=true"),
    ],
    ids=["no privacy", "opacus", "domains", "cached"],
)
def test_a_run_on_pictures_is_whole(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run_dir, summary = run(tmp_path, *overrides)
    told = json.loads((run_dir / "privacy.json").read_text())
    assert told["differential_privacy"] == ("dp" in overrides[0])
    assert 0 <= summary["final_accuracy"] <= 1 and (run_dir / "report.html").stat().st_size > 10_000
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    settings = json.loads((run_dir / "adapter" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 16, "width": 16} and settings["image_mean"] == [0.5] * 3


def test_both_engines_and_the_cache_release_the_same(tmp_path: Path) -> None:
    common = ("privacy=dp", "method=ffa_lora", "adapter.layers=[1]")
    hashes = [
        run(tmp_path / str(index), *common, *more)[1]["adapter_sha256"]
        for index, more in enumerate([(), ("runtime.num_workers=2",), ("runtime.cache_prefix=true",)])
    ]
    assert hashes[0] == hashes[1]
    losses = [
        run(tmp_path / f"again{i}", *common, *more)[1]["final_loss"]
        for i, more in enumerate([(), ("trainer.engine=opacus",), ("runtime.cache_prefix=true",)])
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_a_head_on_cached_features_trains_privately_on_a_model_folder(tmp_path: Path) -> None:
    features = ("model=pretrained_images", f"model.name_or_path={saved(tmp_path)}", "model.pooling=mean_normalised")
    common = ("method=head", "runtime.cache_prefix=true", "adapter.train_head=true")
    run_dir, summary = run(
        tmp_path / "out",
        *features,
        *common,
        "privacy=dp",
        *BY_GROUP,
        "tracking.client_accuracy=true",
        "tracking.run_alone=true",
    )
    assert 0 < summary["epsilon_max"] <= 6 and summary["final_loss"] != pytest.approx(np.log(3))
    told = json.loads((run_dir / "client_accuracy.json").read_text())
    assert [client["name"] for client in told["clients"]] == ["chalk", "clay", "ink", "sky"]
    alone = json.loads((run_dir / "baselines" / "alone.json").read_text())["clients"]
    assert len(alone) == 4 and all(0 <= client["own_accuracy"] <= 1 for client in alone)
    sheet = json.loads((run_dir / "contact_sheet.json").read_text())
    for shown, scored, apart in zip(sheet["clients"], told["clients"], alone, strict=True):
        pictures = shown["pictures"]
        assert len(pictures) == len(apart["named"]) == min(10, scored["num_test"])
        if scored["num_test"] <= 10:  # all are shown: the shares are those of the scores
            labels = [picture["label"] for picture in pictures]
            assert np.mean([picture["named"] for picture in pictures] == np.array(labels)) == scored["accuracy"]
            assert np.mean(np.array(apart["named"]) == labels) == apart["own_accuracy"]
    assert any(client["num_test"] <= 10 for client in told["clients"])
    assert "client 0 (chalk): " in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("pooling", ["null", "mean_normalised"])
def test_the_card_opens_the_adapter(pooling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ("model=pretrained_images", f"model.name_or_path={saved(tmp_path)}", f"model.pooling={pooling}")
    run_dir, _ = run(tmp_path / "out", *sources, "privacy=none", "adapter.train_head=true", "trainer.optimizer.lr=0.1")
    code = code_of_card((run_dir / "adapter" / "README.md").read_text())
    assert code is not None and "fedlr" not in code
    scope: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(run_dir / "adapter")
    try:
        exec(code, scope)
    finally:
        os.chdir(before)
    _, held_out = load_examples(composed(tmp_path), seed=0)
    assert isinstance(held_out, LabelledImages)
    found = scope["classify"]([Image.fromarray(held_out.pixels[row]) for row in held_out.rows])
    right = float((found.argmax(dim=1) == torch.from_numpy(held_out.labels)).float().mean())
    assert right == pytest.approx(json.loads((run_dir / "summary.json").read_text())["final_accuracy"])


def test_photographs_in_folders_train(tmp_path: Path) -> None:
    table = made_up_images(90, 0, image_size=20)
    for row, (pixels, label) in enumerate(zip(table.pixels, table.labels, strict=True)):
        folder = tmp_path / "photos" / SHAPES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{row}.jpg")
    data = ("data=images", f"data.path={tmp_path}/photos", "data.image_size=16", "data.labels=[bar,cross,disc]")
    small = [word for word in SMALL if not word.startswith("data.")]
    e = compose_experiment([*small, *data, "privacy=dp", f"tracking.output_dir={tmp_path}/out"])
    with torch_threads(1):
        f = assemble(e, seed=0)
    assert f.label_names == ("bar", "cross", "disc") and sum(map(len, f.clients)) + len(f.test) == 90
    with pytest.raises(InputError, match=r"got null: the names that are found tell what the data hold"):
        assemble(compose_experiment([*small, *data, "data.labels=null", "privacy=dp"]), seed=0)
    with pytest.raises(InputError, match=r"set data\.image_size=16"):
        assemble(compose_experiment([*small, *data, "data.image_size=20"]), seed=0)


def test_a_column_splits_a_table_into_training_and_test(tmp_path: Path) -> None:
    table = made_up_images(60, 0)
    lines = ["image,label,domain,split"]
    for row, pixels in enumerate(table.pixels):
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        part = "test" if row % 3 == 0 else "train"
        lines.append(f"{row}.png,{SHAPES[table.labels[row]]},{table.groups[row] if table.groups else ''},{part}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    data = ("data=images", f"data.path={tmp_path}/t.csv", "data.image_size=16", "data.labels=[bar,cross,disc]")
    split = ("data.split_column=split", "data.train_split=train", "data.test_split=test", "data.num_test=null")
    small = [word for word in SMALL if not word.startswith("data.")]
    f = assemble(compose_experiment([*small, *data, *split]), seed=0)
    assert (sum(map(len, f.clients)), len(f.test)) == (40, 20)
    with pytest.raises(InputError, match=r"another split than data\.train_split"):
        assemble(compose_experiment([*small, *data, *split, "data.test_split=train"]), seed=0)


def test_a_model_that_is_none_or_of_other_pixels_is_one_sentence(tmp_path: Path) -> None:
    def refused(**given: Any) -> str:
        with pytest.raises(InputError) as error:
            pretrained_images(**{"label_names": ["a", "b"], "seed": 0, **given})
        return str(error.value)

    folder = saved(tmp_path)
    assert "fetch it with: python -m x" in refused(name_or_path=f"{tmp_path}/nowhere", fetched_by="python -m x")
    assert "model.pooling to be null, or one of" in refused(name_or_path=str(folder), pooling="auto")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    assert "image_mean and image_std of 3 channels" in refused(name_or_path=str(folder))
    (folder / "preprocessor_config.json").unlink()
    assert "Expected model.name_or_path to be a model folder" in refused(name_or_path=str(folder))


def test_heads_start_from_zero_or_from_the_seed(tmp_path: Path) -> None:
    given: dict[str, Any] = {"name_or_path": str(saved(tmp_path)), "label_names": ["a", "b", "c"]}
    zero, drawn, again = (pretrained_images(**given, seed=s, head_std=h) for s, h in ((0, 0), (1, 0.1), (1, 0.1)))
    heads = [base.network.classifier.weight for base in (zero, drawn, again)]
    assert not heads[0].any() and torch.equal(heads[1], heads[2]) and heads[1].std() == pytest.approx(0.1, rel=0.3)
    assert zero.body_sha256 == drawn.body_sha256 and zero.head_is_drawn
    pixels = np.zeros((1, 16, 16, 3), dtype=np.uint8)
    assert zero.tokenizer.pixel_values(pixels).unique().tolist() == [-1.0]
