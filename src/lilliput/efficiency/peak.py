"""Peak memory of loading and running one model, in a process that does nothing else.

The child prints {"bytes": N}: the process's high-water mark (VmHWM) after loading, a prefill and some decoding steps,
less its resident memory with all libraries imported. Pages of the weight files that transformers maps while it loads
count as long as they are mapped, so a model that is decoded at load peaks above its size in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from lilliput.errors import LilliputError
from lilliput.metrics.metric import Metric

_CHILD = "from lilliput.efficiency.peak import main; raise SystemExit(main())"


def peak_memory(folder: str | Path, *, prompt: int, new: int, batch: int = 1, threads: int, dtype: str = "auto") -> int:
    """Bytes above the imported libraries, measured in a child process on the CPU.

    Raises LilliputError where the child fails, with the last line of what it said.
    """
    command = [sys.executable, "-c", _CHILD, str(folder), "--dtype", dtype]
    for name, value in (("prompt", prompt), ("new", new), ("batch", batch), ("threads", threads)):
        command += [f"--{name}", str(value)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(x for x in sys.path if x),
    }
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode:
        message = (process.stderr.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise LilliputError(f"the peak memory of {folder} could not be measured: {message}")
    return int(json.loads(process.stdout.strip().splitlines()[-1])["bytes"])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Peak memory of loading and running one model.")
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="auto")
    for name, default in (("prompt", 512), ("new", 16), ("batch", 1), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)

    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401  (imported so that the base holds it)

    from lilliput.efficiency.runner import Runner
    from lilliput.machine.memory import peak_rss, resident

    torch.set_num_threads(options.threads)
    base = resident()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    runner = Runner(options.folder, prompt=options.prompt, new=options.new, batch=options.batch, dtype=dtype)
    runner.prefill()
    runner.decode()
    print(json.dumps({"bytes": peak_rss() - base}))
    return 0


METRIC = Metric(
    how="lilliput eval DIR --speed",
    key="speed.peak_rss_bytes",
    unit="bytes",
    interval="none: one high-water mark",
)


if __name__ == "__main__":
    raise SystemExit(main())
