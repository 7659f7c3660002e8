"""What forked.py's forkserver imports and computes once, instead of every command that it forks.

The first figure fills matplotlib's caches of fonts and formulas. What is frozen here is never
looked at again by a command's garbage collections. Nothing of torch is run: its threads would not
survive the fork.
"""

import gc
import tempfile
from pathlib import Path

import safetensors.torch  # noqa: F401
import torch._dynamo  # imported by the first optimizer
import torch.distributed  # noqa: F401

import smollm.training.setup  # noqa: F401
from smollm.tracking import plots

with tempfile.TemporaryDirectory() as directory:
    step = {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "norms": {"norm": 1.0}}
    step |= {"val_loss": 2.0, "val_bits_per_byte": 1.0}
    text = {"text": "", "generated_tokens": 1, "perplexity": 1.0}
    kinds = ("train", "eval", "gradients", "sample")
    plots.draw([{"event": kind, **step, **text} for kind in kinds], Path(directory))
gc.collect()
gc.freeze()
