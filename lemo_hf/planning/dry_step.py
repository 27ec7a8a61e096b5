"""One training step of a model as a dry run: which layers of it run, and how they are set up."""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lemo_hf.config import UNITS, LeMoConfig
from lemo_hf.core import sink_attention
from lemo_hf.core.families import family_of
from lemo_hf.core.levels import Levels
from lemo_hf.core.loss import shifted
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.memory.offload import SLAB, HostMemory, leaving
from lemo_hf.patch import apply_lemo, remove_lemo, transformers_model
from lemo_hf.planning.dry_host import DryHost
from lemo_hf.planning.dry_run import GRADIENTS, DryRun
from lemo_hf.planning.fused_rival import fused
from lemo_hf.planning.quantized import check_experts, gpu_autocast, quantize, quantized_bytes
from lemo_hf.planning.trained import Trained
from lemo_hf.planning.work import Work

# Policies that look at the batch alone. What the others look at is not counted.
OF_BATCH = ("auto", "overlap", "chunks", "recent", "window", "random")
ROWS, STORED = ("attention rows", "attention rows", "MLP rows"), ("stored rows",) * 3
UNIT = ("stored rows", "attention outputs", "sums behind attention")


class DryModel:
    """A model of a config that has no memory; its steps can be run with few of its layers.

    Attributes:
        targets: Names of the adapted linears.
        static: Bytes that are there all the time, by part.
    """

    def __init__(self, config: Any, trained: Trained, batch: int):
        self.trained, self.batch, self.family = trained, batch, family_of(config)
        self.config = copy.deepcopy(config)
        self.config.use_cache = False
        dtype, self.run = getattr(torch, trained.dtype), DryRun(trained.triton)
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):
            model = _made(self.config, dtype)
            stack = cast(nn.ModuleList, model.get_submodule(self.family.layers))
            self.targets = trained.targets_in(stack[0], self.family)
            if trained.bits is not None:
                quantize(model, stack, trained.bits, dtype)
                if trained.kbit_training:
                    check_experts(stack)
            if trained.lora_rank is not None:
                model = trained.with_adapters(model, self.targets)
        self.model, self.base = model.train(), transformers_model(model)
        self.config, self.layers = self.base.config, list(stack)
        self.lists = {
            name: value
            for name, value in vars(self.config).items()
            if isinstance(value, list) and len(value) == len(self.layers)
        }
        self.looks = [
            (repr(x), *(y[i] for y in self.lists.values())) for i, x in enumerate(self.layers)
        ]
        # Layers leave the meta device when they run; quantised ones have sizes to count before.
        with self.run, self.only([]):
            model.to_empty(device="cpu")
            self.base.tie_weights()
        with self.run, self.only([] if trained.bits is None else range(len(self.layers))):
            scaled = 0 if trained.bits is None else quantized_bytes(model, dtype)
        self.gradients = sum(x.nbytes for x in model.parameters() if x.requires_grad)
        adapters = 0 if trained.lora_rank is None else self.gradients
        floats = sum(x.nbytes for x in model.parameters() if x.is_floating_point())
        self.static = Counter(
            {
                "weights": floats - adapters,
                "quantised weights": scaled,
                "adapters": adapters,
                "optimizer states": 2 * self.gradients,
                "cuBLAS workspaces": workspaces(trained.capability),
            }
        )
        self.phases = lru_cache(maxsize=None)(self._phases)

    @contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[list[nn.Module]]:
        """The model with these of its layers."""
        above, _, name_of_layers = self.family.layers.rpartition(".")
        stack = self.base.get_submodule(above)

        def put(indices: Sequence[int]) -> list[nn.Module]:
            some = [self.layers[i] for i in indices]
            setattr(stack, name_of_layers, nn.ModuleList(some))
            self.config.num_hidden_layers = len(some)
            for name, values in self.lists.items():
                setattr(self.config, name, [values[i] for i in indices])
            return some

        try:
            some = put(chosen)
            with self.run:
                for layer in some:
                    if any(x.is_meta for x in layer.parameters()):
                        _leave_meta(layer)
            yield some
        finally:
            put(range(len(self.layers)))

    def levels(
        self, lemo: LeMoConfig | None, tokens: int, room: float | None, later: bool
    ) -> tuple[str, ...]:
        """What each layer of LeMo's computes again; empty for the stock model.

        ``room`` is bytes of the device, where memory decides; ``later``: optimizer states are there
        when it does.
        """
        if lemo is None:
            return ()
        asked = lemo.recompute_levels(len(self.layers))
        rest = "none"
        if self.trained.gradient_checkpointing and None in asked:
            rest = UNITS[0] if room is None else self._fitting(lemo, tokens, room, later)
        return tuple(level or rest for level in asked)

    def _fitting(self, lemo: LeMoConfig, tokens: int, room: float, later: bool) -> str:
        """What the first layer that asks decides: in a run's first step before optimizer states."""
        ids, labels = self._batch(tokens)
        shape = self.batch, tokens
        facts: dict[str, Any] = {"input_ids": ids, "targets": shifted(labels)}
        sparse = SparsePass(replace(lemo, recompute=None), shape, torch.device("cpu"), **facts)
        embeddings = cast(Tensor, self.base.get_input_embeddings().weight)
        with self.run:
            x = torch.empty(*shape, embeddings.shape[1], dtype=embeddings.dtype)
        count = len(self.layers)
        host = HostMemory(lemo.offload_gib or 0, last=count)
        there = self.static.total() + x.nbytes - (0 if later else self.static["optimizer states"])
        levels = Levels(self.base.parameters, self.family, self.layers, host)
        rows = list(sparse.stored_rows(count))
        return levels.fitting(x, rows, int(room - there))

    def _batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Ids without padding, and their labels."""
        ids = torch.randint(self.config.vocab_size, (self.batch, tokens))
        if self.trained.labels is None:
            return ids, ids
        labels = ids.clone()
        labels[:, : -self.trained.labels] = IGNORE_INDEX
        return ids, labels

    def _phases(
        self, lemo: LeMoConfig | None, tokens: int, levels: tuple[str, ...], fused_rival: bool
    ) -> tuple[dict[str, Counter[str]], int, Work]:
        """Bytes by part at the highest moment of each phase, pinned host memory, and the work."""
        kinds: list[tuple] = self.looks
        if lemo is not None:
            kinds = list(zip(kinds, lemo.layer_rules(len(kinds)), levels, strict=True))
        slabs = 0 if lemo is None else HostMemory(lemo.offload_gib or 0, last=-1).most
        first, host, step = 3 if slabs else 2, None, (lemo, tokens, levels, fused_rival)
        if slabs:  # what layers would store says what leaves
            chosen, _ = _few(kinds, first)
            host = DryHost(self.run, [None] * len(chosen), SLAB)
            self._run(step, kinds, first, host, forth_alone=True)
            stored = {kinds[j]: host.offered[i] for i, j in enumerate(chosen)}
            named = [[(str(i), x) for i, x in enumerate(stored[kind])] for kind in kinds]
            gone = [tuple(int(i) for i, _ in some) for some in leaving(named, slabs)]
            kinds = list(zip(kinds, gone, strict=True))
            host = DryHost(self.run, [gone[i] for i in _few(kinds, first)[0]], SLAB)
        elif self.trained.stock_offload and self.trained.gradient_checkpointing:
            host = DryHost(self.run, [None] * len(_few(kinds, first)[0]), 1)
        self._run(step, kinds, first, host)
        found = {phase: parts + self.static for phase, parts in self.run.phases().items()}
        found["optimizer"] = self.static + Counter({GRADIENTS: self.gradients})
        times = {before - 1: 1 + count for before, count in _few(kinds, first)[1].items()}
        taken = [] if host is None else host.taken
        pinned = sum(times.get(i, 1) * size for i, size in enumerate(taken))
        adam = 7 * self.gradients  # reads weights, gradients and states, writes all but gradients
        return found, pinned, self.run.work(moved=adam, launches=1, offloaded=pinned)

    def _run(
        self,
        step: tuple[LeMoConfig | None, int, tuple[str, ...], bool],
        kinds: Sequence[tuple],
        first: int,
        host: DryHost | None,
        forth_alone: bool = False,
    ) -> None:
        """Run a step with some layers of each of ``kinds``, which the dry run counts."""
        (lemo, tokens, levels, of_rival), trained = step, self.trained
        chosen, gaps = _few(kinds, first)
        kind = torch.bfloat16 if trained.dtype == "float32" else getattr(torch, trained.dtype)
        stores = [STORED if trained.gradient_checkpointing else ROWS] * len(chosen)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.WARNING)  # what LeMo says of a row is for those that train
            layers = stack.enter_context(self.only(chosen))
            if trained.gradient_checkpointing:
                # Hooks that enabling adds and disabling leaves.
                stack.callback(self.base.disable_input_require_grads)
                stack.callback(self.base.gradient_checkpointing_disable)
                self.base.gradient_checkpointing_enable({"use_reentrant": False})
            if lemo is not None:
                stack.callback(remove_lemo, self.model)
                passes = apply_lemo(self.model, _config(lemo, chosen, levels)).passes
                passes.host = host if lemo.offload_gib else None
                stores = [UNIT if levels[i] in UNITS else ROWS for i in chosen]
            if host is not None and host.slab == 1:
                for layer in layers:
                    vars(layer)["_gradient_checkpointing_func"] = host.checkpoint
            stack.callback(self.model.zero_grad)
            stack.enter_context(self.run.counted(self.model, layers, gaps, stores))
            ids, labels = self._batch(tokens)
            if of_rival:  # which makes logits of tokens without a label as well
                stack.enter_context(fused(self.base, self.family, layers, ids))
            stack.enter_context(gpu_autocast(trained.autocast))
            with torch.autocast("cpu", kind, enabled=trained.autocast):
                loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            if not forth_alone:
                loss.backward()


def attention_of(config: Any) -> str:
    """Name of the attention by which a model is planned: one that stores no scores."""
    return sink_attention.NAME if config.model_type in sink_attention.MODELS else "sdpa"


def workspaces(capability: int) -> int:
    """Bytes that PyTorch gives cuBLAS on a GPU of this major compute capability.

    They are there for each thread that calls it, the forward's and the backward's, and cuBLASLt
    takes the same: 32 MiB from Hopper on, else 2 pieces of 4 MiB and 8 of 16 KiB. Source:
    ``parseChosenWorkspaceSize`` and ``unified_cublas_and_lt_workspaces`` in PyTorch's
    ``CublasHandlePool.cpp``.
    """
    return 2 * (32 * 2**20 if capability >= 9 else 2 * 4096 * 2**10 + 8 * 16 * 2**10)


def _made(config: Any, dtype: torch.dtype) -> nn.Module:
    how = {"dtype": dtype, "attn_implementation": attention_of(config)}
    try:
        return AutoModelForCausalLM.from_config(config, **how)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        raise ValueError(
            f"model_type {config.model_type!r} is not predicted: transformers runs its attention "
            "by 'eager' alone, which stores scores. Run a few steps and read lemo/peak_memory_gib "
            "in the logs."
        ) from error


def _leave_meta(module: nn.Module) -> None:
    """`nn.Module.to_empty`, which before PyTorch 2.13 fails on quantised weights in a dry run."""
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
                part._parameters[name] = nn.Parameter(new, x.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cpu")


def _config(lemo: LeMoConfig, chosen: list[int], levels: tuple[str, ...]) -> LeMoConfig:
    """That of these layers alone, with host memory of the dry run."""
    count = len(levels)
    lists: dict[str, Any] = {
        name: tuple(value[i] for i in chosen)
        for name, value in vars(lemo).items()
        if isinstance(value, tuple) and len(value) == count
    }
    lists["recompute"] = tuple(levels[i] for i in chosen)
    return replace(
        lemo,
        **lists,
        policy=lemo.policy if lemo.policy in OF_BATCH else "recent",
        predictor=None,
        dense_first_layers=sum(i < lemo.dense_first_layers for i in chosen),
        dense_last_layers=sum(i >= count - lemo.dense_last_layers for i in chosen),
        offload_gib=None,
        cuda_graphs=False,
    )


def _few(kinds: Sequence[Any], first: int) -> tuple[list[int], dict[int, int]]:
    """Of layers that are alike the first and the last; how many are missing before a place.

    Where layers offload, the first three: two tensors are on their way before it is always two.
    """
    chosen: list[int] = []
    gaps: dict[int, int] = {}
    start = 0
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start]:
            continue
        run = list(range(start, end))
        if len(run) > first + 1:
            gaps[len(chosen) + first] = len(run) - first - 1
            run = [*run[:first], run[-1]]
        chosen += run
        start = end
    return chosen, gaps
