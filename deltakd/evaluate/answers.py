"""Whether a final answer to a math problem is right: what stands in its last \\boxed{}, compared by math-verify.

math-verify parses LaTeX and asks sympy, which may compute for hours or take all memory for `9^{9^{9^9}}`. Its own
timeouts are signals: they work in a main thread alone and do not reach a long integer power. Here a process of its own
judges, with so many seconds of processor time for a pair (not of the clock: a busy machine changes no verdict) and so
much memory. When the kernel has ended it, the pair is not right, and the next pair gets a new process. Starting one
costs about a second; equal texts need none.
"""

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

BOX = "\\boxed{"
SECONDS = 10  # of the processor, for one pair
MEMORY_BYTES = 4 * 2**30


def last_boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed{} that is closed, None where there is none or nothing is in it."""
    begin = text.rfind(BOX)
    while begin >= 0:
        depth, at = 1, begin + len(BOX)
        while at < len(text) and depth:
            if text[at] == "\\":
                at += 1  # \{ and \} are letters of the answer
            elif text[at] in "{}":
                depth += 1 if text[at] == "{" else -1
            at += 1
        if not depth:
            return text[begin + len(BOX) : at - 1].strip() or None
        begin = text.rfind(BOX, 0, begin)
    return None


def gold_answer(stated: str | None, reference: str) -> str | None:
    """Return the right answer of a row: what it states (its own box, if it has one), or its solution's last box."""
    if stated is None or not stated.strip():
        return last_boxed(reference)
    return last_boxed(stated) or stated.strip()


class Judge:
    """Compares answers; any thread may ask. Close it, or use it in `with`."""

    def __init__(self, seconds: int = SECONDS) -> None:
        """`seconds` of the processor are given to a pair."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that judges."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
            self._process = None

    def rows(self, golds: Sequence[str | None], texts: Sequence[str]) -> list[bool | None]:
        """Return for every text whether its last \\boxed{} says the gold answer; None where there is no gold."""
        return [
            None if gold is None else self.is_right(gold, last_boxed(text))
            for gold, text in zip(golds, texts, strict=True)
        ]

    def is_right(self, gold: str, answer: str | None) -> bool:
        """Tell whether an answer means the gold one; one that is missing, or cannot be judged, does not."""
        if answer is None or answer.strip() == gold.strip():
            return answer is not None
        with self._lock:
            for _ in range(2):  # the process may have been ended by others between two pairs
                asked = self._ask(gold, answer)
                if asked is not None:
                    return asked
        return False

    def _ask(self, gold: str, answer: str) -> bool | None:
        """Return the verdict, or None if the process ended over it: then it is asked for once more, by a new one."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([gold, answer]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            return bool(json.loads(line))
        ended_over_it = self._process.wait() != -9  # SIGKILL comes from others, or from a machine without memory
        self._process.communicate()
        self._process = None
        return False if ended_over_it else None


def _judge(seconds: int) -> None:
    """Answer every line on stdin, `[gold, answer]`, with true or false."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + seconds + 1, resource.RLIM_INFINITY))
        gold, answer = (_parsed(parse, text) for text in json.loads(line))
        try:
            right = bool(gold and answer and verify(gold, answer, timeout_seconds=None))
        except Exception:  # sympy's bugs are of any kind
            right = False
        print(json.dumps(right), flush=True)


def _parsed(parse: Any, text: str) -> list[Any]:
    try:
        return list(parse(f"{BOX}{text}}}", parsing_timeout=None))
    except Exception:  # a text of a model, which no parser foresees: not an answer, so not right
        return []


if __name__ == "__main__":
    _judge(int(sys.argv[1]))
