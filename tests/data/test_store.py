"""A stored table is the table that was made, to the bit, or it is made again.

Mutants killed: content that is not hashed, a header that is not compared, a table that is written under its own name
from the start, a folder that others may read, a disk that writes less than it was given.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedlr.data.store as shipped
from fedlr.data.store import HEADER_BYTES, Put, Table, TableStore
from fedlr.errors import InputError
from tests.training.small_models import mutant

SHAPE = (300, 7)


def bits(kind: str = "f4") -> Table:
    """Every kind of bits, nan and infinity among them."""
    generator = np.random.default_rng(3)
    return np.frombuffer(generator.bytes(SHAPE[0] * SHAPE[1] * np.dtype(kind).itemsize), kind).reshape(SHAPE)


def filling(table: Table, *, calls: list[int] | None = None) -> Callable[[Put], None]:
    """Put a table in pieces, the last first."""

    def fill(put: Put) -> None:
        if calls is not None:
            calls.append(1)
        for start in reversed(range(0, len(table), 64)):
            put(start, table[start : start + 64])

    return fill


def kept(store: TableStore, table: Table, *, key: str = "k", calls: list[int] | None = None) -> Table:
    return store.table(lambda: {"texts": key}, shape=SHAPE, dtype=table.dtype, fill=filling(table, calls=calls))


def same_bits(left: Table, right: Table) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("kind", ["f4", "u2"])
def test_memory_a_temporary_file_and_a_folder_give_the_same_bits(tmp_path: Path, kind: str) -> None:
    table = bits(kind)
    for store in (TableStore(), TableStore(max_bytes=100), TableStore(tmp_path)):
        assert same_bits(kept(store, table), table)
    assert same_bits(kept(TableStore(tmp_path), table), table)  # the one that was stored


def test_only_a_table_above_the_limit_goes_to_a_file_which_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    size = bits().nbytes
    assert not isinstance(kept(TableStore(max_bytes=size), bits()), np.memmap)
    assert isinstance(kept(TableStore(max_bytes=size - 1), bits()), np.memmap)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_table_is_not_made_again_and_cannot_be_written(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(3):
        table = kept(TableStore(tmp_path), bits(), calls=calls)
        with pytest.raises(ValueError, match="read-only"):
            table[0, 0] = 1
    assert len(calls) == 1


def test_another_key_shape_or_type_is_another_table(tmp_path: Path) -> None:
    store, calls = TableStore(tmp_path), []
    kept(store, bits(), calls=calls)
    kept(store, bits(), key="other", calls=calls)
    kept(store, bits("u2"), calls=calls)
    store.table(lambda: {"texts": "k"}, shape=(7, 300), dtype="f4", fill=filling(bits().reshape(7, 300), calls=calls))
    assert len(calls) == len(list(tmp_path.glob("*.table"))) == 4


def flip(content: bytearray, place: int) -> bytearray:
    content[place] ^= 1
    return content


DAMAGE = {
    "one bit of the first row": lambda content: flip(content, HEADER_BYTES),
    "one bit of the last row": lambda content: flip(content, -1),
    "one bit of the header": lambda content: flip(content, 20),
    "a row cut off": lambda content: content[: -4 * SHAPE[1]],
    "a row too many": lambda content: content + bytes(4 * SHAPE[1]),
    "no header": lambda content: bytearray(HEADER_BYTES) + content[HEADER_BYTES:],
    "nothing": lambda content: bytearray(),
}


def check_damage(module: object, folder: Path, damage: Callable[[bytearray], bytearray]) -> None:
    said: list[str] = []
    kept(module.TableStore(folder), bits())
    (path,) = folder.glob("*.table")
    path.write_bytes(damage(bytearray(path.read_bytes())))
    assert same_bits(kept(module.TableStore(folder, say=said.append), bits()), bits())
    assert len(said) == 1 and "damaged" in said[0] and str(path) in said[0]
    assert same_bits(kept(module.TableStore(folder, say=said.append), bits()), bits())
    assert len(said) == 1, "the damaged file was left"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_changed_is_said_aloud_and_made_again(tmp_path: Path, damage: Callable) -> None:
    check_damage(shipped, tmp_path, damage)


@pytest.mark.parametrize(
    ("damage", "change"),
    [
        ("one bit of the last row", ('hashlib.sha256(rows.data.cast("B")).hexdigest()', '_header(path)["sha256"]')),
        ("one bit of the header", ("if _header(path) == {**header", "if _header(path) or {**header")),
        ("a row too many", ("if path.stat().st_size == ", "if path.stat().st_size >= ")),
    ],
)
def test_a_store_that_believes_what_it_finds_is_caught(tmp_path: Path, damage: str, change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_damage(mutant(shipped, change), tmp_path, DAMAGE[damage])


def check_kill(module: object, folder: Path) -> None:
    """A process dies after half of the rows; the next one has all of them."""

    def die(put: Put) -> None:
        put(0, bits()[:150])
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        module.TableStore(folder).table(lambda: {"texts": "k"}, shape=SHAPE, dtype="f4", fill=die)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    said: list[str] = []
    assert same_bits(kept(module.TableStore(folder, say=said.append), bits()), bits())
    assert said == []
    assert len(list(folder.iterdir())) == 1, "what the dead process wrote was left"


def test_what_a_killed_process_wrote_is_not_believed(tmp_path: Path) -> None:
    check_kill(shipped, tmp_path)


def test_a_table_written_under_its_own_name_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_kill(mutant(shipped, ('folder / f"{name}.partial"', 'folder / f"{name}.table"')), tmp_path)


def test_two_that_want_the_same_table_make_it_once(tmp_path: Path) -> None:
    calls: list[int] = []
    started = threading.Event()

    def slowly(put: Put) -> None:
        started.set()
        filling(bits(), calls=calls)(put)

    answers: list[Table] = []
    store = TableStore(tmp_path)
    threads = [
        threading.Thread(target=lambda: answers.append(store.table(dict, shape=SHAPE, dtype="f4", fill=slowly)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(answers) == 4
    assert all(same_bits(answer, bits()) for answer in answers)
    assert len(list(tmp_path.iterdir())) == 1


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept(TableStore(tmp_path / "a" / "cache"), bits())
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700
    (path,) = (tmp_path / "a" / "cache").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_error_while_it_is_made_leaves_nothing(tmp_path: Path) -> None:
    def fill(put: Put) -> None:
        put(0, bits()[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TableStore(tmp_path).table(dict, shape=SHAPE, dtype="f4", fill=fill)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_bytes", [None, 100], ids=["folder", "temporary file"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None) -> None:
    def full(*_args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match=r"runtime.cache_dir.*No space left"):
        kept(TableStore(None if max_bytes else tmp_path, max_bytes), bits())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"runtime.cache_dir.*file"):
        kept(TableStore(tmp_path / "file"), bits())


def test_a_disk_that_takes_little_at_a_time_takes_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:100], offset))
    assert same_bits(kept(TableStore(tmp_path), bits()), bits())


def test_no_rows_need_no_file(tmp_path: Path) -> None:
    empty = TableStore(tmp_path).table(dict, shape=(0, 7), dtype="f4", fill=filling(bits()))
    assert empty.shape == (0, 7) and list(tmp_path.iterdir()) == []
