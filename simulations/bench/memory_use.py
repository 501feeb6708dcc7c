"""Peak memory of this process, as Linux counts it."""

import os
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mb() -> float:
    """Return the peak resident set since the process started, or since `reset_peak`, in MB (10^6 bytes)."""
    return _field_mb("VmHWM")


def resident_mb() -> float:
    """Return the resident set now, in MB."""
    return _field_mb("VmRSS")


def reset_peak() -> None:
    """Forget the peak so far (Linux: `5` into clear_refs)."""
    CLEAR.write_text("5", encoding="ascii")


def can_measure() -> bool:
    """Return whether this system counts peaks and forgets them."""
    return STATUS.exists() and os.access(CLEAR, os.W_OK)


def _field_mb(name: str) -> float:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"Expected {name} in {STATUS}, got none")
