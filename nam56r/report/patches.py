"""The runtime patch surface as text: what is changed in Megatron and torch, why, and whether it took."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from nam56r.report.table import wrap

_EXAMINE = "import json; from nam56r.megatron.patches import examine; print(json.dumps(examine()))"


def examine() -> dict[str, Any]:
    """`nam56r.megatron.patches.examine` of a new process, where no patch is in force yet.

    Raises RuntimeError with that process's last words when it fails, as on a Megatron without the modules patched.
    """
    done = subprocess.run([sys.executable, "-c", _EXAMINE], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"the patches could not be examined (exit code {done.returncode}): {said}")
    return json.loads(done.stdout.strip().rpartition("\n")[2])  # packages may say something on import


def render(found: dict[str, Any], width: int = 80) -> str:
    """What `examine` found: a line a patch, its target, and why it is there; width in columns."""
    patches = found["patches"]
    verified = sum(patch["verified"] for patch in patches)
    lines = [
        f"megatron-core {found['megatron-core']}: {len(patches)} patches, {verified} verified",
        "",
        _row("patch", "scope", "versions", "verified"),
        "-" * width,
    ]
    for patch in patches:
        yes = "yes" if patch["verified"] else "NO"
        lines.append(_row(patch["name"], patch["scope"], ", ".join(patch["versions"]), yes))
        if patch["fault"]:
            lines.append(wrap(f"  not verified: {patch['fault']}", width, 4))
        lines += [*_target(patch["target"], width), wrap(f"  {patch['reason']}", width, 2)]
    return "\n".join(lines)


def _target(path: str, width: int) -> list[str]:
    """A dotted path in one line, or in two where one is too short."""
    owner, dot, attribute = path.rpartition(".")
    return [f"  {path}"] if len(path) + 2 <= width else [f"  {owner}{dot}", f"    {attribute}"]


def _row(name: str, scope: str, versions: str, verified: str) -> str:
    return f"{name:<30}{scope:<16}{versions:<16}{verified}"
