"""Kernels of the hot path, each an operator with a plain torch form; see the module of the same name."""
