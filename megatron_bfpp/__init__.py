"""Breadth-first pipeline parallelism (Lamy-Poirier, arXiv 2211.05953) for Megatron-LM and Megatron-Core."""

__version__ = "0.1.0"
