"""What workers with the same inputs share in a database, whatever machines they run on.

A plan's quality does not depend on the machine, its speed does. So there is one study for each kind of machine: its workers suggest
plans that are fast there, by one latency table. Each worker also takes over what was judged in the studies of the other kinds, and
predicts the speed of those plans by its own table. All judge on the same validation windows.

Beside the studies lies what the first worker published: the latency table of its kind of machine, and the validation windows.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any, Final

import optuna

from lrserve.allocation.database import connect, quietly

_CONTENT: Final = "content"


@dataclass(frozen=True)
class Shared:
    """Where workers share a search.

    url: of the database.
    inputs: identifies all that the quality of a plan, and what is searched for, depend on.
    machine: identifies all that its speed depends on.
    """

    url: str
    inputs: str
    machine: str

    @property
    def studies(self) -> str:
        """What the names of the studies of all kinds of machines begin with."""
        return f"lrserve-{self.inputs}-"

    @property
    def name(self) -> str:
        """Name of the study of this kind of machine."""
        return self.studies + self.machine


def first_published(place: Shared, what: str, own: Any) -> Any:
    """Return what the first worker published under a name; that is `own`, JSON, where there was none.

    A worker that finds nothing appends its own as one entry, in one transaction. The database numbers entries one after the other,
    so all workers agree which one is first, and an entry is whole or not there. It is kept compressed, since MySQL takes no more
    than 64 KiB.

    Raises:
        InputError: the database cannot be used (`database.connect`).
    """
    with quietly():
        entries = optuna.create_study(
            study_name=f"lrserve-published-{place.inputs}-{what}", storage=connect(place.url), load_if_exists=True
        )
    if not entries.get_trials(deepcopy=False):
        packed = base64.b85encode(zlib.compress(json.dumps(own).encode(), 9)).decode()
        entries.add_trial(optuna.trial.create_trial(value=0.0, user_attrs={_CONTENT: packed}))
    first = min(entries.get_trials(deepcopy=False), key=lambda entry: entry.number)
    return json.loads(zlib.decompress(base64.b85decode(first.user_attrs[_CONTENT])))
