"""The same emoji as six vendors draw them: a federation whose clients differ in style, 5,182 pictures in 20 classes.

A class is a group of Unicode's own list; skin tones, joined persons and what is no vehicle among transport are left
out. The drawings come from six npm packages of Iconify and are painted at 64 pixels on white by resvg. They are fetched
and never shipped: their licences, some of which ask for credit or for sharing alike, are written beside the table.

Two splits, both by a hash, a quarter held out. `split` draws pictures: the held-out drawing of a concept may be among
the training pictures in another vendor's style. `concept_split` draws concepts: what is held out nobody trains on, in
no style.
"""

import importlib
import io
import json
import re
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fedlr.errors import InputError
from fedlr.simulations.pinned_packages import Pinned, debian_packages, npm_archives, wheels

SIZE = 64
ROWS = 5_182
KEYS_SHA256 = "efb3c24ddcdb9751d6567a160a5e43d3e70a27d4e292561b131d83e95d0dd479"  # of all columns but the picture
VENDORS = {
    "twemoji": Pinned("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "noto": Pinned("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Pinned("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "openmoji": Pinned("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji-flat": Pinned("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "fluent-emoji-high-contrast": Pinned("1.2.6", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
}
UNICODE = {"unicode-data": Pinned("15.0.0-1", "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc")}
# The painter: a wheel for Linux on x86-64.
RESVG = {"resvg-py": Pinned("0.5.0", "84f2378ecc7a8e38b03429efaefc816daec1b1970114909a6f973393b297c91b")}
_LIST = "usr/share/unicode/emoji/emoji-test.txt"

# Of each class the subgroups of Unicode's list.
CLASSES = {
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy face-unwell face-hat "
    "face-glasses face-concerned face-negative",
    "hand": "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands hand-prop",
    "person": "person person-gesture person-role person-fantasy person-activity person-sport person-resting",
    "mammal": "animal-mammal",
    "bird": "animal-bird",
    "small creature": "animal-bug animal-marine animal-reptile animal-amphibian",
    "plant": "plant-flower plant-other",
    "fruit, vegetable": "food-fruit food-vegetable",
    "dish": "food-prepared food-asian food-marine food-sweet",
    "drink": "drink",
    "building": "place-building place-religious",
    "vehicle": "transport-ground transport-water transport-air",
    "sky, weather": "sky_&_weather",
    "clock": "time",
    "clothing": "clothing",
    "sport": "sport award-medal",
    "music": "sound music musical-instrument",
    "paper": "book-paper mail writing",
    "device": "computer phone light_&_video",
    "tool": "tool science lock",
}
_NO_VEHICLES = frozenset(
    "bus stop|motorway|railway track|oil drum|fuel pump|wheel|police car light|horizontal traffic light|"
    "vertical traffic light|stop sign|construction|anchor|ring buoy|seat|station".split("|")
)


class Concept(NamedTuple):
    """One emoji of Unicode's list: its class, its code points without variation selectors, and its name."""

    label: str
    code: str
    name: str


class Vendor(NamedTuple):
    """The drawings of one package, and what it says of itself."""

    icons: Mapping[str, Any]  # icons.json
    by_code: Mapping[str, str]  # code points to the name of an icon
    info: Mapping[str, Any]


def emoji_files() -> dict[str, bytes]:
    """Fetch, paint and return emoji.parquet and emoji-credits.txt, by name.

    The table has the columns image (the bytes of a PNG), label, domain (the vendor), name, codepoints, split and
    concept_split.

    Raises:
        InputError: a package cannot be fetched, or the rows are not those expected.
    """
    with debian_packages(UNICODE) as folder:
        wanted = list(concepts((folder / _LIST).read_text(encoding="utf-8")))
    with npm_archives({f"@iconify-json/{name}": one for name, one in VENDORS.items()}) as archives:
        vendors = {name: vendor(archives[f"@iconify-json/{name}"]) for name in VENDORS}
    with painter() as paint:
        rows = [row for name, one in vendors.items() for row in drawn(name, one, wanted, paint)]
    if (found := keys_sha256(rows)) != KEYS_SHA256:
        raise InputError(f"Expected {ROWS} emoji with the labels and splits of the study, got {len(rows)}: {found}")
    return {"emoji.parquet": as_parquet(rows), "emoji-credits.txt": credits(vendors).encode()}


def is_whole(path: Path) -> bool:
    """Return whether a file is the table that `emoji_files` makes, by all but the pixels."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):
        return False
    return keys_sha256(rows) == KEYS_SHA256


def concepts(text: str) -> Iterator[Concept]:
    """Yield what Unicode's emoji-test.txt lists of our classes."""
    label_of = {sub.replace("_", " "): label for label, subs in CLASSES.items() for sub in subs.split()}
    label = None
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            label = label_of.get(line.partition(":")[2].strip())
        elif label is not None and "; fully-qualified" in line:
            codes = [code.lower() for code in line.partition(";")[0].split() if code != "FE0F"]
            name = re.sub(r"^\S+ E\d+\.\d+ ", "", line.partition("#")[2].strip())
            has_tone = any("1f3fb" <= code <= "1f3ff" for code in codes)
            if name not in _NO_VEHICLES and not has_tone and not (label == "person" and "200d" in codes):
                yield Concept(label, "-".join(codes), name)


def vendor(archive: Path) -> Vendor:
    """Read the drawings of an Iconify package."""
    with tarfile.open(archive) as tar:
        read = {
            Path(member.name).name: json.loads(file.read())
            for member in tar
            if member.name in ("package/icons.json", "package/chars.json", "package/info.json")
            and (file := tar.extractfile(member)) is not None
        }
    chars = read.get("chars.json", {})
    by_code = {"-".join(p.zfill(4) for p in code.split("-") if p != "fe0f"): name for code, name in chars.items()}
    return Vendor(read["icons.json"], by_code, read["info.json"])


def drawn(domain: str, one: Vendor, wanted: list[Concept], paint: Callable[[str], bytes]) -> Iterator[dict[str, Any]]:
    """Yield a row for each emoji that a vendor draws."""
    icons = one.icons["icons"]
    aliases = {
        name: entry["parent"] for name, entry in one.icons.get("aliases", {}).items() if set(entry) == {"parent"}
    }
    for label, code, name in wanted:
        names = [aliases.get(key, key) for key in (one.by_code.get(code), slug(name)) if key]
        key = next((key for key in names if key in icons), None)
        if key is not None:
            image = on_white(paint(as_svg(icons[key], one.icons)))
            yield {
                **{"image": image, "label": label, "domain": domain, "name": name, "codepoints": code},
                **{"split": part(domain + code), "concept_split": part(code)},
            }


def part(text: str) -> str:
    """Return which part of a split something is in: a quarter is for the test.

    Not by CRC-32, which is linear: of two vendors whose names are as long it would hold out the same emoji, or never.
    """
    return "test" if sha256(text.encode()).digest()[0] % 4 == 0 else "train"


def slug(name: str) -> str:
    """Return Unicode's name of an emoji as Iconify writes it.

    >>> slug("man’s shoe"), slug("sun behind cloud"), slug("piñata")
    ('mans-shoe', 'sun-behind-cloud', 'pinata')
    """
    plain = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['.]", "", plain)).strip("-")


def as_svg(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> str:
    """Return one icon as a picture of its own, black where it takes the colour of a text."""
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    body = icon["body"].replace("currentColor", "#000")
    return f'<svg {spaces} width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}">{body}</svg>'


@contextmanager
def painter() -> Iterator[Callable[[str], bytes]]:
    """Give what paints an SVG as a PNG: resvg out of its pinned wheel, which is unpacked and not installed."""
    with wheels(RESVG) as found, TemporaryDirectory() as folder:
        with zipfile.ZipFile(found["resvg-py"]) as wheel:
            wheel.extractall(folder)
        sys.path.insert(0, folder)
        try:
            resvg = importlib.import_module("resvg_py")
        except ImportError as error:
            raise InputError("Expected Linux on x86-64 for the wheel of resvg-py, got another machine") from error
        finally:
            sys.path.remove(folder)
        yield lambda svg: bytes(resvg.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))


def on_white(png: bytes) -> bytes:
    """Return a picture without its transparency."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    sink = io.BytesIO()
    white.convert("RGB").save(sink, "PNG")
    return sink.getvalue()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression="none")
    return sink.getvalue()


def keys_sha256(rows: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of all columns but the picture."""
    return sha256(json.dumps([[v for k, v in row.items() if k != "image"] for row in rows]).encode()).hexdigest()


def credits(vendors: Mapping[str, Vendor]) -> str:
    """Return whose the drawings are, by vendor."""
    lines = ["The pictures of emoji.parquet are drawings of", ""]
    for name, one in vendors.items():
        author, licence = one.info["author"], one.info["license"]
        lines.append(
            f"{name}: {one.info['name']} by {author['name']} ({author.get('url', '-')}), {licence['title']}, "
            f"{licence.get('url', '-')}; npm package @iconify-json/{name} {VENDORS[name].version}"
        )
    return "\n".join([*lines, "", "Names and groups: Unicode's emoji-test.txt, Debian unicode-data 15.0.0-1.", ""])
