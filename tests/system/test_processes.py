"""What shows only in a process of its own: imports, private memory, locks."""

import subprocess
import sys
import textwrap
from pathlib import Path


def test_torchvision_and_sklearn_are_imported_only_when_needed() -> None:
    script = (
        "import sys; from lowmem_pnn.sources import datasets; "
        "from lowmem_pnn.zoo import deferred_init, models; models.find_model('mlp:8-2', {}, 2).build(); "
        "print([name for name in ('torchvision', 'sklearn', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_large_model_takes_no_private_memory(tmp_path: Path) -> None:
    # In a process of its own, since this one's allocator may hold free memory that a plain model would go into unseen.
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from lowmem_pnn.zoo.deferred_init import file_backed
        from lowmem_pnn.zoo.models import find_model

        def private_bytes():
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

        build = find_model("mlp:64-4096-4096-4096-4096-10", {}, 10).build
        find_model("mlp:2-2", {}, None).build()
        before = private_bytes()
        with file_backed(Path(sys.argv[1])):
            model = build()
        backed = private_bytes() - before
        plain = build()
        print(backed, private_bytes() - before - backed)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    backed, plain = map(int, done.stdout.split())
    # 50.6 million parameters are 202 MB.
    assert plain > 190e6
    assert backed < 8e6


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom lowmem_pnn.cli.commands import cli\n"
        "try:\n    cli(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
