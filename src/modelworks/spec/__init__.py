"""What a run is: typed specs, TOML in and out, and the catalog of facts.

>>> from modelworks.spec import model_spec
>>> model_spec("grok-1").parameters.total
315684820992
"""

from modelworks.spec.errors import InputError, OperationError
from modelworks.spec.files import cluster_spec, device_spec, dumps, load_run, loads_run, model_spec, run_from
from modelworks.spec.hardware import ClusterSpec, DeviceSpec, NetworkSpec
from modelworks.spec.model import LatentAttentionSpec, ModelSpec, MoESpec, ParameterCount
from modelworks.spec.run import (
    CheckpointSpec,
    DataSpec,
    ParallelSpec,
    ReleaseSpec,
    RunSpec,
    TrainSpec,
)

__all__ = [
    "CheckpointSpec",
    "ClusterSpec",
    "DataSpec",
    "DeviceSpec",
    "InputError",
    "LatentAttentionSpec",
    "MoESpec",
    "ModelSpec",
    "NetworkSpec",
    "OperationError",
    "ParallelSpec",
    "ParameterCount",
    "ReleaseSpec",
    "RunSpec",
    "TrainSpec",
    "cluster_spec",
    "device_spec",
    "dumps",
    "load_run",
    "loads_run",
    "model_spec",
    "run_from",
]
