"""C that is compiled once for this machine by its C compiler, loaded, and called without the GIL.

Where there is no compiler, or what it makes cannot be loaded, whoever asked does without and the log says why. `CC`
names another compiler. Threads are those of torch's own OpenMP: a second pool would spin on cores that the first needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno")
COMPILE_TIMEOUT_S = 120.0


def compiled(name: str, sources: Sequence[Path], *, without: str) -> ctypes.CDLL | None:
    """Return the library of these sources; None, and `without` in the log beside the reason, where there is none.

    Headers among them are what the others include.
    """
    compiler = (
        shlex.split(os.environ.get("CC", "")) or [found for found in ("cc", "gcc", "clang") if shutil.which(found)][:1]
    )
    if not compiler:
        log.warning("%s=off reason='no C compiler: neither cc, gcc nor clang'; %s", name, without)
        return None
    openmp, reason = _openmp(), ""
    for threads in (openmp, None) if openmp else (None,):
        try:
            library = ctypes.CDLL(str(_build(name, sources, compiler, threads)))
        except (OSError, subprocess.SubprocessError) as error:
            reason = error.stderr.strip()[-400:] if isinstance(error, subprocess.CalledProcessError) else str(error)
            continue
        if reason:  # clang calls an OpenMP library of its own, which torch may not have loaded
            log.warning("%s=one thread reason=%r", name, reason)
        return library
    log.warning("%s=off reason=%r; %s", name, reason, without)
    return None


def _build(name: str, sources: Sequence[Path], compiler: list[str], openmp: Path | None) -> Path:
    """Return the compiled library, from the cache of this user where it has been compiled before."""
    flags = [*FLAGS, _native_flag(), *(["-fopenmp"] if openmp else [])]
    version = _run([*compiler, "--version"])
    key = hashlib.sha256()
    code = [path.read_bytes() for path in sources]
    for part in (*code, version.encode(), repr((compiler, flags, openmp)).encode(), _processor()):
        key.update(part + b"\0")
    folder = _cache_folder()
    library = folder / f"{name}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "made.so")
            built = []
            for source in sources:
                if source.suffix == ".c":
                    built.append(Path(scratch, f"{source.stem}.o"))
                    _run([*compiler, *flags, "-c", str(source), "-o", str(built[-1])])
            linked = [*map(str, built), *([str(openmp)] if openmp else [])]
            _run([*compiler, "-shared", *linked, "-lm", "-o", str(made)])
            made.replace(library)  # as a whole, or not at all: others may be doing the same
        log.info("%s=compiled path=%s", name, library)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    return done.stdout


def _native_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _openmp() -> Path | None:
    """Return the OpenMP library that torch has loaded; None, and one thread, where it cannot be found."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split()[-1] for line in lines if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in sorted(paths) if Path(path).name.startswith(names)]
    return Path(found[0]) if found else None


def _processor() -> bytes:
    """Return what tells processors apart: a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def _cache_folder() -> Path:
    """Return a directory that only this user can write to: what lies there is loaded and run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (base / "rolloutd", Path(tempfile.gettempdir()) / f"rolloutd-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
        except OSError:
            continue
        private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022 and status.st_uid == os.getuid()
        if private and os.access(folder, os.W_OK):
            return folder
    raise OSError(
        f"no private directory for compiled kernels: neither {base / 'rolloutd'} nor one in the system's /tmp"
    )
