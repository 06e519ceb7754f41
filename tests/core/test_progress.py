"""Progress: a bar where it is seen, one line in the log where it is not, and how to go on after Ctrl-C."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest

from care_lens.core import progress
from care_lens.core.progress import Steps, bars_are_seen, resume_from, resume_from_store


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, logger="care_lens.core.progress")
    return caplog


def test_without_a_terminal_a_step_is_one_line_of_the_log(heard, capsys):
    assert list(Steps(range(3), desc="reading")) == [0, 1, 2]
    (record,) = heard.records
    assert record.levelno == logging.INFO and record.getMessage().startswith("reading: 3 of 3 in ")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_no_line(heard, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert bars_are_seen()
    with Steps(total=2, desc="reading") as steps:
        steps.update()
        steps.update()
    assert "reading" in terminal.getvalue() and "2/2" in terminal.getvalue()
    assert not heard.records


def test_a_notebook_sees_bars_though_its_stderr_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not bars_are_seen()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert bars_are_seen()
    shell.kernel = None  # IPython in a terminal whose output is sent to a file
    assert not bars_are_seen()


def test_nothing_is_said_where_progress_is_off_nor_of_a_step_without_work(heard):
    with pytest.raises(KeyboardInterrupt), Steps(range(3), desc="a", disable=True, resume="go on") as steps:
        for _ in steps:
            raise KeyboardInterrupt
    list(Steps([], desc="b"))
    list(Steps(range(2), desc="c", disable=True))
    assert not heard.records


def test_ctrl_c_says_how_far_it_was_and_how_to_go_on(heard):
    with pytest.raises(KeyboardInterrupt), Steps(range(5), desc="mediating", resume="call it again") as steps:
        for number in steps:
            if number == 2:
                raise KeyboardInterrupt
    (record,) = heard.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "mediating was stopped at 2 of 5; to go on, call it again"


def test_other_errors_are_not_taken_for_ctrl_c(heard):
    with pytest.raises(ValueError), Steps(total=2, desc="x", resume="call it again"):
        raise ValueError
    assert not heard.records


def test_the_hint_names_the_checkpoint_that_was_given_or_asks_for_one():
    assert "checkpoint='kept'" in resume_from("kept") and "checkpoint='folder'" in resume_from(None)
    assert "'a.jsonl'" in resume_from_store("a.jsonl") and "store=" in resume_from_store(None)


def test_steps_count_where_the_bar_does_not(monkeypatch):
    monkeypatch.setattr(progress, "bars_are_seen", lambda: False)
    steps: Steps[int] = Steps(total=4, initial=1, desc="x")
    steps.update(2)
    assert steps.n == 3
    steps.close()
