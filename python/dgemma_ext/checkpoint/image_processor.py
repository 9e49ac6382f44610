"""How a checkpoint wants its images prepared: reads processor_config.json, or an older one's preprocessor_config.json.

Which class of processor the files name says nothing (copies of the model name classes that there are not): the fields
are checked instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dgemma_ext import arguments
from dgemma_ext.checkpoint.json_section import Section, read_object
from dgemma_ext.checkpoint.vision_config import PATCH, POOL, SOFT_TOKENS
from dgemma_ext.errors import CheckpointError

# What the pixels are made by; a file may leave a field out.
_FIELDS: dict[str, tuple[Any, ...]] = {
    "do_convert_rgb": (True, None),
    "do_normalize": (False, None),
    "do_rescale": (True,),
    "do_resize": (True,),
    "image_mean": ([0, 0, 0], [0.0, 0.0, 0.0], None),
    "image_std": ([1, 1, 1], [1.0, 1.0, 1.0], None),
    "patch_size": (PATCH,),
    "pooling_kernel_size": (POOL,),
    "resample": (3,),  # bicubic
    "rescale_factor": (1 / 255,),
}
DEFAULT_SOFT_TOKENS = 280


def read_soft_tokens(folder: str | os.PathLike[str]) -> int:
    """The soft tokens that an image may take at most, one of SOFT_TOKENS; 280 for a folder without either file.

    Raises CheckpointError naming the file and the field whose value is not supported.
    """
    where = Path(arguments.path("folder", folder))
    for name, block in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        file = where / name
        if not file.exists():
            continue
        values = read_object(file)
        try:
            section = Section("" if block is None else block, values if block is None else values.get(block, {}))
            section.check_neutral(_FIELDS)
            found = section.integer("max_soft_tokens", DEFAULT_SOFT_TOKENS)
            if found not in SOFT_TOKENS:
                raise section.error("max_soft_tokens", ", ".join(map(str, SOFT_TOKENS)))
        except ValueError as error:
            raise CheckpointError(str(error), file=file) from error
        return found
    return DEFAULT_SOFT_TOKENS
