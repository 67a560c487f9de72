"""Runs the fenced `bash` and `python` blocks of README.md, each in a process of its own.

They run from the repository root. A block below the comment `<!-- not run: reason -->` is printed with its
reason and left out. Exit code 1 names the first line of every block that failed.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<kind>bash|python)\n(?P<code>.*?)```", re.DOTALL)


def main() -> int:
    failed = []
    for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        kind, code, why = match["kind"], match["code"], match["why"]
        title = f"{kind}: {code.strip().splitlines()[0]}"
        if why:
            print(f"not run ({why}): {title}")
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
        start = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        print(f"{'ok' if result.returncode == 0 else 'FAILED'} ({time.monotonic() - start:.0f}s): {title}")
        if result.returncode:
            print(result.stdout[-3000:], result.stderr[-3000:], sep="\n")
            failed.append(title)
    print(f"{len(failed)} README blocks failed" if failed else "all README blocks ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
