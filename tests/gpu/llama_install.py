"""What llama.sh needs of kvpatch: the flags of a build, and the manifest of one that was made without `kvpatch build`
(a machine without network has no git repository to fetch from).

  llama_install.py flags                               one CMake flag a line
  llama_install.py manifest SOURCE.json DIR stock|patched
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvpatch import manifest
from kvpatch.stages import compile as compile_stage
from kvpatch.stages import output


def main(words: list[str]) -> int:
    if words[:1] == ["flags"]:
        source_flags = [*compile_stage.LLAMA_CPP_FLAGS]
        sys.stdout.write("\n".join(source_flags) + "\n")
        return 0
    if words[:1] == ["manifest"] and len(words) == 4:
        source = json.loads(Path(words[1]).read_text(encoding="utf-8"))
        folder = Path(words[2])
        stock = words[3] == "stock"
        facts = {
            "schema": manifest.SCHEMA,
            "label": source["label"] if not stock else source["stock_label"],
            "series": source["series"] if not stock else source["stock_series"],
            "stock": stock,
            "upstream_commits": {"llama.cpp": source["commit"]},
            "artifacts": [
                {k: v for k, v in row.items() if k != "mtime_ns"} for row in output.describe(folder)
            ],
            "smoke": None,
        }
        manifest.write(facts, folder)
        return 0
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
