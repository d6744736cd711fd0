"""The scripts of findings/ have the form that its README gives, and are in its table. They are not run here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))


def test_the_table_has_each_script_once_and_no_other() -> None:
    table = re.findall(r"^\| `([^`]+)` \|", (FINDINGS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_says_what_was_expected_and_seen_and_cleans_up(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    for part in ("# Package:  ", "# Expected: ", "# Seen:     ", "# Exit: 0 ", "mktemp -d", "trap 'rm -rf"):
        assert part in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    compile(text.split("<<'PY'\n")[1].split("\nPY\n")[0], script.name, "exec")
    pinned = re.findall(r"'([a-z0-9-]+)==[\d.]+'", text)
    assert pinned, "no package is pinned"
    assert not re.search(r"^(import|from) pipeline\b", text, re.MULTILINE)
