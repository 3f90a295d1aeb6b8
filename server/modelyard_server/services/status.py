"""Refusals as statuses: the only place that knows google.rpc."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import inference_service_pb2
from modelyard_server.errors import Reason, Refusal
from modelyard_server.transport.api import StatusReply

__all__ = ["DOMAIN", "defect_reply", "item_error_of", "reply_of"]

DOMAIN = "modelyard"
"""Domain of every ErrorInfo."""

_NO_RETRY = -1

# A status travels in the trailers, of which clients take 8 KiB, some of them less; what is longer
# they replace by an error of their own. In UTF-8 bytes; together with what is around them these
# stay below 2 KiB.
_MOST_TEXT = 480
_MOST_METADATA = 320
_MOST_VALUE = 200
_MOST_VIOLATIONS = 480
_MOST_QUOTA = 240
_MOST_NAME = 160
_ENTRY = 12
"""What an entry of a list takes beside its texts, and no less."""


def reply_of(refusal: Refusal) -> StatusReply:
    """The status of a refusal: code, text, ErrorInfo always, and what else fits its reason.

    A retry hint goes three ways: RetryInfo for programs, retry_after_ms in the text for people, and
    pushback for the retry policy of stock gRPC clients. Text and details are below 2 KiB each,
    whatever the refusal holds: long texts are cut, and of long lists the beginning is told.
    """
    suffix, metadata, pushback_ms = _retry_of(refusal)
    status = status_pb2.Status(code=refusal.code)
    info = error_details_pb2.ErrorInfo(reason=refusal.reason.name, domain=DOMAIN)
    retry: Duration | None = None
    if pushback_ms is not None:
        retry = Duration()
        retry.FromMilliseconds(pushback_ms)
    # A later attempt within the same deadline could only be refused too, or told nothing at all.
    is_too_late = refusal.reason is Reason.DEADLINE_UNREACHABLE
    if is_too_late or (pushback_ms is None and refusal.code in _RETRIED_BY_DEFAULT):
        pushback_ms = _NO_RETRY
    text = status.message = _text_of(refusal, _MOST_TEXT - len(suffix)) + suffix
    _fill(info.metadata, metadata)
    _add(status, info)

    if refusal.violations:
        found = _told(((v.field, v.description) for v in refusal.violations), _MOST_VIOLATIONS)
        if refusal.reason is Reason.MODEL_NEVER_FITS:
            failure = error_details_pb2.PreconditionFailure()
            for subject, description in found:
                failure.violations.add(type="BUDGET", subject=subject, description=description)
            _add(status, failure)
        else:
            bad = error_details_pb2.BadRequest()
            for field, description in found:
                bad.field_violations.add(field=field, description=description)
            _add(status, bad)
    if refusal.resource is not None:
        _add(
            status,
            error_details_pb2.ResourceInfo(
                resource_type=refusal.resource.type,
                resource_name=_cut(refusal.resource.name, _MOST_NAME),
            ),
        )
    if refusal.quota:
        quota = error_details_pb2.QuotaFailure()
        for subject, description in _told(
            ((q.subject, q.description) for q in refusal.quota), _MOST_QUOTA
        ):
            quota.violations.add(subject=subject, description=description)
        _add(status, quota)
    if retry is not None:
        _add(status, error_details_pb2.RetryInfo(retry_delay=retry))
    return StatusReply(
        code=refusal.code, text=text, details=status.SerializeToString(), pushback_ms=pushback_ms
    )


def item_error_of(refusal: Refusal) -> inference_service_pb2.PredictBatchError:
    """A refusal as what became of an item of a batch: what reply_of says, within the same bounds.

    It travels in a message and not in trailers, but there may be a thousand of it.
    """
    suffix, metadata, retry_ms = _retry_of(refusal)
    error = inference_service_pb2.PredictBatchError(
        code=refusal.code,
        message=_text_of(refusal, _MOST_TEXT - len(suffix)) + suffix,
    )
    error.reason = refusal.reason.number  # type: ignore[assignment]  # an enum's value
    _fill(error.metadata, metadata)
    if refusal.resource is not None:
        error.resource_name = _cut(refusal.resource.name, _MOST_NAME)
    found = [(v.field, v.description) for v in refusal.violations]
    found += [(q.subject, q.description) for q in refusal.quota]
    for subject, description in _told(found, _MOST_VIOLATIONS):
        error.violations.add(subject=subject, description=description)
    if retry_ms is not None:
        error.retry_delay.FromMilliseconds(retry_ms)
    return error


def _retry_of(refusal: Refusal) -> tuple[str, dict[str, str], int | None]:
    """What a refusal says of retries: an end of its text, its metadata, and milliseconds."""
    metadata = dict(refusal.metadata)
    if refusal.retry_after_s is None:
        return "", metadata, None
    retry_ms = max(1, round(refusal.retry_after_s * 1000))
    # First, because it is what a program needs if there is no room for everything.
    return f"; retry_after_ms={retry_ms}", {"retry_after_ms": str(retry_ms)} | metadata, retry_ms


def defect_reply(error_id: str) -> StatusReply:
    """The status of a defect of the server: nothing but where to find it in the log.

    Args:
        error_id: what the log knows it by.
    """
    return reply_of(
        Refusal(
            Reason.INTERNAL, f"internal error; error_id={error_id}", metadata={"error_id": error_id}
        )
    )


_RETRIED_BY_DEFAULT = frozenset({8, 14})
"""RESOURCE_EXHAUSTED and UNAVAILABLE: clients retry these unless they are told not to."""


def _add(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]  # google.rpc has no stubs: every detail is Any
    status.details.append(packed)


def _text_of(refusal: Refusal, most: int) -> str:
    """A refusal's text; where it is too long because of its violations, the first of those."""
    text = _cut(refusal.text, most)
    if text == refusal.text or len(refusal.violations) < 2:
        return text
    told = _told(((v.field, v.description) for v in refusal.violations), most)
    return _cut("; ".join(f"{field}: {text}" if field else text for field, text in told), most)


def _told(pairs: Iterable[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """As many (name, description) as `most` bytes hold, then ("", "and N more"); at least one."""
    whole = [(_cut(name, most // 4), _cut(text, most // 2)) for name, text in pairs]
    left = most - 2 * _ENTRY
    for count, (name, text) in enumerate(whole):
        left -= _ENTRY + len(name.encode()) + len(text.encode())
        if left < 0 and count:
            return [*whole[:count], ("", f"and {len(whole) - count} more")]
    return whole


def _fill(target: MutableMapping[str, str], metadata: dict[str, str]) -> None:
    left = _MOST_METADATA
    for key, value in metadata.items():
        left -= _ENTRY + len(key.encode())
        if left <= 0:
            break
        target[key] = _cut(value, min(left, _MOST_VALUE))
        left -= len(target[key].encode())


def _cut(text: str, most: int) -> str:
    """A text of at most `most` bytes of UTF-8, with an ellipsis if something was cut off."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return f"{encoded[: max(0, most - 3)].decode(errors='ignore')}…"
