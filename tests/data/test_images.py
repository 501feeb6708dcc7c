"""Tables of pictures: what is read, in which form, and what is refused by name."""

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fedlr.data import decoding
from fedlr.data.decoding import decoded
from fedlr.data.images import LabelledImages, load_images
from fedlr.data.partition import by_file
from fedlr.errors import InputError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def plain(colour: Any = RED, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def half(left: Any, right: Any, mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def upright(content: bytes) -> np.ndarray:
    pixels, problem = decoded(content, height=8, width=8)
    assert problem == "" and pixels is not None and pixels.dtype == np.uint8
    return pixels


def animation() -> bytes:
    return saved(plain(RED), "GIF", save_all=True, append_images=[plain(GREEN)])


def cmyk() -> bytes:
    return saved(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100)


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)), "PNG")


def palette_with_hole() -> bytes:
    image = half(0, 1, mode="P")
    image.putpalette([*RED, *GREEN])
    return saved(image, "PNG", transparency=1)


@pytest.mark.parametrize(
    ("make", "left", "right"),
    [
        (lambda: saved(half(RED, GREEN)), RED, GREEN),
        (lambda: saved(half(RED, GREEN), "BMP"), RED, GREEN),
        (lambda: saved(half(RED, GREEN), "WEBP", lossless=True), RED, GREEN),
        (lambda: saved(half(RED, GREEN), "TIFF"), RED, GREEN),
        (animation, RED, RED),
        (cmyk, (254, 0, 0), (254, 0, 0)),
        (sixteen_bits, WHITE, WHITE),
        (lambda: saved(half(0, 255, mode="L")), (0, 0, 0), WHITE),
        (lambda: saved(half(0, 1, mode="1")), (0, 0, 0), WHITE),
        (lambda: saved(half((*RED, 255), (0, 0, 0, 0), mode="RGBA")), RED, WHITE),
        (lambda: saved(half((0, 255), (0, 0), mode="LA")), (0, 0, 0), WHITE),
        (palette_with_hole, RED, WHITE),
    ],
    ids=["png", "bmp", "webp", "tiff", "gif", "cmyk", "16 bits", "grey", "1 bit", "alpha", "grey alpha", "palette"],
)
def test_every_kind_of_picture_becomes_rgb_on_white(make: Callable[[], bytes], left: Any, right: Any) -> None:
    pixels = upright(make()).astype(int)
    assert np.abs(pixels[4, 1] - left).max() <= 2 and np.abs(pixels[4, 6] - right).max() <= 2


@pytest.mark.parametrize("turned", range(1, 9))
def test_pixels_stand_as_the_camera_says(turned: int) -> None:
    marked = plain(WHITE)
    marked.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = turned
    places = {1: (0, 0), 2: (0, 7), 3: (7, 7), 4: (7, 0), 5: (0, 0), 6: (0, 7), 7: (7, 7), 8: (7, 0)}
    pixels = upright(saved(marked, exif=exif))
    assert tuple(pixels[places[turned]]) == RED and (pixels[..., 1] == 0).sum() == 16


def test_another_shape_is_cut_padded_or_stretched() -> None:
    wide = Image.new("RGB", (24, 8), RED)
    wide.paste(GREEN, (8, 0, 16, 8))
    by_fit = {fit: decoded(saved(wide), height=8, width=8, fit=fit)[0] for fit in decoding.FITS}
    corners = {fit: tuple(pixels[4, 0].tolist()) for fit, pixels in by_fit.items() if pixels is not None}
    assert corners == {"crop": GREEN, "pad": RED, "stretch": RED}
    assert by_fit["pad"] is not None and tuple(by_fit["pad"][0, 0]) == WHITE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"a letter that is called picture.jpg", "its content is none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "its content is none of"),
        (saved(plain())[:50], "damaged or cut short"),
        (saved(plain(size=(64, 64)), "JPEG")[:500], "damaged or cut short"),
        (saved(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "32 bits"),
        (saved(Image.fromarray(np.ones((8, 8), dtype=np.int32)), "TIFF"), "32 bits"),
    ],
    ids=["empty", "a letter", "eps", "png cut", "jpeg cut", "float", "int"],
)
def test_what_is_no_usable_picture_is_a_sentence(content: bytes, said: str) -> None:
    pixels, problem = decoded(content, height=8, width=8)
    assert pixels is None and said in problem and "\n" not in problem


