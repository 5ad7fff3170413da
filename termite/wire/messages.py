"""Every message that crosses between two machines, on one page.

A message is a msgspec Struct, encoded as a msgpack map with a `type` tag and decoded strictly: a
wrong, missing or extra field is a `WireError`.  Bulk bytes never stand in here: they travel as the
*body* of a request or a reply (`wire/rpc.py`), in pieces.  Paths are bytes, relative to the
exported root, without leading slash; b"" is the root itself.  Hashes are SHA-256, 32 bytes: of the contents,
or of their manifest (`store/manifest.py`).
"""

from __future__ import annotations

import msgspec

from termite.attr.fileattr import FileAttr

VERSION = 4
"""Both ends must speak the same; raised with every incompatible change of this page."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all messages; the class name is the tag."""


class Ok(Message, frozen=True):
    """The answer that carries nothing."""


class Failure(Message, frozen=True):
    """The answer when a request could not be served."""

    code: str  # name of the class in errors.py
    text: str  # what failed, on what, what to try


# -- worker -> coordinator, master -> coordinator, coordinator -> master --------------------------


class WorkerInfo(Message, frozen=True):
    """One live worker, as the coordinator lists it."""

    name: str  # host name and port, unique in the list
    host: str  # address to dial; filled in by the coordinator from the connection if empty
    port: int
    jobs: int  # slots; 0: it is about to leave and takes no new tasks
    arch: str  # platform.machine()
    version: str = ""
    web_port: int = 0  # 0: no pages


class Register(Message, frozen=True):
    """Worker -> coordinator, once per connection; the worker lives as long as the connection."""

    info: WorkerInfo
    version: int = VERSION


class Subscribe(Message, frozen=True):
    """Master -> coordinator, once per connection; `Workers` follows now and on every change."""

    master: str  # user@host:directory, for people
    version: int = VERSION


class Workers(Message, frozen=True):
    """Coordinator -> master: the whole list."""

    workers: list[WorkerInfo]


class Use(Message, frozen=True, array_like=True):
    """What one master has of a worker."""

    master: str
    granted: int  # slots
    running: int


class RunningCommand(Message, frozen=True, array_like=True):
    """For people: what is running on a worker."""

    id: int  # of the task, unique per master
    label: str
    master: str
    for_s: float


class WorkerReport(Message, frozen=True):
    """Worker -> coordinator, every other second on the connection it registered on: how it is, for the pages."""

    state: str  # "running", or what it is about to do
    load: float  # over one minute
    cpu: float  # percent of all cores
    memory_used: int  # bytes
    memory_total: int
    running: int
    done: int  # since the worker's start
    uses: list[Use] = []
    tasks: list[RunningCommand] = []  # those that run for longest, some hundreds at most


class WorkerCommand(Message, frozen=True):
    """Coordinator -> worker, over the connection it registered on: end, or begin anew."""

    kind: str  # "kill" and "restart" let tasks in flight finish; "kill-now" does not


# -- master -> worker -----------------------------------------------------------------------------


class OpenMirror(Message, frozen=True):
    """First request on a master's connection."""

    master: str  # user@host:directory, for people and logs
    root: bytes  # the writable root, relative to /
    uid: int  # the master's user; this user's files appear as the task's own
    gid: int
    jobs: int  # slots wanted
    version: int = VERSION
    sources: list[bytes] = []  # other directories of the project, which tasks must see wherever they lie


class MirrorOpened(Message, frozen=True):
    name: str  # the worker's name
    jobs: int  # slots granted now; 0: all taken, `Granted` will follow
    arch: str


class Granted(Message, frozen=True):
    """Mirror -> master, whenever it changes: how many tasks of this master may run at once."""

    jobs: int


class Want(Message, frozen=True):
    """Master -> mirror: how many slots it has use for; 0 gives all of them back."""

    jobs: int


class Peer(Message, frozen=True, array_like=True):
    """A worker's address, for other workers to dial."""

    host: str
    port: int


class Change(Message, frozen=True, array_like=True):
    """One path that is no longer what the mirror was told (absent: `attr.mode == 0`)."""

    path: bytes
    attr: FileAttr


class Update(Message, frozen=True):
    """Master -> mirror: changes ahead of any task (a `Run` carries its own)."""

    changes: list[Change]


class Prefetch(Message, frozen=True):
    """Master -> mirror: ask for these directories and contents if you lack them; answered when that is done."""

    paths: list[bytes]


