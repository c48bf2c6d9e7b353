"""Kernels for Hopper, and the plain jax.numpy code that they are held to."""
