"""The daemons of these tests."""

from tests.daemon_fixtures import client, daemon, own_run_dir, start_fake

__all__ = ["client", "daemon", "own_run_dir", "start_fake"]
