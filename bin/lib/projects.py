"""Real projects from Debian's source packages, and how to build them; for the demo, the benchmark and the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
LIMIT_S = 1200


@dataclass(frozen=True)
class Project:
    """`header`: a file whose change makes much be built again."""

    package: str
    version: str
    configure: str
    header: str
    make: list[str] = field(default_factory=list)
    upstream: bool = False  # without what Debian adds and changes
    suite: str = ""  # the release of Debian that has it; empty: this machine's
    needs: tuple[str, ...] = ()  # Debian packages, besides those of `bin/setup -tests`


PROJECTS = {
    # Debian's patch makes Lua's own Makefile need a libtool that is not there.
    "lua": Project("lua5.4", "5.4", "true", "src/lua.h", ["-C", "src", "linux", "MYLIBS=-lm"], upstream=True),
    "make": Project("make-dfsg", "4.3", "autoreconf -fi && ./configure", "src/filedef.h"),
    "coreutils": Project("coreutils", "9.1", "FORCE_UNSAFE_CONFIGURE=1 ./configure --disable-nls", "src/system.h"),
}

# In C++; for the benchmark alone.  CMake notes the compiler with its directory; without it, what comes first on PATH is
# used, as everywhere else.
CPP_PROJECTS = {
    "fmt": Project(
        "fmtlib",
        "9.1",
        "cmake -DFMT_DOC=off -DCMAKE_BUILD_TYPE=Release . && "
        "find . -name build.make -o -name link.txt | xargs sed -i s,/usr/bin/c++,c++,",
        "include/fmt/format.h",
        ["fmt", "args-test", "assert-test"],
        needs=("googletest",),
    ),
    "re2": Project(  # Debian's source comes without the tables, which are made of its own Unicode data
        "re2",
        "20220601",
        "PATH=/usr/bin:$PATH make REBUILD_TABLES=1 re2/perl_groups.cc re2/unicode_casefold.cc re2/unicode_groups.cc",
        "re2/re2.h",
        ["obj/libre2.a"],
        needs=("unicode-data", "python3-six"),
    ),
}


def clean_environment() -> dict[str, str]:
    """Ours, without what would change how a build runs."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "TERMITE_", "LD_PRELOAD"))}


def unpack(project: Project, directory: Path) -> str:
    """Fetches (once per machine), unpacks and configures a project in a directory that does not exist; its version."""
    flags = ["-upstream"] if project.upstream else []
    flags += ["-suite", project.suite] if project.suite else []
    fetch = [str(CHECKOUT / "bin/debian-source"), *flags, project.package, project.version, str(directory)]
    version = subprocess.run(fetch, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT_S).stdout.strip()
    done = subprocess.run(
        project.configure,
        shell=True,
        cwd=directory,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"configuring {project.package} failed:\n{done.stdout.decode(errors='replace')[-3000:]}")
    return version


def reset(directory: Path, pristine: Path) -> None:
    """Takes away what a build made and puts back what it changed, where it stands: a master may serve it."""
    for where, directories, files in os.walk(directory):
        source = pristine / os.path.relpath(where, directory)
        for name in [d for d in directories if not (source / d).is_dir()]:
            shutil.rmtree(Path(where) / name)
            directories.remove(name)
        for name in files:
            made, original = Path(where) / name, source / name
            if name == ".termite-socket":
                continue
            if not os.path.lexists(original):
                made.unlink()
            elif not made.is_symlink() and made.stat().st_mtime_ns != original.stat().st_mtime_ns:
                shutil.copy2(original, made)
    for where, _, files in os.walk(pristine):
        for name in files:
            missing = directory / os.path.relpath(where, pristine) / name
            if not os.path.lexists(missing):
                shutil.copy2(Path(where) / name, missing, follow_symlinks=False)


def copy_tree(source: Path, target: Path) -> None:
    """A copy with times and links; `target` is replaced."""
    if target.exists():
        shutil.rmtree(target)
    subprocess.run(["cp", "-a", "--", source, target], check=True, timeout=LIMIT_S)
