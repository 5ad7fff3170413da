"""Which projects `bin/compat` builds, what each needs from Debian, and how its tree is laid out.

TREE/source    the source package, configured
TREE/build     where an out-of-tree build happens
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from projects import CHECKOUT, LIMIT_S, PROJECTS, Project, unpack

from termite.errors import TermiteError

LLVM_OFF = "ZLIB TERMINFO LIBXML2 LIBEDIT LIBPFM"
LLVM_WITHOUT = "TESTS EXAMPLES BENCHMARKS DOCS"
GUILE_NEEDS = ["flex", "gperf", "libtool", "pkg-config"]
GUILE_NEEDS += ["libffi-dev", "libgc-dev", "libgmp-dev", "libltdl-dev", "libunistring-dev"]


@dataclass(frozen=True)
class Subject:
    """One name on the command line."""

    project: Project
    packages: list[str] = field(default_factory=list)  # beyond those of `bin/setup -tests`
    outside: bool = False  # its build directory stands beside its sources
    rules: str = ""  # patches/NAME.termite-localrc, used with -rules; empty: there is none for it
    unordered: frozenset[str] = frozenset()  # names in TREE whose contents hang on an order that no rule of make sets

    def root(self, tree: Path) -> Path:
        """Where make runs and the master serves."""
        return tree / ("build" if self.outside else "source")

    def master_flags(self) -> list[str]:
        return ["-sourcedir", "../source"] if self.outside else []


def _llvm() -> str:
    """Only what `llvm-tblgen` is made of: the package holds far more."""
    options = [f"-DLLVM_ENABLE_{name}=OFF" for name in LLVM_OFF.split()]
    options += [f"-DLLVM_INCLUDE_{name}=OFF" for name in LLVM_WITHOUT.split()]
    return (
        "find . -mindepth 1 -maxdepth 1 ! -name llvm -exec rm -rf {} + && "
        "rm -rf llvm/test llvm/unittests llvm/docs && cmake -S llvm -B build -G 'Unix Makefiles' "
        f"-DCMAKE_BUILD_TYPE=Release -DLLVM_TARGETS_TO_BUILD=X86 {' '.join(options)}"
    )


MAKE = PROJECTS["make"]
# A release of Guile comes with its compiler compiled; Debian takes that out of the tarball, and ships it in a package.
# Without it, the first two of 338 modules take ten minutes, interpreted.
_DEBIAN = CHECKOUT / "bin/debian-source"
_BUILT = "usr/lib/*/guile/3.0/ccache"
_PREBUILT = f"'{_DEBIAN}' -built -suite trixie guile-3.0-libs 3.0.10 built && "
_PREBUILT += f"cp -r built/{_BUILT}/. prebuilt/64-bit-little-endian/ && rm -r built"
GUILE = Project(
    package="guile-3.0",
    version="3.0.10",
    # All of it but what needs makeinfo or readline.  -flto gives sections of objects random names.  In a release,
    # .version is there; here make would write it, beside the sources, where no worker may write.
    configure="echo 3.0.10 | tee .version >.tarball-version && ./autogen.sh && " + _PREBUILT + " && "
    "./configure --disable-error-on-warning --disable-lto && "
    "sed -i '/^SUBDIRS = /,/[^\\]$/c SUBDIRS = lib meta libguile module stage0 stage1 stage2' Makefile",
    header="libguile/eval.h",
    make=["SOURCE_DATE_EPOCH=1"],  # the library tells when it was built
    upstream=True,
    suite="trixie",  # Debian 12's tarballs are not on every mirror
)
# Compiled with the record types of this stage, or, if they are not compiled yet, with those of the package.
GUILE_UNORDERED = frozenset({"build/stage0/srfi/srfi-18.go"})
EMACS = Project(
    package="emacs",
    version="28",
    # Without manuals, which would need makeinfo: configure takes the file for prebuilt ones.
    configure="mkdir info && touch info/emacs.info && ./autogen.sh autoconf && ./configure --without-all --without-x",
    header="src/lisp.h",
    make=["lisp"],  # and before it all that it needs: lib, lib-src, src
)
# Compiled by plain make, they are one thing if another module is compiled already (eieio-core.elc, cc-fonts.elc),
# another if not; both are compiled at once, and no rule says which first.
EMACS_UNORDERED = frozenset({
    "source/lisp/emacs-lisp/eieio-custom.elc", "source/lisp/emacs-lisp/eieio-opt.elc",
    "source/lisp/progmodes/cc-mode.elc",
})  # fmt: skip
LLVM = Project(
    package="llvm-toolchain-13",  # the smallest that Debian 12 has
    version="13",
    configure=_llvm(),
    header="llvm/include/llvm/ADT/StringRef.h",
    make=["-C", "build", "llvm-tblgen"],
    upstream=True,
)


# Its compiler compiles itself once, not three times, which goes as inside and takes half an hour.  Without the last of
# the three, a text that is made in the end would take longer than all the rest.
GUILE_ONCE = replace(
    GUILE, configure=GUILE.configure.replace(" stage1 stage2", ""), make=[*GUILE.make, "schemelib_DATA="]
)


def _outside(project: Project) -> Project:
    beside = "mkdir ../build && cd ../build && ../source/configure"
    return replace(project, configure=project.configure.replace("./configure", beside))


SUBJECTS = {
    "lua": Subject(PROJECTS["lua"]),
    "make": Subject(MAKE),
    "make-outside": Subject(_outside(MAKE), outside=True),
    "coreutils": Subject(PROJECTS["coreutils"]),
    "guile": Subject(GUILE, GUILE_NEEDS, rules="guile"),
    "guile-outside": Subject(_outside(GUILE_ONCE), GUILE_NEEDS, outside=True, rules="guile", unordered=GUILE_UNORDERED),
    "emacs": Subject(EMACS, ["libncurses-dev"], rules="emacs", unordered=EMACS_UNORDERED),
    "llvm-tblgen": Subject(LLVM, rules="llvm"),
}


def install(packages: list[str]) -> None:
    """By apt-get, those that are missing."""
    missing = [p for p in packages if not _is_installed(p)]
    if not missing:
        return
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        try:
            done = subprocess.run(
                ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as e:
            raise TermiteError(f"cannot install {' '.join(missing)}: {e}") from None
        # Old lists may still do.
        if done.returncode and command[0] == "install":
            words = done.stdout.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            raise TermiteError(f"apt-get install {' '.join(missing)} failed: {words[-1]}")


def _is_installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${Status}", package]
    shown = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False).stdout
    return shown.endswith(b" installed")


def prepare(subject: Subject, tree: Path, rules: bool) -> str:
    """Unpacks and configures below `tree`, which does not exist yet; its version."""
    install(subject.packages)
    package = subject.project.package
    try:
        version = unpack(subject.project, tree / "source")
    except subprocess.CalledProcessError as e:
        raise TermiteError(f"bin/debian-source could not get {package} (status {e.returncode}); see above") from None
    except subprocess.TimeoutExpired as e:
        raise TermiteError(f"unpacking or configuring {package} took more than {e.timeout:.0f} s") from None
    except SystemExit as e:
        raise TermiteError(str(e.code)) from None
    if rules:
        file = CHECKOUT / "patches" / f"{subject.rules}.termite-localrc"
        shutil.copyfile(file, subject.root(tree) / ".termite-localrc")
    return version
