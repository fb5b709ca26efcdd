"""A program on a terminal of its own, as a person sees it."""

import os
import pty
import re
import select
import signal
import time


class Terminal:
    """Runs `command` on a pseudo-terminal; `screen` is all that it has shown."""

    def __init__(self, command, environment=None):
        self.screen = ""
        self._seen = 0
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, environment or os.environ)

    def type(self, text):
        os.write(self._fd, text.encode())

    def wait_for(self, pattern, timeout=20.0):
        """Seconds until `pattern` is shown after what earlier calls have seen; fails if it is not."""
        start = time.monotonic()
        while not (match := re.compile(pattern).search(self.screen, self._seen)):
            left = start + timeout - time.monotonic()
            assert left > 0 and self._read(left), f"{pattern!r} is not on the screen:\n{self.screen}"
        self._seen = match.end()
        return time.monotonic() - start

    def press_until(self, key, pattern, timeout=20.0):
        """Press `key` until `pattern` is shown: Python's input() misses a Ctrl-C in the moment before it waits."""
        start = time.monotonic()
        while True:
            self.type(key)
            try:
                return self.wait_for(pattern, timeout=1.0)
            except AssertionError:
                if time.monotonic() - start > timeout:
                    raise

    def _read(self, timeout):
        ready, _, _ = select.select([self._fd], [], [], timeout)
        try:
            data = os.read(self._fd, 65536) if ready else b""
        except OSError:  # Linux: the program has ended
            data = b""
        self.screen += data.decode("utf-8", "replace")
        return bool(data)

    def exit_code(self, timeout=20.0):
        """The exit code, once the program has ended."""
        end = time.monotonic() + timeout
        while self._read(max(0.0, end - time.monotonic())):
            pass
        while time.monotonic() < end:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = None
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError(f"still running:\n{self.screen}")

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._fd)
