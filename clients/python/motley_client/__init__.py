"""A typed client for Motley servers, blocking (`Client`) and asyncio (`AsyncClient`), and the `motley` command.

Owns nothing but the names below, each loaded from its module when first used: `motley --help` needs no gRPC. Needs no
torch; talks to a server by `motley.v1` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from motley_client.aio import AsyncClient
    from motley_client.client import Client
    from motley_client.errors import (
        AbortedError,
        AlreadyExistsError,
        CancelledRequestError,
        DataLossError,
        DeadlineExceededError,
        FailedPreconditionError,
        InternalError,
        InvalidArgumentError,
        MotleyClientError,
        NotFoundError,
        OutOfRangeError,
        PermissionDeniedError,
        ResourceExhaustedError,
        UnauthenticatedError,
        UnavailableError,
        UnimplementedError,
    )
    from motley_client.types import (
        AdapterChoice,
        AdapterFit,
        Candidate,
        Capacity,
        ChatMessage,
        ContinuationScore,
        DrainResult,
        FinishReason,
        Generation,
        Key,
        Limits,
        NewKey,
        Quota,
        Role,
        Sampling,
        Score,
        ServedAdapter,
        ServedBy,
        ServerInfo,
        StreamPart,
        Tenant,
        TokenLogprob,
        TokenLogprobs,
        Usage,
    )
    from motley_client.types_adapters import (
        Adapter,
        AdapterKind,
        AdapterResidency,
        AdapterState,
        AdapterVersion,
        Alias,
        ResolvedAdapter,
        UploadPhase,
        UploadProgress,
        UploadStatus,
        Visibility,
    )

__all__ = [
    "AbortedError",
    "Adapter",
    "AdapterChoice",
    "AdapterFit",
    "AdapterKind",
    "AdapterResidency",
    "AdapterState",
    "AdapterVersion",
    "Alias",
    "AlreadyExistsError",
    "AsyncClient",
    "CancelledRequestError",
    "Candidate",
    "Capacity",
    "ChatMessage",
    "Client",
    "ContinuationScore",
    "DataLossError",
    "DeadlineExceededError",
    "DrainResult",
    "FailedPreconditionError",
    "FinishReason",
    "Generation",
    "InternalError",
    "InvalidArgumentError",
    "Key",
    "Limits",
    "MotleyClientError",
    "NewKey",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "Quota",
    "ResolvedAdapter",
    "ResourceExhaustedError",
    "Role",
    "Sampling",
    "Score",
    "ServedAdapter",
    "ServedBy",
    "ServerInfo",
    "StreamPart",
    "Tenant",
    "TokenLogprob",
    "TokenLogprobs",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UploadPhase",
    "UploadProgress",
    "UploadStatus",
    "Usage",
    "Visibility",
]

_HOMES = ("types", "types_adapters", "errors", "client", "aio")  # the lightest first


if not TYPE_CHECKING:  # or any name would pass as an object

    def __getattr__(name: str) -> object:
        if name in __all__:
            for home in _HOMES:
                module = import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
