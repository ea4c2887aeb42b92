"""Every error that rolloutd raises, one class per code.

    RolloutdError
    |-- ConfigError            CONFIG_INVALID            fix an option before work starts
    |   |-- ModelNotFound      MODEL_NOT_FOUND
    |   |-- ModelUnsupported   MODEL_UNSUPPORTED
    |   |-- LoraUnsupported    LORA_UNSUPPORTED
    |   |-- AddressInUse       ADDRESS_IN_USE
    |   `-- NoListener         NO_LISTENER
    |-- RequestError           INVALID_REQUEST           this request only; others go on
    |   |-- TokenOutOfRange    TOKEN_OUT_OF_RANGE
    |   |-- MaxModelLen        MAX_MODEL_LEN
    |   `-- IdReuse            ID_REUSE
    |-- LimitError                                       ask for less, or raise the option that is named
    |   |-- MessageTooLarge    MESSAGE_TOO_LARGE
    |   |-- RequestExceedsKvPool  REQUEST_EXCEEDS_KV_POOL
    |   |-- TooManyClients     TOO_MANY_CLIENTS
    |   `-- QueueFull          QUEUE_FULL
    |-- InfraError                                       not the request's fault; may be tried again
    |   |-- DeadlineExceeded   DEADLINE_EXCEEDED
    |   |-- EngineStalled      ENGINE_STALLED
    |   |-- EngineDied         ENGINE_DIED
    |   |-- EngineLoading      ENGINE_LOADING
    |   |-- DaemonUnreachable  DAEMON_UNREACHABLE
    |   |-- OutOfMemory        OUT_OF_MEMORY
    |   |-- ShuttingDown       SHUTTING_DOWN
    |   `-- PeerFailed         PEER_FAILED
    |-- WeightsError                                     the old version serves on; push again
    |   |-- ManifestMismatch   MANIFEST_MISMATCH
    |   |-- DigestMismatch     DIGEST_MISMATCH
    |   |-- TransportFailed    TRANSPORT_FAILED
    |   |-- UpdateConflict     UPDATE_CONFLICT
    |   |-- ParityMismatch     PARITY_MISMATCH
    |   |-- WeightsLost        WEIGHTS_LOST
    |   `-- StaleWeights       STALE_WEIGHTS
    |-- ProtocolError          MALFORMED
    |   |-- ProtocolMismatch   PROTOCOL_MISMATCH
    |   |-- AuthRequired       AUTH_REQUIRED
    |   `-- InsecureBind       INSECURE_BIND
    `-- InternalError          INTERNAL                  a defect of ours: report it

A message says what happened, which value met which limit, and what to change; it names options literally.
Errors cross the wire as (code, message) and come back as the same class.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RolloutdError(Exception):
    """Base of all errors. `code` names the kind; `retryable` says whether the same call may succeed later."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ConfigError(RolloutdError):
    """An option is unknown or impossible."""

    code = "CONFIG_INVALID"


class ModelNotFound(ConfigError):
    """Neither a local directory nor a reachable hub id."""

    code = "MODEL_NOT_FOUND"


class ModelUnsupported(ConfigError):
    """The architecture, or one of its options, has no implementation here."""

    code = "MODEL_UNSUPPORTED"


class LoraUnsupported(ConfigError):
    """An adapter of a kind that cannot be served exactly."""

    code = "LORA_UNSUPPORTED"


class AddressInUse(ConfigError):
    """Another daemon holds the address or its lock."""

    code = "ADDRESS_IN_USE"


class NoListener(ConfigError):
    """Nothing answers at the address."""

    code = "NO_LISTENER"


class RequestError(RolloutdError):
    """One request is invalid; it fails alone."""

    code = "INVALID_REQUEST"


class TokenOutOfRange(RequestError):
    """A token id outside the model's vocabulary."""

    code = "TOKEN_OUT_OF_RANGE"


class MaxModelLen(RequestError):
    """Prompt plus max_tokens is longer than the context."""

    code = "MAX_MODEL_LEN"


class IdReuse(RequestError):
    """A request id came twice with different content."""

    code = "ID_REUSE"


class LimitError(RolloutdError):
    """A configured limit was met."""


class MessageTooLarge(LimitError):
    """A message or frame is larger than the daemon accepts."""

    code = "MESSAGE_TOO_LARGE"


class RequestExceedsKvPool(LimitError):
    """One sequence needs more KV blocks than the whole pool has."""

    code = "REQUEST_EXCEEDS_KV_POOL"


