"""Progress where there is no terminal: a line now and then, also between two measurements."""

from __future__ import annotations

import pytest

from dtlctl.console import progress


def test_a_line_tells_the_pace_and_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """400 of 1,000 steps were done before; 100 more take 20 s, so the other 500 take 100 s: 2 minutes, rounded."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("pretrain", 1000) as bar:
        bar.goes_on(400, None)
        for step in range(100):
            now[0] = 0.2 * (step + 1)
            bar.advance(1, images=64)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pretrain 451/1000") and lines[0].endswith("2 min left")


def test_a_path_is_said_as_it_is(capsys: pytest.CaptureFixture[str]):
    progress.say("/data/x:dog: [red]")
    assert capsys.readouterr().err == "/data/x:dog: [red]\n"
