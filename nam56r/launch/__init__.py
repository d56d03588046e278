"""The launch contract: what will run, where, with which flags, checked as a whole before a GPU is taken.

A `LauncherProfile` says where a recipe runs and how it is split; `make_contract` puts recipe, profile and run together,
checks everything at once, and gives the contract or raises `LaunchRefused` with it; `start` runs an accepted one.
"""

from nam56r.launch.contract import LaunchContract, LaunchRefused, make_contract
from nam56r.launch.facts import Check
from nam56r.launch.options import RunOptions
from nam56r.launch.profile import PROFILES, Guards, LauncherProfile
from nam56r.launch.script import shell
from nam56r.launch.start import start

__all__ = [
    "PROFILES",
    "Check",
    "Guards",
    "LaunchContract",
    "LaunchRefused",
    "LauncherProfile",
    "RunOptions",
    "make_contract",
    "shell",
    "start",
]
