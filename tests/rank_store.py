"""A KV connector for the tests: vLLM's example, with a folder of its own for every rank."""

import os
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class RankStore(ExampleConnector):
    """``ExampleConnector``, which gives the files of all ranks of a TP group the same names."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        path = Path(self._storage_path) / os.environ["RANK"]
        path.mkdir(parents=True, exist_ok=True)
        self._storage_path = str(path)
