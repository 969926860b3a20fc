import json

import pytest

from lilliput.efficiency.peak import main, peak_memory
from lilliput.errors import LilliputError


def test_the_child_reports_bytes(folder, capsys):
    assert main([str(folder("llama")), "--prompt", "4", "--new", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] >= 0


def test_a_process_of_its_own_is_read_and_its_failure_told(folder, monkeypatch, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("print('noise')\nprint('{\"bytes\": 7}')\n")
    monkeypatch.setattr("lilliput.efficiency.peak._CHILD", f"exec(open({str(script)!r}).read())")
    assert peak_memory(folder("llama"), prompt=4, new=1, threads=1) == 7
    script.write_text("import sys\nsys.exit('out of memory')\n")
    with pytest.raises(LilliputError, match="could not be measured: out of memory"):
        peak_memory(folder("llama"), prompt=4, new=1, threads=1)
