"""Running an accepted launch: the run's folder, torchrun as a child process, its signals and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from nam56r.launch.contract import LaunchContract
from nam56r.launch.options import CONTRACT, PROFILE, RECIPE, SCRIPT
from nam56r.launch.script import shell

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def write(contract: LaunchContract) -> Path:
    """Leave recipe, profile, contract and script in the run's folder; returns the script.

    Raises ValueError for a refused contract.
    """
    folder = Path(contract.run.out)
    script = shell(contract)
    folder.mkdir(parents=True, exist_ok=True)
    contract.recipe.save(folder / RECIPE)
    contract.profile.save(folder / PROFILE)
    contract.save(folder / CONTRACT)
    (folder / SCRIPT).write_bytes(os.fsencode(script))
    (folder / SCRIPT).chmod(0o755)
    return folder / SCRIPT


def start(contract: LaunchContract) -> int:
    """Write the run's folder and run its script, to the end; returns the exit code.

    What runs is the script that is left in the folder. Signals go on to it, each once: it has a session of its own, so
    that a terminal's Ctrl-C doesn't reach it a second time. Raises ValueError for a refused contract.
    """
    script = write(contract)
    # torchrun is the one beside this interpreter
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    child = subprocess.Popen(["bash", str(script)], env=os.environ | {"PATH": path}, start_new_session=True)
    before = {number: signal.signal(number, lambda sent, _: child.send_signal(sent)) for number in PASSED_ON}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
