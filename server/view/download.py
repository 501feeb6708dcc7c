"""Fetch an adapter: a file that is whole and has the hash that was announced, or no file."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc

from fedlr.errors import InputError
from fedlr.files import sync_folder
from fedlr.server.view.connection import ViewAddress, refuse
from fedlr.server.view.operator_pb2 import AdapterHeader, AdapterPart, GetAdapterRequest


def download_adapter(address: ViewAddress, rounds_completed: int | None, out: Path) -> AdapterHeader:
    """Write the adapter of a round (None: the latest) to `out` and return what it is.

    An existing file is replaced at once when the new one is whole: a process that reads it sees the old or the new.

    Raises:
        InputError: if the view does not give it, it is not what its header says, or `out` cannot be written.
    """
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"Expected --out to be a file in a folder that exists, got {str(out)!r}")
    request = GetAdapterRequest(rounds_completed=rounds_completed)
    try:
        with address.connected() as view:
            return write_adapter(view.GetAdapter(request, metadata=address.token.metadata()), out)
    except grpc.RpcError as error:
        refuse(error, address)


def write_adapter(parts: Iterator[AdapterPart], out: Path) -> AdapterHeader:
    """Write a header's chunks to `out`; `out` is as before unless all of it is as the header says.

    Raises:
        InputError: if it is not, or cannot be written.
    """
    first = next(parts, None)
    if first is None or not first.HasField("header"):
        raise InputError("Expected an adapter that begins with its header, got none; is this a view of fedlr?")
    header = first.header
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        free = shutil.disk_usage(out.parent).free
        if header.size_bytes > free:
            raise InputError(f"Expected {header.size_bytes} bytes of room for {str(out)!r}, got {free}")
        sha256 = _write(parts, header, partial)
        if sha256 != header.sha256:
            raise InputError(f"Expected an adapter with SHA-256 {header.sha256}, got {sha256}; get it again")
        os.replace(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"Expected to write {str(out)!r}, got {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return header


def _write(parts: Iterator[AdapterPart], header: AdapterHeader, partial: Path) -> str:
    """Write exactly as many bytes as announced, down to the disk, and return their SHA-256."""
    digest, num_bytes = hashlib.sha256(), 0
    with partial.open("xb") as file:
        for part in parts:
            num_bytes += len(part.chunk)
            if num_bytes > header.size_bytes:
                break
            digest.update(part.chunk)
            file.write(part.chunk)
        if num_bytes != header.size_bytes:
            raise InputError(f"Expected an adapter of {header.size_bytes} bytes, got {num_bytes}; get it again")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
