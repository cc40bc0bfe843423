"""What a preflight found, all of it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from rl.errors import user_errors


@dataclass(frozen=True)
class Finding:
    """One thing to mend: an ``error`` stops a run or spoils it, ``advice`` is worth a thought."""

    level: Literal["error", "advice"]
    text: str


@dataclass
class Section:
    """One check: what it saw, and what it found."""

    title: str
    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [f.text for f in self.findings if f.level == "error"]

    @property
    def advice(self) -> list[str]:
        return [f.text for f in self.findings if f.level == "advice"]

    def error(self, text: str) -> None:
        """Note what stops or spoils a run; each text once."""
        if all(f.text != text for f in self.findings):
            self.findings.append(Finding("error", text))

    def advise(self, text: str) -> None:
        """Note what is worth a thought."""
        self.findings.append(Finding("advice", text))

    def fact(self, text: str) -> None:
        """Note what is so."""
        self.facts.append(text)

    def attempt(self, what: Callable[..., Any], *args: Any) -> Any:
        """What ``what(*args)`` returns; None where it raises one of entrl's errors, which is noted."""
        try:
            return what(*args)
        except user_errors() as error:
            self.error(str(error))
            return None


class Report:
    """The sections of a preflight in order."""

    def __init__(self):
        self.sections: list[Section] = []

    @contextmanager
    def section(self, title: str) -> Iterator[Section]:
        """A new section; one of entrl's errors inside is noted and ends it, and a check's own failure is no reason to stop."""
        found = Section(title)
        self.sections.append(found)
        try:
            yield found
        except user_errors() as error:
            found.error(str(error))
        except Exception as error:
            found.error(
                f"this check failed itself, which is a mistake of entrl: {type(error).__name__}: {error}. Please report it."
            )

    @property
    def errors(self) -> list[str]:
        return [text for section in self.sections for text in section.errors]

    @property
    def advice(self) -> list[str]:
        return [text for section in self.sections for text in section.advice]

    def lines(self) -> Iterator[str]:
        """The report as text: a heading a check, facts indented, ``x`` before errors, ``!`` before advice."""
        for section in self.sections:
            state = f"{len(section.errors)} to mend" if section.errors else "ok"
            yield f"{section.title:<16}{state}"
            yield from (f"  {fact}" for fact in section.facts)
            yield from (f"  {'x' if f.level == 'error' else '!'} {f.text}" for f in section.findings)
        yield ""
        yield _count(len(self.errors), "thing to mend", "nothing to mend") + (
            f", {_count(len(self.advice), 'piece of advice', '')}" if self.advice else ""
        )


def _count(number: int, one: str, none: str) -> str:
    if number == 0:
        return none
    first, _, rest = one.partition(" ")
    return f"1 {one}" if number == 1 else f"{number} {first}s {rest}"
