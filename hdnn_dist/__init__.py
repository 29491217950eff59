"""Distributed training of Hamiltonian deep networks on a graph of agents."""

__version__ = "0.1.0"
