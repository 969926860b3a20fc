"""transformers' command line, after the native layout is registered: `python -m lilliput.engines.transformers_server`.

The command `transformers` itself knows no plugins, and would refuse a native folder. It also looks for a newer release
of transformers before it starts; this does not.
"""

from __future__ import annotations

from transformers.cli.transformers import app

if __name__ == "__main__":
    app()
