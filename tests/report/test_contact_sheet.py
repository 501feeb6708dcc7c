"""The contact sheet of a report: what it shows, and that only small PNGs get into a page."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedlr.errors import InputError
from fedlr.runs.report.page import report_page
from fedlr.runs.report.run_files import read_run
from tests.report.run_directory import alone, write_json, write_run

WARDS = ["west", "<b>east</b>"]


def png(colour: str) -> str:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def sheet() -> dict[str, Any]:
    told = [("west", [(0, 0), (1, 0)]), ("<b>east</b>", [(1, 1), (1, 1)])]
    clients = [
        {
            "client_id": client_id,
            "name": name,
            "pictures": [{"label": label, "named": named, "png": png("navy")} for label, named in pictures],
        }
        for client_id, (name, pictures) in enumerate(told)
    ]
    return {"label_names": ["cat", "<i>dog</i>"], "clients": clients}


def written(folder: Path, shown: dict[str, Any], *, named: list[list[int]]) -> Path:
    write_run(folder, num_clients=2)
    told = alone(2, private=True)
    for row, mine in zip(told["clients"], named, strict=True):
        row |= {"own_accuracy": 0.25, "named": mine}
    write_json(folder / "baselines" / "alone.json", told)
    scored = [
        {"client_id": number, "num_test": 2, "accuracy": 0.5 + number / 2, "name": WARDS[number]} for number in range(2)
    ]
    write_json(folder / "client_accuracy.json", {"mean": 0.75, "worst": 0.5, "clients": scored})
    write_json(folder / "contact_sheet.json", shown)
    return folder


def test_each_picture_is_framed_by_what_it_was_taken_for(tmp_path: Path) -> None:
    page = report_page(read_run(written(tmp_path / "run", sheet(), named=[[1, 1], [0, 1]])))
    assert page.count('<figure class="right">') == 3 and page.count('<figure class="wrong">') == 1
    assert page.count("data:image/png;base64,") == 4
    assert "client 0 (west): 1 of 2 right, 1 alone" in page
    assert "client 1 (&lt;b&gt;east&lt;/b&gt;): 2 of 2 right, 1 alone" in page
    assert "<i>dog" not in page and "<b>east" not in page
    assert "the shared adapter 75.0\xa0% in the mean, its own adapter, trained on its rows alone" in page
    assert "25.0\xa0%. Together is better for 2 of 2 clients." in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"png": base64.b64encode(b"<svg onload=alert(1)>").decode()}, "Expected a PNG of at most 100,000 bytes"),
        ({"png": 'x"><script>'}, "Expected a PNG of at most 100,000 bytes"),
        ({"png": png("navy") + 'A"'}, "Expected a PNG of at most 100,000 bytes"),
        ({"named": 2}, r"Expected a class in \[0, 2\).*got 2"),
        ({"label": "cat"}, "label"),
    ],
    ids=["another kind", "markup", "a tail", "no such class", "a word"],
)
def test_what_is_no_small_png_of_a_known_class_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    shown = sheet()
    shown["clients"][0]["pictures"][0] |= change
    with pytest.raises(InputError, match=said):
        read_run(written(tmp_path / "run", shown, named=[[1, 1], [0, 1]]))


def test_answers_alone_for_other_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Expected 'named' of 2 pictures.*got 1"):
        read_run(written(tmp_path / "run", sheet(), named=[[1], [0, 1]]))
