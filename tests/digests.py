"""What a daemon should answer to an update."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rolloutd.weights.digest import tensor_digest
from rolloutd.weights.manifest import WeightManifest
from rolloutd.weights.tensors import bytes_of, spec_of


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """Return the digest of an update of all these tensors."""
    digests = {name: tensor_digest(spec_of(name, tensor), bytes_of(tensor)) for name, tensor in state.items()}
    return WeightManifest(digests, sum(tensor.nbytes for tensor in state.values())).digest
