"""A worker extension (``--worker-extension-cls start_plant.StartPlant``) whose import makes rank 1 fail at start-up.

The variable ``START_PLANT`` has the name of a function that fails there, as ``module:attribute``, and
``START_PLANT_TOLD`` the path of a file that gets the time of it, as of ``time.monotonic``. Rank 0 goes on to where it
waits for rank 1.
"""

import os
import pkgutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch


def fails_on_rank_1(stock: Any) -> Any:
    def planted(*args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            Path(os.environ["START_PLANT_TOLD"]).write_text(str(time.monotonic()))
            raise torch.OutOfMemoryError("planted")
        return stock(*args, **kwargs)

    return planted


class StartPlant:
    """Adds nothing to the worker."""


module, attribute = os.environ["START_PLANT"].split(":")
owner, _, name = attribute.rpartition(".")
target = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
mock.patch.object(target, name, fails_on_rank_1(getattr(target, name))).start()
