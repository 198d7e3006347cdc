"""Imported once by the process from which workers are forked: they start at once, and share the analyser's model."""

from __future__ import annotations

import gc

from lora_trainer.data import checking as checking
from lora_trainer.data.korean import morphemes

# loads the model
morphemes("가")
# a collection would write to every object, and so copy the pages that the workers share
gc.freeze()
