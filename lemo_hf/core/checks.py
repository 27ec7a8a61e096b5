"""Refusals before training starts: each names the value and the way out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lemo_hf.config import KeepRule, LeMoConfig
from lemo_hf.core.families import family_of
from lemo_hf.core.family import Family
from lemo_hf.kernels.launch import runs_own_forward
from lemo_hf.memory.out_of_memory import CHECKPOINTING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        ValueError: It is no causal LM of a supported family, or a setting of it does not fit.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"LeMo needs a transformers causal LM, got {type(model).__name__}.")
    family = family_of(config)
    if cast("PreTrainedModel", model).get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM."
        )
    config = config.get_text_config()
    if getattr(config, "layerdrop", 0):
        raise ValueError(
            f"layerdrop={config.layerdrop} is not supported: set model.config.layerdrop=0 before "
            "the model is made."
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            "add_cross_attention=True is not supported: a layer that attends to an encoder has "
            "more than two sublayers. Set config.add_cross_attention=False for a causal LM alone."
        )
    check_attention(config)
    return family


def check_layers(model: nn.Module, family: Family) -> None:
    """Raises ValueError for a decoder layer that does something else than transformers wrote."""
    layers = list(cast(nn.ModuleList, model.get_submodule(family.layers)))
    for index, layer in enumerate(layers):
        if (first := layers.index(layer)) < index:
            raise ValueError(
                f"layers {first} and {index} are one module, which LeMo cannot number twice: put "
                "copy.deepcopy(layer) in the second place, or train without LeMo."
            )
        if runs_own_forward(layer):
            continue
        if "_hf_hook" in vars(layer):
            raise ValueError(
                f"layer {index} has hooks of accelerate, which spreads the model over several "
                "devices (device_map): LeMo's layers would be called past them, and run dense. "
                "Load the model on one device, and use several GPUs by DDP, FSDP2 or DeepSpeed."
            )
        raise ValueError(
            f"the forward of layer {index} is not that of transformers' {type(layer).__name__}: it "
            "was replaced, or its class is a subclass with its own, and LeMo would not call it. "
            "Use forward hooks, or train without LeMo."
        )


# Names are PEFT's.
_REFUSED_ADAPTERS = {
    "ADALORA": "it calls the model's forward past the hooks that LeMo works by",
    "XLORA": "it calls the model's forward past the hooks that LeMo works by",
    "PREFIX_TUNING": "its prefix is a KV cache, with which a pass is dense",
    "CARTRIDGE": "its prefix is a KV cache, with which a pass is dense",
    "ADAPTION_PROMPT": "it calls the model's forward past the hooks that LeMo works by",
}


def check_adapters(model: nn.Module) -> None:
    """Raises ValueError for a PEFT method whose training passes would be dense."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        name = getattr(config.peft_type, "value", config.peft_type)
        if name in _REFUSED_ADAPTERS:
            raise ValueError(
                f"PEFT's {name} is not supported: {_REFUSED_ADAPTERS[name]}. Use LoRA or one of "
                "its variants, or train without LeMo."
            )
        tokens = getattr(config, "alora_invocation_tokens", None)
        if tokens is not None:
            raise ValueError(
                f"alora_invocation_tokens={list(tokens)!r} is not supported: PEFT counts from the "
                "end of the whole row which tokens the adapter is for, and layers get kept tokens. "
                "Leave it unset, or train without LeMo."
            )


def check_attention(config: Any) -> None:
    """Raises ValueError for an attention implementation whose masks cannot be gathered."""
    implementation = config._attn_implementation or ""
    if "flex" in implementation:
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported: its block masks cannot be "
            "gathered. Use 'sdpa', 'eager' or 'flash_attention_2'."
        )


