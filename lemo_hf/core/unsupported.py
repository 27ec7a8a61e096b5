"""Reasons why causal LMs of transformers have no row in families.py, and the model types of each
reason.

`tests/test_support.py` checks that every causal LM of transformers has a row or is here, and that
docs/support.md says the same. Remove a type from this table when it gets a row.
"""

WHY_NOT = {
    "its layers pass a state from token to token and none attends": """
        falcon_mamba mamba mamba2 rwkv xlstm
    """,
    "no one has tried its recurrent layers yet: they stand beside attention, in layers of their "
    "own, or may need no more than a row in lemo_hf/core/hybrids.py": """
        bailing_hybrid falcon_h1 inkling2_text inkling_text kimi_linear lfm3 minimax
        nemotron_h qwen4_exp qwen4_exp_text recurrent_gemma zamba zamba2 zaya
    """,
    "its attention chooses keys by an index over all tokens": """
        axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4
    """,
    "no one has tried its experts yet: a row in lemo_hf/core/families.py may be all it needs": """
        afmoe aria_text axk1 cohere2_moe dbrx deepseek_v2 exaone_moe
        flex_olmo flint granitemoe_swa granitemoeshared hunyuan_v1_moe
        hy_v3 jetmoe kolibri1 laguna llama4_text longcat_flash mellum mimo_v2_flash
        minimax_m3_vl_text solar_open
    """,
    "its layers read more than the stream: keys and values of other layers, or more inputs": """
        gemma3n_text gemma4_assistant gemma4_unified_assistant
        gemma4_unified_text
    """,
    "it reads more than text (images, sound)": """
        cohere_compass_text dots3_note emu3 fuyu gemma3n gemma4_unified
        git got_ocr2 llama4 moshi moss_transcribe_diarize phi4_multimodal
    """,
    "it is the decoder of an encoder-decoder, whose layers attend to the encoder": """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mllama musicgen
        musicgen_melody mvp pegasus plbart prophetnet trocr whisper xglm
    """,
    "it is an encoder that is run as a decoder": """
        bert bert-generation big_bird camembert data2vec-text electra ernie
        megatron-bert rembert roberta roberta-prelayernorm roc_bert roformer xlm
        xlm-roberta xlm-roberta-xl xlnet xmod
    """,
    "its attention counts places, or patches of bytes, in the rows that it is given": """
        blt gpt_neo mpt reformer
    """,
    "its layers add to the stream by rules of their own (factors by channel or by depth, "
    "dropout inside an MLP)": """
        beam biogpt cpmant ctrl doge gpt_neox_japanese hrm_text openai-gpt
    """,
    "its head has layers of its own, or scales what it reads": """
        minicpm3 modernbert-decoder
    """,
}


def why_not(model_type: str) -> str | None:
    """The reason for a type; None if nobody has looked at it."""
    reasons = (reason for reason, types in WHY_NOT.items() if model_type in types.split())
    return next(reasons, None)
