import subprocess
import sys

import pytest

from tests.test_programs import ROOT
from transformer.errors import UserError
from transformer.workdir import Workdir

CODE = """import sys
from transformer.workdir import Workdir
with Workdir(sys.argv[1]).locked():
    print('held', flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_refused_while_it_is_trained_in_and_a_dead_process_holds_none(tmp_path):
    def refused(holder):
        in_use = pytest.raises(UserError, match=f"is in use by process {holder} on .*: wait")
        with in_use, Workdir(str(tmp_path)).locked():
            pass

    with Workdir(str(tmp_path)).locked():
        refused(r"\d+")
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        refused(process.pid)
        process.kill()
    with Workdir(str(tmp_path)).locked():
        pass
