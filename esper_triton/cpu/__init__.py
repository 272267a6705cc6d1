"""A native CPU backend for stock Triton: TTIR to LLVM IR to machine code. Usable without the rest of Esper."""
