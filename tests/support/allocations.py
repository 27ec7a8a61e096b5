"""Every allocation of a tiny step, and what a plan of it says."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core import sink_attention
from lemo_hf.core.families import FAMILIES
from lemo_hf.core.hybrids import HYBRIDS
from lemo_hf.planning.dry_step import workspaces
from support.models import EAGER, EXTRA, make_model
from support.plans import plan

# The others store scores, or what the kernels of recurrent layers do.
PLANNED = [
    name for name in FAMILIES if name in sink_attention.MODELS or name not in (*EAGER, *HYBRIDS)
]

KERNELS = (
    "norm._gather_norm_forward",
    "norm._gather_norm_backward",
    "scatter_add._scatter_kernel",
    "rotary._rotary_kernel",
    "gated_activation._gated_forward",
    "gated_activation._gated_backward",
    "segment_losses._segment_kernel",
)
LATENT_HEADS = ("youtu", "deepseek_v3", "glm4_moe_lite")
# Projections of attentions that name them otherwise.
ATTENTIONS = {
    "phi3": ("qkv_proj", "o_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "falcon": ("query_key_value", "dense"),
    "gpt_neox": ("query_key_value", "dense"),
    "persimmon": ("query_key_value", "dense"),
    "gpt2": None,  # its linears are transformers' Conv1D, whose adapters are not planned
    "gpt_bigcode": ("c_attn",),
    **dict.fromkeys(LATENT_HEADS, ("q_a_proj", "kv_b_proj", "o_proj")),
}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


class Allocations(TorchDispatchMode):
    """The most bytes of storages that were alive at once, but for those that exist already."""

    def __init__(self, existing):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        for tensor in existing:
            self.alive.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.fixture
def alike(monkeypatch):
    """What the CPU has not: its attention takes no buffers, and no memory is rounded."""
    monkeypatch.setattr("lemo_hf.planning.dry_run._flash_buffers", lambda *_: 0)
    monkeypatch.setattr("lemo_hf.planning.dry_run.ROUNDED", 1)


@pytest.fixture
def launched(monkeypatch, alike):
    """The CPU takes the functions of the kernels, whose launches do nothing: sizes are what count.

    What is allocated around a launch is the same as on a GPU.
    """

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr("lemo_hf.kernels.launch.DEVICES", {"cpu"})
    for kernel in KERNELS:
        monkeypatch.setattr(f"lemo_hf.kernels.{kernel}", Nothing())


def tiny(family="llama", layers=3, targets=QKVO, adapter_dtype="bfloat16", **options):
    """A small bf16 model of the proportions of large ones, with LoRA unless ``targets`` is None."""
    if family == "smollm3":
        options["no_rope_layers"] = [1, 0, 1][:layers]
    if family in ("mistral", "starcoder2"):
        options["sliding_window"] = None
    if "layer_types" in EXTRA.get(family, {}):  # no row is as long as its windows
        kinds = ["sliding_attention", "full_attention"] * layers
        options |= {"layer_types": kinds[:layers], "sliding_window": 4096}
    if targets == QKVO:
        targets = ATTENTIONS.get(family, QKVO)
    sizes = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8, "head_dim": 8}
    sizes |= {"vocab_size": 64, "tie_word_embeddings": False, "num_hidden_layers": layers}
    if family in ("falcon", *LATENT_HEADS):  # heads have widths of their own
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = 8
    model = make_model(family, "sdpa", **{**sizes, **options}).to(torch.bfloat16)
    if family in sink_attention.MODELS:
        model.set_attn_implementation(sink_attention.NAME)
    config = model.config
    if targets is not None:
        settings = LoraConfig(
            r=8, target_modules=targets if targets == "all-linear" else [*targets]
        )
        wide = adapter_dtype == "float32"
        model = get_peft_model(model, settings, autocast_adapter_dtype=wide).train()
    return model, config, targets


LLAMA = AutoConfig.for_model("llama")


def peak_of_a_step(model, rows=1, tokens=512, autocast=False, existing=(), labels=None):
    """The most bytes alive in a forward and a backward pass, but for the model's own."""
    ids = torch.randint(64, (rows, tokens))
    with Allocations([*model.parameters(), *model.buffers(), *existing]) as allocations:
        ids = ids.clone()
        given = ids
        if labels is not None:
            given = ids.clone()
            given[:, :-labels] = -100
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=given, use_cache=False).loss
        loss.backward()
    return allocations.peak


def check_step(
    lemo,
    family="llama",
    tokens=512,
    rows=1,
    checkpointing=False,
    autocast=False,
    within=None,
    existing=0,
    labels=None,
    dtype=torch.bfloat16,
    triton=True,
    **options,
):
    """The plan against all allocations of one forward and backward pass, but for ``existing``.

    What is not planned: gradients of adapters inside a linear, scores, masks and counts of tokens.
    """
    # PEFT's own linears hold a few casts for a moment that are not planned.
    casts = lemo is None or (options.get("adapter_dtype") == "float32" and not autocast)
    within = within or (0.035 if casts else 0.015)
    model, config, targets = tiny(family, **options)
    if dtype != torch.bfloat16:
        model.to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lemo is not None:
        lemo = LeMoConfig(policy="recent", block_size=16, **lemo)
        apply_lemo(model, lemo)
    parameters = list(model.parameters())
    peak = peak_of_a_step(model, rows, tokens, autocast, labels=labels)
    expected = plan(
        config,
        lemo,
        tokens,
        batch_size=rows,
        lora_rank=None if targets is None else 8,
        lora_targets=targets or (),
        adapter_dtype=options.get("adapter_dtype", "bfloat16"),
        autocast=autocast,
        gradient_checkpointing=checkpointing,
        labels=labels,
        dtype=str(dtype).removeprefix("torch."),
        triton=triton,
    )
    parts = expected.parts
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    assert parts["optimizer states"] == 2 * trained
    before = sum(p.nbytes for p in parameters) + 2 * trained + workspaces(9)
    assert expected.peak - before == pytest.approx(peak - existing, rel=within)
    return expected
