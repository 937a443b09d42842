"""Who is let in: the count of sequences, the phases, and the salt that keeps tenants' caches apart."""

from types import SimpleNamespace

import pytest

from nibble.server.errors import ApiError
from nibble.server.serving import Serving, cache_salt


def loaded(**limits: int) -> Serving:
    serving = Serving(("tiny",), **limits)
    nothing = SimpleNamespace()
    serving.ready(SimpleNamespace(is_alive=True), nothing, nothing, nothing)
    return serving


def refused(serving: Serving, sequences: int = 1) -> int:
    """The status of the refusal."""
    with pytest.raises(ApiError) as caught:
        serving.admit(sequences)
    return caught.value.status


def test_a_request_counts_as_many_as_it_wants_answers() -> None:
    serving = loaded(max_num_seqs=2, max_queued_requests=3)
    serving.admit(2)
    serving.admit(3)
    assert refused(serving) == 503
    serving.release(1)
    assert refused(serving, 2) == 503
    serving.admit(1)
    assert serving.active_sequences == 5


def test_what_never_fits_is_not_told_to_come_again() -> None:
    serving = loaded(max_num_seqs=2, max_queued_requests=1)
    serving.admit(1)
    assert refused(serving, 3) == 503
    with pytest.raises(ApiError, match="at most 3 on this server, got 4") as caught:
        serving.admit(4)
    assert (caught.value.status, caught.value.param, caught.value.headers) == (400, "n", {})
    assert serving.active_sequences == 1


def test_the_drain_waits_for_the_last_sequence() -> None:
    serving = loaded()
    assert serving.idle.is_set()
    serving.admit(2)
    serving.release(1)
    assert not serving.idle.is_set()
    serving.release(1)
    assert serving.idle.is_set()


def test_only_a_ready_server_admits() -> None:
    serving = Serving(("tiny",))
    assert refused(serving) == 503 and not serving.is_loaded
    serving = loaded()
    serving.drain()
    assert refused(serving) == 503 and serving.alive
    serving = loaded()
    serving.lost()
    assert refused(serving) == 503 and not serving.alive


def test_every_pair_of_key_and_salt_has_a_cache_of_its_own() -> None:
    """Thousands of tenants: none may meet another by the shortness of what is kept of the hash."""
    keys = [f"key-{i}".encode() for i in range(2000)]
    salts = {cache_salt(key, salt) for key in keys for salt in (None, "a", "b")}
    assert len(salts) == 3 * len(keys)
    assert cache_salt(keys[0], "a") == cache_salt(keys[0], "a")
    assert cache_salt(b"", None) == b""
    assert cache_salt(b"", "a") not in salts