def test_a_picture_of_too_many_pixels_or_bytes_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def claiming(side: int) -> bytes:
        """A small PNG whose header says another width and height."""
        bomb = bytearray(saved(plain()))
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        return bytes(bomb)

    assert "many times as many pixels, expected at most 50 million" in decoded(claiming(100_000), height=8, width=8)[1]
    assert "8000 x 8000 pixels" in decoded(claiming(8_000), height=8, width=8)[1]
    monkeypatch.setattr(decoding, "MOST_BYTES", 10)
    assert "MB, expected at most" in decoded(saved(plain()), height=8, width=8)[1]


@pytest.mark.filterwarnings("ignore")  # Pillow's
def test_no_cut_or_flipped_bytes_give_a_traceback() -> None:
    generator = np.random.default_rng(0)
    kinds = [saved(half(RED, GREEN), kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP")] + [animation()]
    for content in kinds:
        for _ in range(40):
            hurt = bytearray(content[: int(generator.integers(1, len(content)))])
            hurt[int(generator.integers(len(hurt)))] ^= int(generator.integers(1, 256))
            pixels, problem = decoded(bytes(hurt), height=8, width=8)
            assert (pixels is None) == bool(problem)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label, colour in (("cat", RED), ("dog", GREEN)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "photos" / label / f"{index}.png").write_bytes(saved(plain((*colour[:2], index))))
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"x")
    return tmp_path / "photos"


def test_folders_are_classes(photos: Path) -> None:
    images = load_images(str(photos), image_size=8)
    assert images.label_names == ("cat", "dog") and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels.shape == (6, 8, 8, 3) and images.clients is None and images.groups is None
    assert tuple(images.pixels[images.rows[3], 0, 0]) == GREEN
    some = images.subset([5, 0])
    assert some.pixels is images.pixels and some.labels.tolist() == [1, 0]
    assert some.row_texts() == (images.row_texts()[5], images.row_texts()[0]) and len(set(images.row_texts())) == 6


def test_folders_of_folders_are_clients(photos: Path) -> None:
    clinics = photos.parent / "clinics"
    for name in ("north", "south"):
        (clinics / name).mkdir(parents=True)
        for label in ("cat", "dog"):
            (clinics / name / label).symlink_to(photos / label)
    images = load_images(str(clinics), image_size=8)
    assert images.clients == ("north", "south") and images.groups == ("north",) * 6 + ("south",) * 6
    assert [len(rows) for rows in by_file(images, num_clients=0, seed=0).indices] == [6, 6]


def test_a_folder_of_no_or_mixed_kind_is_refused(photos: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(InputError) as error:
            load_images(str(path), image_size=8)
        return str(error.value)

    assert "no folders of classes" in refused(photos / "cat")
    (photos / "client" / "cat").mkdir(parents=True)
    assert "beside 'cat', which holds files" in refused(photos)
    (photos / "client" / "cat").rmdir()
    (photos / "readme.txt").write_text("x")
    assert "'readme.txt' beside folders" in refused(photos)


def test_a_bad_file_is_named_or_dropped(photos: Path) -> None:
    (photos / "cat" / "broken.jpg").write_bytes(b"not a picture")
    (photos / "dog" / "renamed.txt").write_bytes(saved(plain((0, 255, 9))))
    with pytest.raises(InputError, match=r"cat/broken\.jpg: no picture.*on_bad_row=drop"):
        load_images(str(photos), image_size=8)
    images = load_images(str(photos), image_size=8, on_bad_row="drop")
    assert len(images) == 7 and images.num_dropped == 1


def of_kind(kind: str, photos: Path, folder: Path) -> str:
    rows = [
        {"image": str(file.relative_to(photos.parent)), "label": file.parent.name, "style": "a", "split": "train"}
        for file in sorted(photos.rglob("*.png"))
    ]
    if kind == "csv":
        lines = [",".join(rows[0])] + [",".join(row.values()) for row in rows]
        (folder / "t.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        with_bytes: list[dict[str, Any]] = [dict(row) for row in rows]
        for row in with_bytes:
            content = (folder / row["image"]).read_bytes()
            row["image"] = {"bytes": content, "path": None} if kind == "dict.parquet" else content
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(with_bytes), folder / f"t.{kind}")
    return str(folder / f"t.{kind}")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dict.parquet"])
def test_tables_hold_paths_or_bytes(kind: str, photos: Path) -> None:
    by_folder = load_images(str(photos), image_size=8)
    by_table = load_images(of_kind(kind, photos, photos.parent), image_size=8, group_column="style")
    assert by_table.row_texts() == by_folder.row_texts() and (by_table.pixels == by_folder.pixels).all()
    assert by_table.labels.tolist() == by_folder.labels.tolist() and by_table.groups == ("a",) * 6


def test_a_saved_data_set_gives_its_images_and_class_names(photos: Path) -> None:
    import datasets

    files = sorted(photos.rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    columns = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(photos.parent / "saved")
    images = load_images(str(photos.parent / "saved"), image_size=8)
    assert images.label_names == ("dog", "cat") and images.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert images.row_texts() == load_images(str(photos), image_size=8).row_texts()


def test_a_column_says_which_rows_are_of_a_split(photos: Path) -> None:
    table = Path(of_kind("csv", photos, photos.parent))
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:3], *(line.replace("train", "test") for line in lines[3:])]))
    given: dict[str, Any] = {"image_size": 8, "split_column": "split", "labels": ["cat", "dog"]}
    assert [len(load_images(str(table), train_split=split, **given)) for split in ("train", "test")] == [2, 4]
    with pytest.raises(InputError, match="with 'valid' in column 'split', got none"):
        load_images(str(table), train_split="valid", **given)
    with pytest.raises(InputError, match="Expected train_split next to split_column"):
        load_images(str(table), **given)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("nowhere.png,cat", "row 8: there is no such file"),
        ("/dev/zero,cat", "row 8: it is no regular file"),
        (",cat", "row 8: the picture is missing"),
        ("photos/cat/0.png,", "row 8: the label is missing"),
        ("photos/cat/0.png,bird", "row 8: the label is not one of 'cat', 'dog'"),
        ("photos/cat/0.png", "row 8: 1 fields where the header has 2"),
    ],
)
def test_a_bad_row_is_named_without_its_values(row: str, said: str, photos: Path) -> None:
    lines = ["image,label", *(f"photos/{name}/{i}.png,{name}" for name in ("cat", "dog") for i in range(3)), row]
    (photos.parent / "t.csv").write_text("\n".join(lines))
    with pytest.raises(InputError) as error:
        load_images(str(photos.parent / "t.csv"), image_size=8, labels=["cat", "dog"])
    assert said in str(error.value) and "nowhere" not in str(error.value) and "bird" not in str(error.value)
    dropped = load_images(str(photos.parent / "t.csv"), image_size=8, labels=["cat", "dog"], on_bad_row="drop")
    assert len(dropped) == 6 and dropped.num_dropped == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_size": 0}, "image_size in [1, 4,096], got 0"),
        ({"image_size": 8, "fit": "squash"}, "fit to be one of crop, pad, stretch, got 'squash'"),
        ({"image_size": 8, "on_bad_row": "ignore"}, "on_bad_row to be 'refuse' or 'drop'"),
        ({"image_size": 8, "labels": ["cat"]}, "two or more different names"),
        ({"image_size": 8, "label_column": "image"}, "different columns"),
        ({"image_size": 8, "train_split": "train"}, "train_split=null with the folder"),
    ],
)
def test_an_impossible_option_is_refused(given: dict[str, Any], said: str, photos: Path) -> None:
    with pytest.raises(InputError) as error:
        load_images(str(photos), **given)
    assert said in str(error.value)


def test_pixels_that_memory_cannot_hold_are_mapped_and_the_same(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cat" / "zz.png").write_bytes(b"")
    (photos / "dog" / "zz.png").write_bytes(b"")

    def load() -> LabelledImages:
        return load_images(str(photos), image_size=8, on_bad_row="drop")

    held = load()
    monkeypatch.setattr("fedlr.data.images.free_memory", lambda: 100)
    mapped = load()
    assert isinstance(mapped.pixels, np.memmap) and (mapped.pixels == held.pixels).all() and len(mapped) == 6
