"""One module for each training framework. None is imported unless it is asked for: each needs its framework.

``rvsm_kernels.integrations.transformers`` and ``rvsm_kernels.integrations.lightning`` have a ``SparseWeightsCallback``.
Accelerate needs no module: ``rvsm_kernels.unwrap(optimizer)`` finds the optimizer inside the one that it prepares.
"""
