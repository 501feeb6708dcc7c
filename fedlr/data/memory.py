"""How much memory this process could still take."""

import os
from pathlib import Path


def free_memory() -> int:
    """Return the free bytes of the machine, or of the control group this process runs in if that has fewer.

    0 where the system tells neither.
    """
    free = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        free += [int(limit) - int(used)] if limit != "max" else []
    except OSError:
        pass  # no control groups, or those of version 1
    return max(0, min(free, default=0))
