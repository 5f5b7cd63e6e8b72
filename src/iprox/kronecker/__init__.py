"""The two Kronecker factors of a layer's Fisher, which both IPSVD and EK-FAC are made from.

Tokens as independent samples, the Fisher of a layer y = W h is C_δ ⊗ C_h (K-FAC, Martens and Grosse, arXiv:1503.05671),
C_h = E[h hᵀ] [n, n] its inputs' second moment, C_δ = E[δ δᵀ] [m, m] that of its output gradients.
"""