def check_predictors(
    config: LeMoConfig,
    predictors: Sequence | None,
    rules: Sequence[tuple[KeepRule, KeepRule | None] | None],
) -> None:
    """Raises ValueError unless predictors, policy and sparse layers go together.

    Args:
        config: The user's settings.
        predictors: A predictor or None for each layer; None: there are no predictors.
        rules: What each layer keeps, from `LeMoConfig.layer_rules`.
    """
    if config.policy != "predictor":
        if predictors is not None:
            raise ValueError(
                f"predictors were given but policy={config.policy!r}: set policy='predictor'."
            )
        return
    if predictors is None or len(predictors) != len(rules):
        given = "none" if predictors is None else len(predictors)
        raise ValueError(
            f"policy='predictor' needs one predictor a layer: the model has {len(rules)} layers, "
            f"given: {given}. Set LeMoConfig(predictor=...), pass predictors=[...], or use "
            "policy='overlap', which needs none."
        )
    for field in ("mlp_retention", "mlp_threshold"):
        if any(pair and _leaves_out(pair[1]) for pair in rules) and getattr(config, field):
            raise ValueError(
                f"{field}={getattr(config, field)} lets MLPs choose for themselves, but predictors "
                f"choose for attention: set {field}=None (the MLP keeps what attention keeps), or "
                "use policy='pooled'."
            )
    choosing = [i for i, pair in enumerate(rules) if pair and _leaves_out(pair[0])]
    if config.agree_across_layers:
        choosing = choosing[:1]
    missing = [i for i in choosing if predictors[i] is None]
    if missing:
        raise ValueError(
            f"layer {missing[0]} has no predictor but leaves tokens out by the LeMoConfig: "
            f"{_way_to_dense(missing[0], predictors)}."
        )


def _leaves_out(rule: KeepRule | None) -> bool:
    return rule not in (None, KeepRule(retention=1), KeepRule(threshold=0))


def _way_to_dense(layer: int, head: Sequence) -> str:
    known = [i for i, predictor in enumerate(head) if predictor is not None]
    if layer < known[0]:
        return f"set dense_first_layers={known[0]}"
    if layer > known[-1]:
        return f"set dense_last_layers={len(head) - 1 - known[-1]}"
    return (
        f"set agree_across_layers=False and give retention as a list, with 1 for layer {layer} "
        "(or threshold, with 0)"
    )


def check_block_size(config: LeMoConfig, longest: int) -> None:
    """Raises ValueError if not even the longest sequence has more than one block."""
    if longest < config.block_size:
        raise ValueError(
            f"block_size={config.block_size} is larger than the longest sequence ({longest} "
            "tokens): nothing could be left out. Use a smaller block_size or longer sequences."
        )


def check_call(model: nn.Module, kwargs: dict[str, Any], promised: bool = False) -> None:
    """Raises ValueError if a sparse pass cannot run as set, or return what is asked.

    Args:
        model: The causal LM.
        kwargs: Arguments of the call.
        promised: The Trainer has shown LeMo the labels of its loss.
    """
    model_config: Any = model.config
    check_attention(model_config.get_text_config())
    _check_no_documents(model_config, kwargs)
    if kwargs.get("fused_lm_head") and not promised and torch.is_grad_enabled():
        raise ValueError(
            "fused_lm_head=True: a TRL trainer asks for the log-probability of each token, and a "
            "sparse pass has those of kept tokens only. For SFT use "
            "lemo_hf.integrations.trl.LeMoSFTTrainer, for DPO "
            "lemo_hf.integrations.trl_dpo.LeMoDPOTrainer. TRL's other trainers are not supported "
            "(KTO; GRPO and RLOO, whose sampler reads every token: a sparse pass would put their "
            "importance ratios far from 1 before any step): call remove_lemo(model) first."
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(model.config, name, False)):
            raise ValueError(
                f"{name}=True is not supported in a sparse training pass: the stream is updated in "
                "place and eliminated tokens have no such output. Call model.eval() first, or "
                f"leave {name} unset."
            )


