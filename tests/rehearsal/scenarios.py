"""What is rehearsed on a pretended GPU, each in a process of its own; prints one line of JSON.

    python tests/rehearsal/scenarios.py LIBRARY SCENARIO CARD [words]

LIBRARY is fake_cuda.cpp, compiled (`pretend.build`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pretend

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = (48, 24, 16, 12, 8)  # sequences
ENDS = (48, 8)  # of these, for eager shapes that are not documented: they are on a line


def live_bytes() -> Any:
    """A mode that counts the bytes of CUDA storages that are alive: `add`, `peak`."""
    import torch
    from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}
            self.now = self.peak = 0

        @classmethod
        def is_infra_mode(cls) -> bool:  # so that torch.compile does not mind it
            return True

        def add(self, value: Any) -> None:
            if not isinstance(value, torch.Tensor) or not value.is_cuda:
                return
            storage = value.untyped_storage()
            if storage._cdata not in self.sizes:
                # The caching allocator rounds each size up to 512 bytes.
                self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512
                self.now += self.sizes[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)

        def free(self, key: int) -> None:
            self.now -= self.sizes.pop(key, 0)

        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None
        ) -> Any:
            result = function(*arguments, **(named or {}))
            tree_map(self.add, result)
            return result

    def recomputed(operator: Any) -> Any:
        def run(mode: LiveBytes, *arguments: Any, **named: Any) -> Any:
            result = operator(*arguments, **named)
            tree_map(mode.add, result)
            return result

        return run

    for operator in (run_and_save_rng_state, run_with_rng_state):  # attention, recomputed
        operator.py_impl(LiveBytes)(recomputed(operator))
    return LiveBytes()


def attention_shapes() -> Any:
    """A mode that notes which attention kernels run, and on what shapes of q and k: `shapes`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Attentions(TorchDispatchMode):
        supports_higher_order_operators = True  # checkpointing's, which pass

        def __init__(self) -> None:
            super().__init__()
            self.shapes: set[str] = set()

        @classmethod
        def is_infra_mode(cls) -> bool:  # so that torch.compile does not mind it
            return True

        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None
        ) -> Any:
            if "attention" in str(function) and "backward" not in str(function):
                shapes = [tuple(x.shape) for x in arguments[:2] if isinstance(x, torch.Tensor)]
                self.shapes.add(f"{function} {shapes}")
            return function(*arguments, **(named or {}))

    return Attentions()


def peaks(recorder: pretend.Recorder, mode: str, how: str, *words: str) -> dict[str, int]:
    """The peak of live CUDA bytes of a step of two micro-batches, by the micro-batch's sequences.

    Args:
        mode: gradient checkpointing.
        how: compiled, eager, or static: compiled for one size, as the program does.
        words: of the configuration; training.batch_size is the size of "static".
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import sdpa_kernel
    from torch.utils._pytree import tree_map

    from model import CausalLM
    from smollm import hardware
    from smollm.config_reader import load
    from smollm.training.optimizer import build_optimizers

    torch._dynamo.reset()
    config = load(ROOT / "config.yaml", list(words))
    machine, length = hardware.choose(config), config.data.sequence_length
    found = {}
    modes = FakeTensorMode(allow_non_fake_inputs=True)  # states of generators are real
    with modes, sdpa_kernel(list(machine.attention.backends), set_priority=True):
        with torch.device("cuda"):
            model = CausalLM(config.model, machine.dtype, machine.attention.name)
        hardware.set_gradient_checkpointing(model.train(), mode, machine)
        optimizers = build_optimizers(model, config.training, machine.dtype)
        if how != "eager":
            hardware.compile_model(model, machine, fullgraph=True)
        if how == "compiled":  # anew: one graph for every size
            model.compile(fullgraph=True)
        sizes = ENDS if how == "eager" and words else MICRO_BATCHES
        for size in [config.training.batch_size] if how == "static" else sizes:
            counter = live_bytes()
            ids = torch.zeros(2, size, length, dtype=torch.long, device="cuda")
            tree_map(counter.add, [ids, *model.parameters(), *model.buffers()])
            states = [slots for each in optimizers for slots in each.state.values()]
            tree_map(counter.add, [dict(slots) for slots in states])
            batches = [part.clone() for part in ids]
            for batch in batches:
                torch._dynamo.maybe_mark_dynamic(batch, 0)
            if not found and how != "eager":  # compiled here, uncounted
                model(batches[0], batches[0]).backward()
                model.zero_grad(set_to_none=True)
            with counter:
                for batch in batches:
                    (model(batch, batch) / 2).backward()
                if config.training.optimizer == "muon":  # AdamW's update takes no memory
                    optimizers[0].found_inf = torch.zeros((), device="cuda")
                    optimizers[0].step()
            model.zero_grad(set_to_none=True)
            found[str(size)] = counter.peak
    return found


def peaks_of_cases(recorder: pretend.Recorder, *cases: str) -> dict[str, Any]:
    """`peaks` of several cases, each its words in one, and the sizes of the kernels' binaries."""
    found = {case: peaks(recorder, *case.split()) for case in cases}
    return {"peaks": found, "cubins": recorder.cubins() if "cubins" in os.environ else {}}


