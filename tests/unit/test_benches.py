"""The benches: every script can be imported, and its `--help` says what it does, and mostly how long it takes; all in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"

# Modules of bench/ have names that others have, too: not in this process.
_ASK = r"""
import contextlib, importlib, io, json, pathlib, re, sys
sys.path.insert(0, sys.argv[1])
told = {}
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    # Also what is imported in functions, and in the code of processes.
    for place, names in re.findall(r"from (lowmem_pnn[\w.]*) import (\([^)]*\)|[\w, ]+)", pathlib.Path(module.__file__).read_text()):
        for wanted in re.findall(r"\w+", names.partition(" as ")[0]):
            if not hasattr(importlib.import_module(place), wanted):
                importlib.import_module(f"{place}.{wanted}")
    if not hasattr(module, "main"):
        continue
    sys.argv = [f"{name}.py", "--help"]
    shown, code = io.StringIO(), None
    with contextlib.redirect_stdout(shown):
        try:
            module.main()
        except SystemExit as end:
            code = end.code or 0
    told[name] = [code, shown.getvalue(), module.__doc__]
print(json.dumps(told))
"""

# What benches run as processes, of one training each.
_PARTS = {"ahead_runs", "neuroflux_plain"}
# Nobody has written down yet how long these take.
_UNTIMED = {"larger_than_memory", "optimizer_state", "os_limit", "pnn_labels", "startup", "streaming"}


def test_every_script_can_be_imported_and_says_what_it_does_and_how_long_it_takes() -> None:
    names = sorted(file.stem for file in BENCH.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(BENCH), *names],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "150"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) > 20
    for name, (code, shown, doc) in told.items():
        assert code == 0, f"{name} --help: exit code {code}"
        assert doc.splitlines()[0] in " ".join(shown.split()), f"{name} --help does not say what it does"
        if name not in _PARTS:
            assert "--quick" in shown, f"{name} has no short form"
            is_timed = any(word in shown for word in ("minute", "hour", " seconds;"))
            assert is_timed == (name not in _UNTIMED), f"{name} --help does not say how long it takes"
