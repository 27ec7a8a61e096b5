"""Bytes of linears whose weights bitsandbytes has quantised.

Source: bitsandbytes 0.50, ``functional.quantize_4bit`` and ``int8_vectorwise_quant``.
"""

from lemo_hf.planning.model import Linear, ModelShapes

FP32 = 4
BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale of their own
# Tables of the 16 values of 4 bits and of the 256 of a scale's, and the scales' mean.
TABLES = FP32 * (16 + 256 + 1)


def quantized_bytes(linear: Linear, bits: int) -> int:
    """Of a weight in NF4 with double quantisation (``bits=4``), or in LLM.int8's 8 bits."""
    count = linear.width * linear.out
    if bits == 8:
        return count + FP32 * linear.out  # a scale for each row
    scales = -(-count // BLOCK)
    return -(-count // 2) + scales + FP32 * -(-scales // SCALES) + TABLES


def layer_bytes(model: ModelShapes, bits: int) -> int:
    """Of the quantised weights of one layer."""
    return sum(quantized_bytes(linear, bits) for linear in model.linears.values())


def dequantized_bytes(model: ModelShapes, bits: int, element: int) -> int:
    """Held while a linear computes: its weight in ``element`` bytes each, and fp32 scales.

    That is the largest linear's. Forward and backward both make it, and drop it.
    """
    count = max(linear.width * linear.out for linear in model.linears.values())
    return element * count + (FP32 * -(-count // BLOCK) if bits == 4 else 0)


def other_parameters(model: ModelShapes) -> int:
    """Parameters that stay as they are: embeddings, head, norms and biases."""
    quantized = sum(linear.width * linear.out for linear in model.linears.values())
    return model.parameters - model.layers * quantized