def train(recorder: pretend.Recorder, *words: str) -> dict[str, Any]:
    """train.py's own main, with these words: set-up, probe, steps, evaluation, samples, saving."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    import train as command

    draw = torch.randint
    drawn = []

    def randint(*arguments: Any, **named: Any) -> Any:
        drawn.append(arguments)
        return draw(*arguments, **named)

    torch.randint = randint  # with which compiled graphs would seed generators of their own
    with FakeTensorMode(allow_non_fake_inputs=True), attention_shapes() as attentions:
        code = command.main(list(words))
        with unset_fake_temporarily():
            drawn = len(drawn)
    seen = sorted(attentions.shapes)
    return {"code": code, "graphs": len(recorder.wrappers), "drawn": drawn, "attention": seen}


def generate(recorder: pretend.Recorder, family: str, heads: int) -> dict[str, Any]:
    """Three samples from a model of two layers, where a run prefers cuDNN.

    Args:
        heads: of keys and values, for 12 of queries.

    Returns:
        tokens of each, reads by the host, and the shapes that attention saw.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model import CausalLM
    from smollm import generation
    from smollm.config import Config, ModelConfig

    model_config = ModelConfig(num_hidden_layers=2, architecture=family, num_key_value_heads=heads)
    config = replace(Config(), model=model_config)
    with FakeTensorMode(), attention_shapes() as attentions:
        with torch.device("cuda"):
            model = CausalLM(config.model, torch.bfloat16).to(torch.bfloat16).eval()
        recorder.reads = 0
        prompts = [[5, 6, 7], [8], [9, 10]]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True):
            found = generation.generate_ids(model, prompts, config.generation, [1, 2, 3], -1)
    tokens = [len(each.ids) for each in found]
    return {"tokens": tokens, "reads": recorder.reads, "attention": sorted(attentions.shapes)}


def generate_of_families(recorder: pretend.Recorder) -> dict[str, Any]:
    """`generate` for a model of each family."""
    return {name: generate(recorder, name, n) for name, n in (("starcoder2", 12), ("llama", 3))}


def main() -> None:
    """Run the scenario that the command line names."""
    sys.path.insert(0, str(ROOT))
    library, scenario, card, *words = sys.argv[1:]
    recorder = pretend.start(Path(library), pretend.CARDS[card])
    functions = {"peaks": peaks_of_cases, "train": train, "generate": generate_of_families}
    with contextlib.redirect_stdout(sys.stderr):
        result = functions[scenario](recorder, *words)
    print(json.dumps(result))
    pretend.end()


if __name__ == "__main__":
    main()