class TooManyClients(LimitError):
    """More clients than --max-clients."""

    code = "TOO_MANY_CLIENTS"


class QueueFull(LimitError):
    """More requests waiting than --max-queued-requests."""

    code = "QUEUE_FULL"
    retryable = True


class InfraError(RolloutdError):
    """Not the request's fault: the process, the host or the network."""

    retryable = True


class DeadlineExceeded(InfraError):
    """The caller's own deadline passed."""

    code = "DEADLINE_EXCEEDED"


class EngineStalled(InfraError):
    """The engine process lives but its step counter stands still with work queued."""

    code = "ENGINE_STALLED"


class EngineDied(InfraError):
    """The engine process ended; the daemon's log holds the reason."""

    code = "ENGINE_DIED"


class EngineLoading(InfraError):
    """The model is still loading."""

    code = "ENGINE_LOADING"


class DaemonUnreachable(InfraError):
    """The daemon stopped answering."""

    code = "DAEMON_UNREACHABLE"


class OutOfMemory(InfraError):
    """The device has no memory left for the smallest piece of the work."""

    code = "OUT_OF_MEMORY"


class ShuttingDown(InfraError):
    """The daemon is stopping and takes no new work."""

    code = "SHUTTING_DOWN"


class PeerFailed(InfraError):
    """A process that `rolloutd bench` measures ended, hung, or gave a wrong answer."""

    code = "PEER_FAILED"


class WeightsError(RolloutdError):
    """An update was refused; the version from before goes on serving."""


class ManifestMismatch(WeightsError):
    """Names, shapes or dtypes differ from the model's, or a tensor is missing."""

    code = "MANIFEST_MISMATCH"


class DigestMismatch(WeightsError):
    """The bytes that landed are not the bytes that were sent."""

    code = "DIGEST_MISMATCH"
    retryable = True


class TransportFailed(WeightsError):
    """The two sides of a collective update did not meet, or lost each other."""

    code = "TRANSPORT_FAILED"
    retryable = True


class UpdateConflict(WeightsError):
    """Another update is open, or the update named is not."""

    code = "UPDATE_CONFLICT"


class ParityMismatch(WeightsError):
    """What serves after an update does not compute the trainer's log-probabilities."""

    code = "PARITY_MISMATCH"


class WeightsLost(WeightsError):
    """An update that was written over the weights failed: there are no weights to serve until one succeeds."""

    code = "WEIGHTS_LOST"


class StaleWeights(WeightsError):
    """A request demands a newer version than serves, as after a restart of the daemon: push the weights first."""

    code = "STALE_WEIGHTS"


class ProtocolError(RolloutdError):
    """A message that cannot be read."""

    code = "MALFORMED"


class ProtocolMismatch(ProtocolError):
    """Client and daemon speak different protocol versions."""

    code = "PROTOCOL_MISMATCH"


class AuthRequired(ProtocolError):
    """The daemon asks for keys that the client does not have."""

    code = "AUTH_REQUIRED"


class InsecureBind(ProtocolError):
    """A listener that other hosts could reach, without keys."""

    code = "INSECURE_BIND"


class InternalError(RolloutdError):
    """A defect of rolloutd."""

    code = "INTERNAL"


def _subclasses(cls: type[RolloutdError]) -> Iterable[type[RolloutdError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


ERROR_BY_CODE: dict[str, type[RolloutdError]] = {
    cls.code: cls for cls in _subclasses(RolloutdError) if "code" in cls.__dict__
}
"""Every code with its class."""


def error_from_wire(code: str, message: str) -> RolloutdError:
    """Return the error that a peer reported; an unknown code becomes a plain `RolloutdError` that names it."""
    cls = ERROR_BY_CODE.get(code)
    return cls(message) if cls is not None else RolloutdError(f"{code}: {message}")


def check_choice(name: str, value: object, choices: Iterable[object], *, or_none: bool = False) -> None:
    """Raise `ConfigError` for a value that is none of `choices`; None passes where it may stand for itself."""
    known = list(choices)
    if value not in known and not (or_none and value is None):
        words = ", ".join(map(str, known)) + (", or None" if or_none else "")
        raise ConfigError(f"{name}={value!r} is not known. Use one of {words}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `known`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def first_line(error: BaseException) -> str:
    """Return what somebody else's error says, short enough to stand within a message of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
