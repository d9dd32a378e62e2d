"""The regression that the demo plants: a release of the quantiser that no longer nests its statistics.

Imported in the load's process (``--llm-import planted``). Nothing raises, nothing is logged; every 4-bit model only
needs more memory than before.
"""

import transformers

_init = transformers.BitsAndBytesConfig.__init__


def _without_double_quant(self, *args, **kwargs):
    kwargs["bnb_4bit_use_double_quant"] = False
    _init(self, *args, **kwargs)


transformers.BitsAndBytesConfig.__init__ = _without_double_quant
