"""Kernels for the CPU: Numba functions over LLVM vectors, run by teams of persistent threads."""

from numoe.engine.cpu.isa import configure

ISA = configure()
"""The instruction set that this process compiles for: see `isa.ISAS`."""