def _check_no_documents(config: Any, kwargs: dict[str, Any]) -> None:
    """Raises ValueError for bounds of packed documents in a model that passes a state on."""
    given = [n for n in ("seq_idx", "cu_seq_lens_q", "cu_seqlens") if kwargs.get(n) is not None]
    if given and family_of(config).recurrent is not None:
        raise ValueError(
            f"{', '.join(given)}: bounds of packed documents count all tokens, and recurrent "
            "layers of a sparse pass read kept ones alone. Train on one document a row."
        )


def asks_for_router_logits(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for routers' logits, and with them for the loss of their balance."""
    asked = kwargs.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if asked is None else asked)


def check_router_loss(model: nn.Module, own: bool, config: LeMoConfig) -> None:
    """Raises ValueError where kept tokens cannot stand in that loss for all of them.

    Args:
        model: The causal LM.
        own: The loss of the pass is the model class's, which LeMo stands in for.
        config: The user's settings.
    """
    way_out = "Set model.config.output_router_logits=False."
    if not hasattr(model, "router_aux_loss_coef"):
        raise ValueError(
            f"output_router_logits=True: {type(model).__name__} has no auxiliary loss, and "
            f"eliminated tokens have no router logits. {way_out}"
        )
    if not own:
        raise ValueError(
            "output_router_logits=True needs the model's own loss, made from labels: LeMo adds the "
            "auxiliary loss of kept tokens to it, and another loss would find no router logits. "
            f"{way_out}"
        )
    if config.sequence_parallel_size > 1:
        raise ValueError(
            "output_router_logits=True is not supported with sequence_parallel_size="
            f"{config.sequence_parallel_size}: each process routes a part of the tokens. {way_out}"
        )


def check_sharded_head(head: nn.Module) -> None:
    """Raises ValueError for a head whose parts ZeRO-3 would gather once a segment of tokens.

    Processes differ in how many segments they have, and would wait for each other forever.
    """
    parts = [parameter for child in head.children() for parameter in child.parameters()]
    if any(hasattr(parameter, "ds_id") for parameter in parts):
        raise ValueError(
            f"the language-model head is a {type(head).__name__} with modules inside, which is not "
            "supported under DeepSpeed ZeRO-3. Leave lm_head out of LoRA's target_modules and "
            "modules_to_save, or use ZeRO-2 or FSDP2."
        )


def check_trainer(
    args: Any, parallelism: Any, fsdp: Any = None, lemo: LeMoConfig | None = None
) -> None:
    """Raises ValueError for ways of using several GPUs that would split or copy a sequence.

    Or run a layer again outside its pass, as FSDP's own checkpointing does.

    Args:
        args: TrainingArguments.
        parallelism: Accelerate's ParallelismConfig, or None.
        fsdp: Accelerate's FullyShardedDataParallelPlugin, or None.
        lemo: What the run is to keep.
    """
    if fsdp is not None and lemo is not None and lemo.fp8:
        raise ValueError(
            "fp8=True is not supported with FSDP2, which holds a part of each weight: use DDP, or "
            "leave fp8 unset."
        )
    if getattr(fsdp, "activation_checkpointing", False):
        raise ValueError(
            "fsdp_activation_checkpointing=True stores the whole stream of each layer and runs "
            "the layer again outside its pass. Set it to false and set "
            f"TrainingArguments({CHECKPOINTING}=True): LeMo then stores kept rows only."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process means torch.nn.DataParallel, which LeMo does not "
            "support. Start one process a GPU: accelerate launch --num_processes "
            f"{args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES=0."
        )
    for name, what in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
        size = getattr(parallelism, f"{name}_size", 1) or 1
        if size > 1:
            instead = "" if name == "tp" else f" and LeMoConfig(sequence_parallel_size={size})"
            raise ValueError(
                f"{name}_size={size}: {what} parallelism by accelerate is not supported, since "
                f"tokens are chosen over the whole sequence. Set {name}_size=1{instead}."
            )
