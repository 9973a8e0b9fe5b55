"""A model as data: its layers, with the parameters, products and operations of each on one rank."""

from .attention import Attention, LatentAttention
from .gpt import GPT
from .layers import Layer, Prediction
from .mlp import MLP, Experts
from .recurrent import GatedDelta, Mamba
from .split import Gemm, Split

__all__ = [
    "GPT",
    "MLP",
    "Attention",
    "Experts",
    "GatedDelta",
    "Gemm",
    "LatentAttention",
    "Layer",
    "Mamba",
    "Prediction",
    "Split",
]