class Direct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a command is a shell for (`command/direct.py`): executed instead of it, if it can be.

    If not, the command is executed, which does not say again what has been said.
    """

    says: bytes  # to be written to stdout before
    argv: list[bytes]
    directory: bytes  # to enter before; empty: none
    moved: bytes  # to be renamed if it has succeeded; empty: nothing
    moved_to: bytes


class Run(Message, frozen=True):
    """Master -> mirror: run one command; answered by `Done` when it has ended."""

    task: int  # unique per master
    program: bytes  # absolute path, or a name to be found on the PATH of `env`
    argv: list[bytes]
    env: list[bytes]  # NAME=VALUE
    cwd: bytes
    umask: int
    merged: bool = False  # stdout and stderr are the same open file: keep their order
    stdin: bool = False  # more than an empty stdin: ask with `WantStdin`
    changes: list[Change] = []
    debug: bool = False
    time_limit_s: float = 0.0  # 0: none
    direct: Direct | None = None


class Cancel(Message, frozen=True):
    """Master -> mirror: end this task now; its `Run` is answered with a `Failure`."""

    task: int


class Output(Message, frozen=True):
    """Mirror -> master while the command runs; the bytes are the body; answered when delivered."""

    task: int
    stream: int  # 1 or 2


class WantStdin(Message, frozen=True):
    """Mirror -> master: the command reads its stdin; the answer's body is the next piece (empty: end)."""

    task: int


class FileResult(Message, frozen=True, array_like=True):
    """One name that a command left different from what it found.

    In path order, parents first.  A regular file's contents are the body of the reply
    (`inline_at >= 0`) or are fetched by `hash`.
    """

    path: bytes
    attr: FileAttr  # mode 0: removed.  mtime_ns on the worker's clock; hash set for regular files
    inline_at: int = -1  # offset of the contents in the body of `Done`; -1: fetch by hash
    moved_from: bytes = b""  # what was renamed, a directory or a file with other names: its path before the command
    opaque: bool = False  # a directory that replaced whatever stood there, children included
    link_to: bytes = b""  # another name of the file at this path: a hard link to that result or file
    in_place: bool = False  # written through the existing file (or the renamed one), not replaced by a new one
    kept: bool = False  # contents as before, none sent; with in_place: mode or time are new, else others link to it


class Done(Message, frozen=True):
    """The answer to `Run`.  Body: contents of `files`, one after the other, for as many as fit."""

    status: int  # as waitpid() gives it
    files: list[FileResult] = []
    stdout: bytes = b""  # what was not sent as `Output`
    stderr: bytes = b""
    started_ns: int = 0  # worker's clock
    ended_ns: int = 0
    cpu_us: int = 0  # of the command and its children


class Fetch(Message, frozen=True):
    """Contents by hash; the body of `Fetched`, or the answer is `Elsewhere`.  `path`: where the master has it.

    With `piece`, the hash is that of this piece of the file, which `path` must name then.

    Asked by masters of mirrors, by mirrors of their master, and by workers of each other.
    """

    hash: bytes
    path: bytes = b""
    offset: int = 0
    piece: int = -1
    failed: list[Peer] = []  # those that an earlier answer named and that did not give it


class Fetched(Message, frozen=True):
    size: int  # of the whole contents, or of the piece


class Damaged(Message, frozen=True):
    """Worker -> worker: what you sent does not have this hash; look at your store."""

    hash: bytes


class Elsewhere(Message, frozen=True):
    """Master -> mirror, in answer to `Fetch`: these workers have it, spare my uplink."""

    peers: list[Peer]


class Status(Message, frozen=True):
    """Ask any daemon how it is; the answer is a `StatusText`."""


class StatusText(Message, frozen=True):
    json: bytes


# -- mirror -> master -----------------------------------------------------------------------------


class ReadDir(Message, frozen=True):
    """Everything in one directory; `names` of the answer is all there is."""

    path: bytes


class DirListing(Message, frozen=True):
    exists: bool
    attr: FileAttr  # of the directory itself
    entries: dict[bytes, FileAttr] = {}


class OpenFile(Message, frozen=True):
    """What are the contents of this path?  Small contents come along as the body."""

    path: bytes


class FileInfo(Message, frozen=True):
    """`attr.hash` is set; `inline`: the body holds the contents; `pieces`: it holds their manifest."""

    attr: FileAttr
    inline: bool = False
    pieces: bool = False


class Have(Message, frozen=True):
    """The contents that `Fetch` asked for are now in this worker's store, wherever they came from."""

    hashes: list[bytes]


class Draining(Message, frozen=True):
    """No new tasks, please: one that has not begun is answered with `Leaving`.  Close when you have all results."""

    reason: str  # for people
    again: bool = False  # only this mirror ends; open another one at once


class Check(Message, frozen=True):
    """-paranoia: what does the disk say of this path, and what was I told?"""

    path: bytes


class Checked(Message, frozen=True):
    disk: FileAttr  # with the hash of what is there now; ABSENT if workers may not see it
    told: FileAttr  # ABSENT: never told
    settled: bool  # False: news are on their way, so a difference means nothing
