"""Puts a rollout backend into an initialised trainer: checks, a daemon, a client, and the injection."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import daemon as daemons
from .contract import check_daemon, check_instance, check_shares_base, differences, eos_token_ids
from .options import RolloutOptions
from .ranks import Ranks
from .report import ReportCallback
from .rollout_backend import Client, RolloutBackend
from .sampling import Sampling
from .trainer_weights import Adapter

log = logging.getLogger(__name__)

ClientFactory = Callable[[str, RolloutOptions], Client]


def connect(address: str, options: RolloutOptions) -> Client:
    """Return this rank's client of a daemon."""
    from rolloutd.serve.client import RolloutClient

    client: Client = RolloutClient(address, token=options.token, timeout=options.timeout_s)
    return client


def start_daemon(engine_options: Any, server_options: Any, timeout_s: float) -> daemons.Daemon:
    """Start a daemon process with the package's own starter."""
    from rolloutd.serve import spawn

    daemon: daemons.Daemon = spawn.start_daemon(engine_options, server_options, timeout_s=timeout_s)
    return daemon


@dataclass(frozen=True)
class Seams:
    """How a client and a daemon are made; tests put others here."""

    connect: ClientFactory = connect
    start_daemon: daemons.Starter = start_daemon


def attach(trainer: Any, options: RolloutOptions, seams: Seams) -> RolloutBackend:
    """Return a backend in place of TRL's; a collective. On an error nothing that was started is left."""
    check_instance(trainer)
    ranks = Ranks.of(trainer.accelerator.num_processes, options.timeout_s + float(trainer.args.ddp_timeout))
    adapter = Adapter.of(trainer.model)
    if options.share_base:
        check_shares_base(trainer, adapter)
    sampling = Sampling.of(trainer, eos_token_ids(trainer))
    if options.address is None:
        endpoint = daemons.start(trainer, options, ranks, seams.start_daemon)
    else:
        endpoint = daemons.Endpoint(options.address)
    try:
        backend = _join(trainer, endpoint, options, seams.connect, ranks=ranks, sampling=sampling, adapter=adapter)
    except BaseException:
        if endpoint.process is not None:
            endpoint.process.stop(daemons.STOP_GRACE_S)
        raise
    endpoint.drop_copy()
    trainer.rollout_daemon = endpoint.process
    _inject(trainer, backend)
    return backend


def _join(
    trainer: Any,
    endpoint: daemons.Endpoint,
    options: RolloutOptions,
    factory: ClientFactory,
    *,
    ranks: Ranks,
    sampling: Sampling,
    adapter: Adapter | None,
) -> RolloutBackend:
    backend: RolloutBackend | None = None
    error: Exception | None = None
    try:
        client = factory(endpoint.address, options)
        weakref.finalize(trainer, client.close)
        info = client.wait_ready(daemons.START_TIMEOUT_S)
        check_daemon(trainer, info)
        backend = RolloutBackend(
            trainer,
            client,
            info,
            ranks=ranks,
            sampling=sampling,
            adapter=adapter,
            base_is_served=adapter is None or (endpoint.copy is not None and not options.share_base),
            lora_mode=options.lora_mode,
            delta=options.delta,
            share_base=options.share_base,
            weight_version=client.health().weight_version,
        )
    except Exception as caught:  # told to all ranks, raised by `agree`
        error = caught
    ranks.agree(error)
    assert backend is not None
    if ranks.is_main:
        for difference in differences(trainer, backend.info, adapter):
            log.warning("%s", difference)
        address, numerics = endpoint.address, backend.info.numerics
        log.info("rollout server joined address=%s numerics=%s ranks=%d", address, numerics, ranks.world_size)
    return backend


def _inject(trainer: Any, backend: RolloutBackend) -> None:
    trainer.use_vllm = True
    trainer.vllm_mode = "server"
    trainer.vllm_generation = backend
    trainer._last_loaded_step = -1
    trainer.add_callback(ReportCallback(weakref.ref(trainer)))
