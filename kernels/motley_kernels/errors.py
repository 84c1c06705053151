"""Errors of the kernels: wrong shapes and devices, found before any arithmetic."""

from __future__ import annotations


class KernelError(ValueError):
    """Say what a kernel was given that it cannot take."""


class ShapeError(KernelError):
    """Say which dimensions disagree."""


class DeviceError(KernelError):
    """Say which tensors live on different devices."""
