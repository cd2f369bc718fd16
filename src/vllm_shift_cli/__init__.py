"""The command ``vllm-shift``.

A package of its own, because it must start where vLLM is not installed: importing ``vllm_shift`` imports vLLM, to make
the flags known.
"""
