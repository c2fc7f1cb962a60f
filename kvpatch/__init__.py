"""kvpatch builds Ollama and llama.cpp with an elastic KV cache."""

from __future__ import annotations

__version__ = "0.1.0"
