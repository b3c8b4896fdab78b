"""Refuses results that are too large to send."""

from jacserve_server.errors import ServiceError


def check_result_size(
    function: str, row_bytes: int, batch: int | None, max_bytes: int
) -> None:
    """Refuses a result that could not be sent.

    Args:
        function: The function's qualified name.
        row_bytes: Bytes of one point's result.
        batch: How many points; None for one.
        max_bytes: The most that one result may take.

    Raises:
        ServiceError: It takes more.
    """
    # Even an empty batch has axes that numpy must be able to hold; and a point
    # without results still has a flag that they are finite.
    points = batch or 1
    if max(row_bytes, 1) * points > max_bytes:
        raise ServiceError(
            "RESULT_TOO_LARGE",
            f"the result of functions/{function} at {points} points would take "
            f"{row_bytes * points} bytes, but this server sends at most "
            f"{max_bytes}. Ask for fewer points at once or fewer quantities, "
            "or raise the server's max_payload_bytes.",
            function=f"functions/{function}",
            result_bytes=row_bytes * points,
            max_result_bytes=max_bytes,
        )


def check_patterned_size(resource: str, size_bytes: int, max_bytes: int) -> None:
    """Refuses an answer that is too large with its sparsity pattern.

    Args:
        resource: The function's resource name.
        size_bytes: Bytes of the answer.
        max_bytes: The most that one may take.

    Raises:
        ServiceError: It takes more.
    """
    if size_bytes > max_bytes:
        raise ServiceError(
            "RESULT_TOO_LARGE",
            f"the answer of {resource} would take {size_bytes} bytes with its "
            f"sparsity pattern, but this server sends at most {max_bytes}. Ask for "
            "less at once, or raise the server's max_payload_bytes.",
            function=resource,
            result_bytes=size_bytes,
            max_result_bytes=max_bytes,
        )


def check_message_size(size_bytes: int, max_bytes: int | None) -> None:
    """Refuses an answer that is too large for one message.

    Args:
        size_bytes: Bytes of the answer.
        max_bytes: The most that its caller can take in one; None for any size.

    Raises:
        ServiceError: It takes more.
    """
    if max_bytes is not None and size_bytes > max_bytes:
        raise ServiceError(
            "STREAM_REQUIRED",
            f"the answer would take {size_bytes} bytes, and in one message at most "
            f"{max_bytes} are sent. Ask by EvaluateStream.",
            result_bytes=size_bytes,
            max_result_bytes=max_bytes,
        )
