"""Command line: `care-lens run`, `diagnose`, `fit`, `evaluate`, `attack`, `study`, `reproduce`, `info`, `preflight`.

A command is a function in a module of its subject; :mod:`care_lens.cli.options` has the options that several share.
"""

import os

# OpenMP's idle threads spin by default: beside one busy process two threads then take twice as long as one, beside several four
# times (benchmarks/bench_waiting.py). It is read when torch is loaded, which the imports below do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from care_lens.cli import attacking, looking, reproducing, running, studying
from care_lens.cli.base import TRACEBACK, app

__all__ = ["TRACEBACK", "app", "attacking", "looking", "main", "reproducing", "running", "studying"]


def main() -> None:
    """Entry point of the `care-lens` command."""
    app()
