"""Peak memory of this process, and how to start measuring anew."""

from __future__ import annotations

from pathlib import Path

from lilliput.machine.memory import peak_rss

__all__ = ["peak_rss", "reset_peak"]


def reset_peak() -> bool:
    """Set the high-water mark (VmHWM) to what is resident now. False where the system does not allow it.

    Linux only: "5" written to clear_refs (proc(5)). Elsewhere, and in some containers, the peak is that since the
    process began. A run that measures its own peak must not call this in the middle.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
