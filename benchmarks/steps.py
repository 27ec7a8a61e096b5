"""One optimizer step of a provider: real, or dry for its memory and operations."""

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from dry_host import (
    HOST_LIMIT,
    counted_host,
    empty_host_cache,
    pin_ahead,
    pinned_rounding,
)
from dry_steps import DryKernels, calibrate, numbers_kept
from model_shapes import adapter_weights, build_model
from providers import Models, Provider, provider_of, provider_on
from quantized_base import Base
from record import GIB, measure
from torch import Tensor, nn

from lemo_hf.lemo import LeMo

LEFT_BEHIND = 2**26  # bytes; more than this of an earlier trial would spoil a peak
FIRST_TOKENS = 512  # of the first steps, which no dry step may come before


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: int,
    answers: int | None = None,
    rows: int = 1,
) -> Tensor:
    """One optimizer step on ``rows`` of fresh random tokens; the loss, detached.

    The labels are the tokens; only the last ``answers`` of them, if that is given.
    """
    device = next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size, (rows, tokens), device=device)
    labels = ids.clone()
    if answers is not None:
        labels[:, :-answers] = -100
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def take_turn(
    step: Callable[[], Tensor], lemo: LeMo | None, device: torch.device, warm_up: bool = True
) -> dict[str, float] | str:
    """One step that is not timed (kernels compile, the allocator's cache fills), one that is.

    Returns:
        What `measure` says, or ``"oom"``, or ``"failed: ..."``.
    """
    try:
        if warm_up:
            step()
        sample = measure(step, device)
        if lemo is not None and lemo.config.cuda_graphs:
            # That one was recorded. Replayed, it takes memory that nothing allocates any more.
            peaks = {name: sample[name] for name in ("peak_gib", "reserved_gib")}
            sample = measure(step, device) | peaks
    except Exception as error:  # one provider's failure must not cost the others' numbers
        return why(error)
    if lemo is not None and not lemo.report():
        return "failed: no sparse pass took place"
    finite = abs(sample["loss"]) < float("inf")
    return sample if finite else f"failed: the loss is {sample['loss']}"


def why(error: Exception) -> str:
    """An exception as the status of a row."""
    text = str(error)
    if any(sign in text for sign in ("out of memory", "ALLOC_FAILED")):
        return "oom"
    traceback.print_exc()
    return f"failed: {type(error).__name__}: {text[:200]}"


class LeftBehind(RuntimeError):
    """An earlier trial still holds memory, so that no peak would be right in this process."""


def storages(device: torch.device) -> dict[int, torch.UntypedStorage]:
    """Those that Python knows of on ``device``, by address."""
    tensors = (x for x in gc.get_objects() if issubclass(type(x), Tensor))
    found = (x.untyped_storage() for x in tensors if x.device.type == device.type)
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


