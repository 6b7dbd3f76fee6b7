"""Parts of a measurement in a file, from which one that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tt_model.files import read_object, write_text


class Parts:
    """What is made part by part, in JSON's types. With a file every part is kept in it as soon as it is there.

    facts: what the parts depend on. ValueError where the file holds parts of others.
    """

    def __init__(self, file: Path | None, facts: Mapping[str, Any]):
        self.file, self.facts = file, json.loads(json.dumps(facts))
        self.found: dict[str, Any] = {}
        if file is None or not file.is_file():
            return
        stored = read_object(file)
        was, self.found = stored.get("facts", {}), stored.get("parts", {})
        if other := [name for name in {**was, **self.facts} if was.get(name) != self.facts.get(name)]:
            raise ValueError(
                f"{file} is of a measurement with other {', '.join(other)}: remove it, or name another file"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """A part, made if it is not there."""
        if name not in self.found:
            self.found[name] = make()
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.file, json.dumps({"facts": self.facts, "parts": self.found}) + "\n")
        return self.found[name]
