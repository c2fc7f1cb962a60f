"""A small upstream of our own that CMake builds in a second, and a patch for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(upstream C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_subdirectory(src)
add_subdirectory(tools/server)
"""
SRC_CMAKE = """
file(GLOB MODELS "models/*.c")
add_library(llama SHARED llama.c ${MODELS})
"""
SERVER_CMAKE = """
add_executable(llama-server main.c)
target_link_libraries(llama-server llama)
"""
LLAMA_C = """/* upstream */
int answer(void)
{
    int value = 40;
    return value;
}
"""
MAIN_C = "int answer(void);\nint main(void) { return answer(); }\n"
PATCHED_C = """/* upstream */
int more(void);
int answer(void)
{
    int value = 40;
    value += more();
    return value;
}
"""


def blob(text: str) -> str:
    data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


PATCH = f"""From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Tests <tests@localhost>
Date: Thu, 1 Jan 2026 00:00:00 +0000
Subject: [PATCH] Call the glue

Kvpatch-Range: >=2026-01-01
Kvpatch-Base: b1
Kvpatch-Why: the answer must be right
Upstream-Status: Inappropriate [test]
Kvpatch-Hook: src/llama.c: value += more();
Kvpatch-Hook: src/llama.c: int more(void);
---
diff --git a/src/llama.c b/src/llama.c
index {blob(LLAMA_C)}..{blob(PATCHED_C)} 100644
--- a/src/llama.c
+++ b/src/llama.c
@@ -1,5 +1,7 @@
 /* upstream */
+int more(void);
 int answer(void)
 {{
     int value = 40;
+    value += more();
     return value;
"""


def git(repo: Path, *words: str) -> None:
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
        **{f"GIT_{who}_{what}": "tests" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "GIT_AUTHOR_DATE": "2026-08-13T12:00:00Z",
        "GIT_COMMITTER_DATE": "2026-08-13T12:00:00Z",
    }
    subprocess.run(["git", "-C", repo, *words], check=True, env=env, capture_output=True)


def envelope(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value
