"""The settings of work that is shared out over workers (`--ray`): how many, how large, how patient.

Part of the one tree (`config.LiftConfig.cluster`), in a file of its own. Nothing here decides what an adapter learns.
"""

from __future__ import annotations

from pydantic import Field

from liftlm.setting_types import Branch, Number, Whole


class ClusterConfig(Branch):
    """Workers of a cluster; each holds the base model once."""

    workers: Whole | None = Field(default=None, ge=1)  # None = one a GPU, or, without any, as many as the CPUs hold
    cpus_per_worker: Whole = Field(default=1, ge=1)  # also its threads, unless model.threads says otherwise
    gpus_per_worker: Number | None = Field(default=None, ge=0)  # None = 1 where the cluster has GPUs
    tries: Whole = Field(default=3, ge=1)  # of one document; after so many it is reported and left
    start_seconds: Number = Field(default=600.0, gt=0)  # for the first worker to load the model
    adapters_per_replica: Whole = Field(default=32, ge=1)  # of `lift serve --ray`; the least recently used one goes
    replicas: Whole | None = Field(default=None, ge=1)  # of `lift serve --ray`; None = as many as workers
