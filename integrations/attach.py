"""Puts a rollout backend into an initialised trainer: checks, a daemon, a client, and the injection."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

from rolloutd.errors import EngineLoading

from . import daemon as daemons
from .contract import check_daemon, check_instance, differences, eos_token_ids
from .options import RolloutOptions
from .ranks import Ranks
from .report import ReportCallback
from .rollout_backend import Client, RolloutBackend
from .sampling import Sampling
from .trainer_weights import Adapter

log = logging.getLogger(__name__)

ClientFactory = Callable[[str, RolloutOptions], Client]
_POLL_S = 0.2


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


def attach(
    trainer: Any, options: RolloutOptions, *, factory: ClientFactory, starter: daemons.Starter
) -> RolloutBackend:
    """Return a backend in place of TRL's; a collective. On an error nothing that was started is left."""
    check_instance(trainer)
    ranks = Ranks.of(trainer.accelerator.num_processes, options.timeout_s + float(trainer.args.ddp_timeout))
    adapter = Adapter.of(trainer.model)
    sampling = Sampling.of(trainer, eos_token_ids(trainer))
    if options.address is None:
        address, process = daemons.start(trainer, options, ranks, starter)
    else:
        address, process = options.address, None
    try:
        backend = _join(trainer, address, options, factory, ranks=ranks, sampling=sampling, adapter=adapter)
    except BaseException:
        if process is not None:
            process.stop(daemons.STOP_GRACE_S)
        raise
    trainer.rollout_daemon = process
    _inject(trainer, backend)
    return backend


def _join(
    trainer: Any,
    address: str,
    options: RolloutOptions,
    factory: ClientFactory,
    *,
    ranks: Ranks,
    sampling: Sampling,
    adapter: Adapter | None,
) -> RolloutBackend:
    backend, error = None, None
    try:
        client = factory(address, options)
        weakref.finalize(trainer, client.close)
        health = wait_until_loaded(client)
        check_daemon(trainer, health.info)
        backend = RolloutBackend(
            trainer,
            client,
            health.info,
            ranks=ranks,
            sampling=sampling,
            adapter=adapter,
            lora_mode=options.lora_mode,
            weight_version=health.weight_version,
        )
    except Exception as caught:  # told to all ranks, raised by `agree`
        error = caught
    ranks.agree(error)
    assert backend is not None
    if ranks.is_main:
        for difference in differences(trainer, backend.info, adapter):
            log.warning("%s", difference)
        log.info(
            "rollout server joined address=%s numerics=%s ranks=%d", address, health.info.numerics, ranks.world_size
        )
    return backend


def wait_until_loaded(client: Client) -> Any:
    """Return the daemon's health once its model is loaded; `EngineLoading` where that takes too long."""
    deadline = time.monotonic() + daemons.START_TIMEOUT_S
    while True:
        health = client.health()
        if health.info is not None:
            return health
        if time.monotonic() > deadline:
            raise EngineLoading(
                f"the daemon was still loading its model after {daemons.START_TIMEOUT_S:g} s. Look into its log."
            )
        time.sleep(_POLL_S)


def _inject(trainer: Any, backend: RolloutBackend) -> None:
    trainer.use_vllm = True
    trainer.vllm_mode = "server"
    trainer.vllm_generation = backend
    trainer._last_loaded_step = -1
    trainer.add_callback(ReportCallback(weakref.ref(trainer)))
