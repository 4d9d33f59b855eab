import subprocess
import sys

import pytest

from tests.test_programs import ROOT
from transformer.errors import UserError
from transformer.workdir import Workdir


def test_a_folder_that_is_trained_in_is_refused_until_it_is_free(tmp_path):
    with Workdir(str(tmp_path)).locked():
        refused = pytest.raises(UserError, match=r"is in use by process \d+ on .*: wait")
        with refused, Workdir(str(tmp_path)).locked():
            pass
    with Workdir(str(tmp_path)).locked():
        pass


def test_a_dead_process_holds_no_folder(tmp_path):
    code = (
        "import sys\n"
        "from transformer.workdir import Workdir\n"
        "with Workdir(sys.argv[1]).locked():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=f"in use by process {process.pid} "),
            Workdir(str(tmp_path)).locked(),
        ):
            pass
        process.kill()
    with Workdir(str(tmp_path)).locked():
        pass
