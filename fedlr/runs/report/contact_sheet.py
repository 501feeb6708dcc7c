"""What a report shows of contact_sheet.json: a few held-out pictures of each client, and what they were taken for."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fedlr.errors import InputError
from fedlr.runs.report.layout import paragraph
from fedlr.runs.report.records import Record

MOST_BYTES = 100_000  # of one picture
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Shown:
    """One held-out picture: its class, and the class that it was taken for, together and by its own client alone."""

    label: str
    png: str  # base64
    named: str
    named_alone: str | None  # None: no client was trained alone


@dataclass(frozen=True)
class SheetRow:
    """The pictures of one client."""

    client_id: int
    name: str
    pictures: Sequence[Shown]


def read_contact_sheet(sheet: Record, alone: Record | None) -> list[SheetRow]:
    """Return the pictures of contact_sheet.json, with what each client alone takes its own for (alone.json).

    Raises:
        InputError: for anything that is no small PNG, or a class that has no name.
    """
    where = f"{sheet.where}, label_names"
    names = [Record({"name": name}, where).text("name") for name in sheet.items("label_names")]
    by_client = {} if alone is None else {row.count("client_id"): row for row in alone.records("clients")}
    return [_row(row, names, by_client.get(row.count("client_id"))) for row in sheet.records("clients")]


def sheet_parts(rows: Sequence[SheetRow]) -> list[str]:
    """Return the HTML of the contact sheet; nothing where there is none."""
    if not rows:
        return []
    with_alone = any(picture.named_alone is not None for row in rows for picture in row.pictures)
    told = (
        "Some held-out pictures of each client, evenly spread over its rows and not chosen by how they turned out. "
        "Below each stands its class; a tick and a green frame where the shared adapter names it, else a cross, a red "
        "frame, and the class that it names"
    )
    told += "; then the same of the client's own adapter, trained alone." if with_alone else "."
    return [paragraph(told), *(f'<h3 class="client">{escape(_called(row))}</h3>\n{_line(row)}' for row in rows)]


def _row(row: Record, names: Sequence[str], alone: Record | None) -> SheetRow:
    pictures = row.records("pictures")
    told = alone.integers("named") if alone is not None and "named" in alone.values else None
    if told is not None and len(told) != len(pictures):
        raise InputError(f"Expected 'named' of {len(pictures)} pictures in {alone and alone.where}, got {len(told)}")
    return SheetRow(
        client_id=row.count("client_id"),
        name=row.text("name") if "name" in row.values else "",
        pictures=[
            Shown(
                label=_class(one.count("label"), names, one),
                png=_png(one),
                named=_class(one.count("named"), names, one),
                named_alone=None if told is None else _class(told[index], names, one),
            )
            for index, one in enumerate(pictures)
        ],
    )


def _class(index: int, names: Sequence[str], where: Record) -> str:
    if not 0 <= index < len(names):
        raise InputError(f"Expected a class in [0, {len(names)}) in {where.where}, got {index}")
    return names[index]


def _png(one: Record) -> str:
    """Return the picture as it was written, if it is one: it goes into a page as it is."""
    text = one.text("png")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        content = b""
    if not content.startswith(_PNG) or len(content) > MOST_BYTES:
        raise InputError(f"Expected a PNG of at most {MOST_BYTES:,} bytes in base64 for 'png' in {one.where}")
    return text


def _called(row: SheetRow) -> str:
    right = sum(one.named == one.label for one in row.pictures)
    name = f"client {row.client_id}" + (f" ({row.name})" if row.name else "")
    told = f"{name}: {right} of {len(row.pictures)} right"
    if any(one.named_alone is not None for one in row.pictures):
        told += f", {sum(one.named_alone == one.label for one in row.pictures)} alone"
    return told


def _line(row: SheetRow) -> str:
    return '<div class="sheet">\n' + "\n".join(map(_picture, row.pictures)) + "\n</div>"


def _picture(one: Shown) -> str:
    is_right = one.named == one.label
    said = f"{escape(one.label)}<br>{_verdict(one.named, one.label)}"
    if one.named_alone is not None:
        said += f"<br>alone {_verdict(one.named_alone, one.label)}"
    kind, label = "right" if is_right else "wrong", escape(one.label, quote=True)
    image = f'<img alt="{label}" src="data:image/png;base64,{one.png}">'
    return f'<figure class="{kind}">{image}<figcaption>{said}</figcaption></figure>'


def _verdict(named: str, label: str) -> str:
    return "✓" if named == label else f"✗ {escape(named)}"
