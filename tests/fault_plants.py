"""A worker extension (``--worker-extension-cls fault_plants.Plant``) that makes one rank fail inside the model."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

LAYER = "model.layers.1.self_attn.o_proj"


class Plant:
    """Its method is called on every rank, by ``collective_rpc``."""

    def plant(self: Any, what: str, rank: int, told: str) -> None:
        """From now on ``rank`` fails in one layer: in SP mode only, or in every step of stock vLLM.

        Args:
            what: it does.
            rank: that does it.
            told: path of the file that gets the time of it, as of ``time.monotonic``.
        """

        def tell() -> None:
            Path(told).write_text(str(time.monotonic()))

        def fail(module: nn.Module, inputs: Any) -> None:
            if hasattr(self, "switch") and not self.switch.in_sp:
                return
            tell()
            if what == "raises":
                raise RuntimeError("planted")
            if what == "busy GPU":
                torch.cuda._sleep(10**13)  # cycles, more than an hour
                return
            if what == "out of memory":
                if torch.cuda.is_available():
                    torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
                raise torch.OutOfMemoryError("planted: tried to allocate 1 EiB")
            time.sleep(10_000)

        def fail_to_sample(*_: Any) -> None:
            tell()
            raise RuntimeError("planted")

        if self.rank == rank and what == "raises in sampling":
            self.model_runner.sample_tokens = fail_to_sample
        elif self.rank == rank:
            self.model_runner.get_model().get_submodule(LAYER).register_forward_pre_hook(fail)
