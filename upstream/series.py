"""The patches that are proposed to PEFT, and the source tree with them.

- `series/fixes/<name>/peft.patch` mends one bug of AdaLoRA in PEFT as it is, alone.
- `series/adadora/peft.patch` edits PEFT's own files for AdaDoRA. Our modules that PEFT lacks come beside them whole,
  in the form that they have in `src/`.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parent
FIXES = HERE / "series" / "fixes"
ADADORA = HERE / "series" / "adadora"
PEFT = Path("src", "peft")


def fixes() -> list[Path]:
    """The folders of the patches that stand alone, in the order of their names."""
    return sorted(path.parent for path in FIXES.glob("*/peft.patch"))


def apply(tree: Path, patch: Path) -> None:
    """
    Apply a patch to a source tree of PEFT. Raises a `SystemExit` if a file differs from the one that the patch was
    made for; nothing has changed then.
    """
    for name, blob in re.findall(r"^diff --git a/(\S+) .*\nindex (\w+)\.\.", patch.read_text(), re.MULTILINE):
        content = (tree / name).read_bytes() if (tree / name).exists() else b""
        if hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest() != blob:
            raise SystemExit(f"{patch.relative_to(HERE)} is not made for this {name}; nothing has changed")
    # outside of any repository, or git takes the paths as those of the repository that the tree is in
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=tree, env=environment, check=True)


def new_modules(stock: Path) -> list[Path]:
    """Our modules that a source tree of PEFT lacks, by their paths in it."""
    ours = (path.relative_to(ROOT) for path in sorted((ROOT / PEFT).rglob("*.py")))
    return [path for path in ours if not (stock / path).exists()]


def build(stock: Path, tree: Path) -> None:
    """Make `tree` a copy of the source tree `stock` of PEFT, with AdaDoRA inside."""
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(stock, tree, ignore=shutil.ignore_patterns("__pycache__"))
    apply(tree, ADADORA / "peft.patch")
    for path in new_modules(stock):
        # the overlay calls PEFT's own `layer` `stock_layer`, which has another place in the order of imports
        code = (ROOT / path).read_text().replace("from . import stock_layer as", "from . import layer as")
        imports = re.compile(r"(^from \. import .*\n)+", re.MULTILINE)
        code = imports.sub(lambda found: "".join(sorted(found[0].splitlines(keepends=True))), code)
        (tree / path).write_text(code)
