"""One rank of a run of several processes, with a fault of ``faults.ranks`` put in before the command line begins.

``faults.ranks`` has the launcher start this module in the place of Python itself, with Python's arguments: the launcher
and the package are those of every other run, and only the rank that has a fault imports anything beside them.
"""

import json
import os
import runpy
import sys

from faults.ranks import FAULT, install_in_rank

install_in_rank(json.loads(os.environ[FAULT]), int(os.environ["RANK"]))
_, module, *arguments = sys.argv[sys.argv.index("-m") :]
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
