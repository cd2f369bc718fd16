"""Shift Parallelism for vLLM (method: arXiv 2509.16495).

Importing this package makes the three flags known to ``vllm.LLM`` and ``EngineArgs``; vLLM's command lines
find them by themselves, through the entry point ``vllm.general_plugins``.
"""

from vllm_shift.plugin import register

__version__ = "0.1.0"

register()
