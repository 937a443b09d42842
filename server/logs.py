"""The log of the HTTP process. What one place in the code says again and again, as a client may make it, is told once a
second, with how often it was."""

import logging
import threading

REPEAT_SECONDS = 1.0

_Place = tuple[str, int, str, type | None]


def configure() -> None:
    """Log to stderr: this package from INFO on. Of other libraries, warnings alone: a Hub download is 25 lines of
    their HTTP client."""
    handler = logging.StreamHandler()
    handler.addFilter(Repeats(handler))
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler]
    )
    logging.getLogger("nibble").setLevel(logging.INFO)


class Repeats(logging.Filter):
    """Of warnings and errors from one place that differ in their arguments alone the first passes; it is told again
    each second, with the number of those that came since and did not pass."""

    def __init__(self, handler: logging.Handler):
        super().__init__()
        self._handler = handler
        self._lock = threading.Lock()
        self._counts: dict[_Place, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0] if record.exc_info else None
        place = record.pathname, record.lineno, str(record.msg), error
        with self._lock:
            first = place not in self._counts
            self._counts[place] = 0 if first else self._counts[place] + 1
        if first:
            self._later(place, record)
        return first

    def _later(self, place: _Place, record: logging.LogRecord) -> None:
        timer = threading.Timer(REPEAT_SECONDS, self._tell, (place, record))
        timer.daemon = True
        timer.start()

    def _tell(self, place: _Place, record: logging.LogRecord) -> None:
        """Say how often it was; look again in a second where it goes on."""
        with self._lock:
            count = self._counts.pop(place)
            if count:
                self._counts[place] = 0
        if not count:
            return
        more = logging.makeLogRecord(
            record.__dict__
            | {"msg": "%s (and %d times more)", "args": (record.getMessage(), count)}
            | {"exc_info": None, "exc_text": None}
        )
        self._handler.acquire()
        try:
            self._handler.emit(more)
        finally:
            self._handler.release()
        self._later(place, record)