def empty_memory(optimizer: torch.optim.Optimizer) -> None:
    """Drop gradients, and what the allocator has cached."""
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Dry:
    """A dry step.

    Attributes:
        status: "ok", "oom" or "failed: ...".
        peak_gib: The most that was allocated.
        reserved_gib: The most that the allocator held.
        host_gib: The most pinned memory.
        host_blocks: How many pinned blocks of each size, in bytes.
        flops: Operations of the products and of attention.
        uncalibrated: Attention operators whose own memory is not in the peak.
    """

    status: str
    peak_gib: float
    reserved_gib: float
    host_gib: float
    host_blocks: dict[int, int]
    flops: int
    uncalibrated: list[str]


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Bench:
    """One model on one device, its optimizer, and the steps that providers take on it.

    Args:
        title: Of the model.
        longest: Tokens of the longest sequence.
        device: Where it lives.
        tiny: Take a tiny model of the kind.
        options: Fields of `LeMoConfig` that replace those of every LeMo provider.
        base: How the weights are held.
        labels: Number of labels, on the last tokens of each row; None: all tokens are labels.

    Attributes:
        beside: What attention takes beside its outputs, by operator.
    """

    def __init__(
        self,
        title: str,
        longest: int,
        device: torch.device,
        tiny: bool = False,
        options: dict | None = None,
        base: Base = Base(),  # noqa: B008 - it is frozen
        labels: int | None = None,
    ):
        self.labels = labels
        model = build_model(title, longest, device, tiny, base)
        self.models = Models(model, title)
        self.device, self.options = device, options or {}
        self.optimizer = torch.optim.AdamW(adapter_weights(model), lr=1e-4, fused=True)
        self._rounding = pinned_rounding()
        self.beside = self._calibrate(model.config)
        # Optimizer states, workspaces of the products, and LeMo's choice of an attention kernel.
        for name in ("hf", "lemo"):
            with provider_on(self.models, provider_of(name), self.options) as (model, _):
                train_step(model, self.optimizer, min(longest, FIRST_TOKENS))
        empty_memory(self.optimizer)
        self._resting = allocated(self.device)

    def _calibrate(self, config) -> dict[str, list]:
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", heads)
        size = config.hidden_size // heads
        halves = calibrate(heads // 2, key_heads // 2, size, self.device)  # S2-Attn
        whole = calibrate(heads, key_heads, size, self.device)
        return {"all heads": whole, "half of the heads": halves}

    def real(
        self, provider: Provider, tokens: int, warm_up: bool = True, dry: Dry | None = None
    ) -> dict | str:
        """A turn of ``provider``; see `take_turn`.

        Args:
            provider: Who takes it.
            tokens: Length of the sequence.
            warm_up: Take a step before that is not timed.
            dry: The same step, dry: what it pins is pinned before.

        Returns:
            As `take_turn`; or ``"host memory"``.
        """
        empty_memory(self.optimizer)
        if dry is not None and dry.host_blocks:
            if dry.host_gib * GIB > HOST_LIMIT:
                return "host memory"
            pin_ahead(dry.host_blocks)
        try:
            with provider_on(self.models, provider, self.options) as (model, lemo):
                step = partial(train_step, model, self.optimizer, tokens, self.labels)
                result = take_turn(step, lemo, self.device, warm_up)
        except Exception as error:  # the provider itself: Liger missing, a model not supported
            result = why(error)
        empty_memory(self.optimizer)
        return result

    def dry(self, provider: Provider, tokens: int, empty_first: bool = True) -> Dry:
        """A dry step of ``provider``; weights and optimizer stay as they are."""
        if empty_first:
            empty_memory(self.optimizer)
        held = allocated(self.device) - self._resting
        if held > LEFT_BEHIND:
            raise LeftBehind(f"{held / GIB:.1f} GiB are still held by an earlier trial")
        if provider.kind == "liger":
            self.models.twin  # noqa: B018 - made before what is there is noted down
        before = storages(self.device)
        kernels = DryKernels(self.device)
        sample = {"peak_gib": 0.0, "reserved_gib": 0.0}
        with numbers_kept(self.optimizer), counted_host(self._rounding) as host:
            try:
                with provider_on(self.models, provider, self.options) as (model, _), kernels:
                    step = partial(train_step, model, self.optimizer, tokens, self.labels)
                    sample = measure(step, self.device)
                status = "ok"
            except Exception as error:
                status = why(error)
            if status != "ok":
                empty_memory(self.optimizer)
                # Graphs whose backward broke off while it computed something again are often
                # never freed, those of stock checkpointing too (seen on PyTorch 2.13).
                for address, storage in storages(self.device).items():
                    if address not in before:
                        storage.resize_(0)
                empty_memory(self.optimizer)
        names = sorted({name for name, *_ in kernels.uncalibrated})
        peaks = (round(sample[k], 3) for k in ("peak_gib", "reserved_gib"))
        host_gib, blocks = round(host.most / GIB, 3), dict(host.blocks)
        return Dry(status, *peaks, host_gib, blocks, kernels.flops, names)

    def close(self) -> None:
        """Make room for the next model."""
        self.models = self.optimizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        empty_host_cache()


def print_kernels(step: Callable[[], Tensor], count: int = 15) -> None:
    """The CUDA kernels that take most of a step: ms, calls, name."""
    kinds, cuda = torch.profiler.ProfilerActivity, torch.cuda.is_available()
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profile:
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [
        event
        for event in profile.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    print(f"{sum(event.self_device_time_total for event in events) / 1e3:.1f} ms in kernels:")
    for event in events[:count]:
        print(f"{event.self_device_time_total / 1e3:9.1f} ms {event.count:6d} x {event.key[:70]}")
