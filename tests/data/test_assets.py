"""The install step reads the archive as it is, writes the whole file or none, and says what went wrong."""

import io
import tarfile
from pathlib import Path

import pytest

from fedlr.data import load_table
from simulations import assets


def archive(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def tiny_source() -> bytes:
    lines = {
        "movieReviewSnippets": b"1\t2.5\tA 'fine', \"great\" film\r\n2\t0.49\tneutral\r\n",
        "amazonReviewSnippets": b"1_1\t-0.5\tbroke at once\r\n",
        "nytEditorialSnippets": b"1_1\t-0.4\tneutral\r\n",
        "tweets": b"7\t0.5\todd byte \xe9\r\n",
    }
    inner = archive({f"hutto_ICWSM_2014/{name}_GroundTruth.txt": content for name, content in lines.items()})
    return archive({"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


def test_the_label_is_the_sign_of_the_rating_and_neutral_sentences_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "vader.csv"
    path.write_bytes(assets.vader_csv(tiny_source()))
    data = load_table(path, group_column="domain", labels=["negative", "positive"])
    assert data.texts == ("A 'fine', \"great\" film", "broke at once", "odd byte \ufffd")
    assert data.labels.tolist() == [1, 0, 1]
    assert data.groups == ("movie", "amazon", "tweets")


def test_no_index_is_one_sentence_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert assets.main(["--dir", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err
    assert "vaderSentiment==2.5 cannot be downloaded" in said and "online" in said
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_there_is_not_fetched_again() -> None:
    path = assets.default_folder() / "vader.csv"
    if not path.is_file():
        pytest.skip("vader.csv is not fetched: python -m simulations.assets")
    assert assets.fetch_vader(path.parent) == (path, False)
    assert len(load_table(path)) == assets.VADER_ROWS


def test_the_folder_is_the_one_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLR_ASSETS", str(tmp_path))
    assert assets.default_folder() == tmp_path
    monkeypatch.delenv("FEDLR_ASSETS")
    assert assets.default_folder().name == ".assets"
