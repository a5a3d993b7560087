import os
import signal

import pytest

from lowmem_dpo.stopping import catch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_the_second_stops_at_once(number, capfd):
    with pytest.raises(KeyboardInterrupt), catch_signals() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert "Ctrl-C again stops now" in capfd.readouterr().err
        os.kill(os.getpid(), number)
        pytest.fail("went on")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catch_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_first_signal_stops_where_nothing_is_to_be_saved(capfd):
    with pytest.raises(KeyboardInterrupt), catch_signals(requested=True):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    assert capfd.readouterr().err == ""
