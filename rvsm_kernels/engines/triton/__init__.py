"""The Triton engine: the same kernels where the build has none for the device. Importing it imports Triton."""
