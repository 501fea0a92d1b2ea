"""Ctrl-C: once to stop after the present round, twice to leave at once. For the command alone.

A notebook keeps its own: nothing here is installed unless `stop_on_interrupt` is entered.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

EXIT_INTERRUPTED = 130


@contextlib.contextmanager
def stop_on_interrupt(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a stop was asked for, by Ctrl-C or by SIGTERM.

    The first is told by `say`. The second ends the process with exit code 130, whatever it does: a
    thread sees to it, because the main one may be far away in compiled code. Call it from the main
    thread.
    """
    asked = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watched = (signal.SIGINT, signal.SIGTERM)

    def watch() -> None:
        while (number := os.read(reader, 1)[0]) != 0:
            if number not in watched:
                continue
            if asked.is_set():
                os._exit(EXIT_INTERRUPTED)
            asked.set()
            say("finishing this round, then saving; Ctrl-C again leaves at once")

    # With a handler of any kind Python writes the signal's number to the pipe as it comes.
    before = {number: signal.signal(number, lambda *_: None) for number in watched}
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="interrupts", daemon=True)
    thread.start()
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)
