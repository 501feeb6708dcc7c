"""Where and with what a figure was measured: written into every result."""

import importlib.metadata
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedlr import __version__
from fedlr.runs.directory import PACKAGES, git_revision


def about() -> dict[str, Any]:
    """Return the machine, the versions, the commit and the time."""
    return {
        "time": datetime.now().isoformat(timespec="seconds"),
        "fedlr": __version__,
        "git": git_revision(),
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "vector_unit": torch.backends.cpu.get_cpu_capability(),
            "load_average": [round(value, 2) for value in os.getloadavg()],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in (*PACKAGES, "ray")}},
    }


def processor() -> str:
    """Return the processor's name with its family and model, which say more than some names."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.processor() or "unknown")
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    bf16 = "bf16" if "avx512_bf16" in fields.get("flags", "") else "no bf16"
    return f"{name} ({family}, {bf16})" if family else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
