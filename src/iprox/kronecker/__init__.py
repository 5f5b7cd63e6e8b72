"""The Kronecker factors of a layer's Fisher matrix, which IPSVD and EK-FAC use.

If tokens are independent samples, the Fisher of a layer y = W h is C_δ ⊗ C_h (K-FAC, Martens and Grosse,
arXiv:1503.05671), with C_h = E[h hᵀ] [n, n] the second moment of its inputs and C_δ = E[δ δᵀ] [m, m] that of its output
gradients.
"""
