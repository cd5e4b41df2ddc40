"""All studies by name."""

from __future__ import annotations

import difflib

from liftlm.errors import ConfigError
from liftlm.studies.adapters import Adapters
from liftlm.studies.baseline import Baseline
from liftlm.studies.domains import Domains
from liftlm.studies.efficiency import Efficiency
from liftlm.studies.failures import Failures
from liftlm.studies.overlap import Overlap
from liftlm.studies.recipes import Recipes
from liftlm.studies.starts import Starts
from liftlm.studies.study import Study
from liftlm.studies.tasks import Tasks

STUDIES: dict[str, type[Study]] = {
    kind.name: kind for kind in (Overlap, Tasks, Domains, Efficiency, Baseline, Failures, Adapters, Recipes, Starts)
}


def make_study(name: str) -> Study:
    """Raises ConfigError for an unknown name."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, 2, 0.4)
        raise ConfigError(f"There is no study '{name}'.", f"Choose {' or '.join(near or sorted(STUDIES))}.")
    return STUDIES[name]()
