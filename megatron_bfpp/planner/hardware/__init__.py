"""Kinds of GPUs: what they achieve, and their profiles."""

from .gpu import GPU, Link, beside_products, peak_of
from .profile import known_gpus, load_gpu

__all__ = ["GPU", "Link", "beside_products", "known_gpus", "load_gpu", "peak_of"]
