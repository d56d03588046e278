"""The command line: `nam56r plan`, `translate`, `launch`, `patches`, `train`, `data`, `doctor`, `report`, `version`.

It parses, calls and prints. Bad input is answered with one line and exit code 2, a refused plan or launch with its
refusals and exit code 3. torch and megatron are imported by the commands that need them, so that `--help` is quick.
"""

# the command modules put their commands on the app when they are imported
from nam56r.cli import dataset, launching, planning, training, translating  # noqa: F401
from nam56r.cli.app import app, main

__all__ = ["app", "main"]
