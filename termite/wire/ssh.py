"""A connection inside SSH, for which both ends prove that they hold the same private key.

`dial` and `accept` take a connected TCP socket and give back one end, not blocking, of a local socket
pair; what is written there comes out at the other side's, encrypted on the way.  Everything above (the handshake,
frames, handing the socket to another process) works on that end as it would on the TCP socket.

The server's host key is the key and the client takes no other; the client signs in with the key and
the server takes no other, and only after that opens one channel.  There are no passwords, commands,
forwardings or files behind it.

Each tunnel is three daemon threads of this process: paramiko's, which reads the network and
decrypts, and one for each direction between the channel and the pair.  What they hold is bounded by
the channel's window.  The tunnel ends when either side ends: what was written before still arrives,
within a limit.  It also ends with this process, even if its end was handed to another one.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import hmac
import io
import logging
import socket
import threading
import time
from collections.abc import Callable

import paramiko
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from termite.errors import AuthError, PeerLost, SecretError, TermiteError, WireError
from termite.wire import auth
from termite.wire.address import format_address, host_of
from termite.wire.handshake import SSH_IDENTITY
from termite.wire.secret import parse_ssh_key

log = logging.getLogger(__name__)

# Paramiko's own lines come with tracebacks; what matters of them is in our errors.
_PARAMIKO_LOG = f"{__name__}.paramiko"
logging.getLogger(_PARAMIKO_LOG).setLevel(logging.CRITICAL)

# At least as long as the challenge that a peer without SSH waits for, so that it can answer at once.
_IDENTITY = SSH_IDENTITY.decode() + "_for_holders_of_the_key_only"
_USER = "termite"
_KEX = ("mlkem768x25519-sha256", "curve25519-sha256@libssh.org")
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
_DIGESTS = ("hmac-sha2-256-etm@openssh.com",)  # negotiated, but unused: the ciphers authenticate
_KEY_TYPES = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}  # of others, the name itself

_WINDOW_BYTES = 8 * 1024 * 1024
_PACKET_BYTES = 256 * 1024  # a piece of a body and its frame
_CHUNK_BYTES = _PACKET_BYTES - 64  # what paramiko puts into one packet
_READ_BYTES = 256 * 1024
_MAX_UNPROVEN_BYTES = 64 * 1024  # an honest peer needs a tenth
_POLL_S = 0.05  # how soon the end of a peer is noticed while it signs in
_LINGER_S = 2.0  # for the peer to take what was sent
_EXIT_LIMIT_S = 1.0

_SAME_FILE = "give both sides the same secret file"
_NO_SSH = f"speaks without SSH: its secret is no SSH key, ours is; {_SAME_FILE}"
_STRANGE = "does not speak our protocol; is it the port of another program?"


async def dial(sock: socket.socket, key: bytes) -> socket.socket:
    """The dialer's side.  `sock` is taken over; a failure or a cancellation closes it.  The caller bounds the time."""
    return await _open(sock, _key(key), _prove_as_client)


async def accept(sock: socket.socket, key: bytes) -> socket.socket:
    """The acceptor's side."""
    return await _open(sock, _key(key), _prove_as_server)


@functools.lru_cache(maxsize=16)
def _key(key: bytes) -> paramiko.PKey:
    private = parse_ssh_key(key)
    text = io.StringIO(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode())
    try:
        if isinstance(private, RSAPrivateKey):
            return paramiko.RSAKey.from_private_key(text)
        if isinstance(private, EllipticCurvePrivateKey):
            return paramiko.ECDSAKey.from_private_key(text)
        return paramiko.Ed25519Key.from_private_key(text)
    except paramiko.SSHException as exc:
        raise SecretError(f"this SSH key cannot be used: {exc}; make another with ssh-keygen -t ed25519") from None


# -- the network side -----------------------------------------------------------------------------


class _Wire:
    """The TCP socket as paramiko sees it: distrusts the peer until it is proven, and reads far ahead afterwards.

    Paramiko's thread may be inside `recv` at any time, so `close` only shuts the socket down, which
    wakes that thread; the descriptor goes with `release`, when nobody uses it any more.
    """

    _closed = False  # paramiko asks

    def __init__(self, sock: socket.socket) -> None:
        self._sock = socket.socket(fileno=sock.detach())
        self._sock.setblocking(True)
        self.peer = _peer_of(self._sock)
        self._ahead = memoryview(b"")
        self._unproven = b""
        self._is_proven = False
        self.has_ended = False  # the peer has sent its last byte

    def settimeout(self, timeout: float | None) -> None:
        """Paramiko would look ten times a second whether to stop; `close` needs no such help."""

    def recv(self, count: int) -> bytes:
        if not self._ahead:
            try:
                data = self._sock.recv(_READ_BYTES if self._is_proven else count)
            except OSError:
                data = b""
            if not self._is_proven:
                self._check(data)
            self.has_ended = not data
            self._ahead = memoryview(data)
        piece, self._ahead = self._ahead[:count], self._ahead[count:]
        return bytes(piece)

    def send(self, data: bytes) -> int:
        """A broken connection swallows everything: what has arrived is still to be read, and its end is found there."""
        try:
            return self._sock.send(data)
        except OSError:
            return len(data)

    def close(self) -> None:
        self._closed = True
        self._shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """The peer will find the end of it after all that was sent."""
        self._shutdown(socket.SHUT_WR)

    def release(self) -> None:
        self._sock.close()

    def proven(self) -> None:
        self._is_proven = True
        self._unproven = b""

    def stranger(self) -> TermiteError | None:
        """What is wrong with a peer that has not even begun to speak SSH."""
        said = self._unproven
        if said.startswith(auth.MAGIC[:-1]):
            return AuthError(_NO_SSH)
        if said and not said.startswith(b"SSH-2.0-"[: len(said)]):
            return AuthError(_STRANGE)
        if len(said) > _MAX_UNPROVEN_BYTES:
            return AuthError("sent too much without proving that it holds our SSH key")
        return None

    def _check(self, data: bytes) -> None:
        self._unproven += data
        if self.stranger() is not None:
            self.close()
            raise EOFError

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            pass


def _peer_of(sock: socket.socket) -> str:
    try:
        address = sock.getpeername()
    except OSError:  # it has gone again
        return "a peer"
    return format_address(host_of(address), address[1])


class _Packetizer(paramiko.packet.Packetizer):  # type: ignore[misc]
    def start_handshake(self, timeout: float) -> None:
        """Its timer is a thread that outlives a failed handshake and holds up the end of the program."""


class _Gate(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets in whoever signs with the key, to one channel and nothing else."""

    def __init__(self, key: paramiko.PKey) -> None:
        self._blob = key.asbytes()
        self._is_taken = False
        self.refused = False

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        if hmac.compare_digest(key.asbytes(), self._blob):
            return int(paramiko.AUTH_SUCCESSFUL)
        self.refused = True
        return int(paramiko.AUTH_FAILED)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        if kind != "session" or self._is_taken:
            return int(paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)
        self._is_taken = True
        return int(paramiko.OPEN_SUCCEEDED)


def _transport(wire: _Wire, key: paramiko.PKey) -> paramiko.Transport:
    transport = paramiko.Transport(
        wire,
        default_window_size=_WINDOW_BYTES,
        default_max_packet_size=_PACKET_BYTES,
        packetizer_class=_Packetizer,
    )
    transport.name = "ssh network"
    transport.set_log_channel(_PARAMIKO_LOG)
    transport.local_version = _IDENTITY
    options = transport.get_security_options()
    options.kex = tuple(name for name in _KEX if name in options.kex)
    options.ciphers = _CIPHERS
    options.digests = _DIGESTS
    options.compression = ("none",)
    options.key_types = _KEY_TYPES.get(key.get_name(), (key.get_name(),))
    return transport


def _prove_as_client(wire: _Wire, transport: paramiko.Transport, key: paramiko.PKey) -> paramiko.Channel:
    transport.start_client()
    if not hmac.compare_digest(transport.get_remote_server_key().asbytes(), key.asbytes()):
        raise AuthError(f"shows another SSH key than ours; {_SAME_FILE}")
    try:
        transport.auth_publickey(_USER, key)
    except paramiko.AuthenticationException:
        if wire.has_ended:
            raise PeerLost("hung up during the handshake") from None
        raise AuthError(f"does not accept our SSH key; {_SAME_FILE}") from None
    wire.proven()
    return transport.open_session()


def _prove_as_server(wire: _Wire, transport: paramiko.Transport, key: paramiko.PKey) -> paramiko.Channel:
    gate = _Gate(key)
    transport.add_server_key(key)
    try:
        transport.start_server(server=gate)
    except EOFError:
        if transport.session_id is None:  # before it was shown anything
            raise
    while (channel := transport.accept(_POLL_S)) is None:
        if gate.refused:
            raise AuthError(f"holds another SSH key than ours; {_SAME_FILE}")
        if not transport.is_active():
            raise AuthError(f"went when it had seen our SSH key, so it probably holds another; {_SAME_FILE}")
    wire.proven()
    return channel


def _reason(exc: Exception, wire: _Wire) -> TermiteError:
    """What to say about a peer with whom SSH did not come about."""
    stranger = wire.stranger()
    if stranger is not None:
        return stranger
    if isinstance(exc, TermiteError):
        return exc
    if isinstance(exc, paramiko.ssh_exception.IncompatiblePeer):
        return AuthError(f"holds another kind of SSH key than ours, or speaks another SSH; {_SAME_FILE}")
    if wire.has_ended or isinstance(exc, EOFError):
        return PeerLost("hung up during the handshake")
    return WireError(f"broke the SSH protocol: {_text(exc)}")


def _text(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


# -- the tunnel -----------------------------------------------------------------------------------

_Prove = Callable[[_Wire, paramiko.Transport, paramiko.PKey], paramiko.Channel]
_Result = socket.socket | TermiteError


async def _open(sock: socket.socket, key: paramiko.PKey, prove: _Prove) -> socket.socket:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    def tell() -> None:
        """Called in the tunnel's thread."""
        try:
            loop.call_soon_threadsafe(set_ready)
        except RuntimeError:  # the loop is no more, nor is anyone who would take the result
            tunnel.abandon()

    wire = _Wire(sock)
    tunnel = _Tunnel(wire, key, prove, tell)
    try:
        tunnel.start()
    except RuntimeError as exc:
        wire.release()
        raise PeerLost(f"cannot be talked to: {exc}") from None
    try:
        await ready
    except asyncio.CancelledError:
        tunnel.abandon()
        raise
    return tunnel.take()


class _Tunnel(threading.Thread):
    """From the proof to the end of one connection; itself the direction from the pair to the channel."""

    def __init__(self, wire: _Wire, key: paramiko.PKey, prove: _Prove, tell: Callable[[], None]) -> None:
        super().__init__(name="ssh out", daemon=True)
        self._wire = wire
        self._key = key
        self._prove = prove
        self._tell = tell
        self._transport: paramiko.Transport | None = None
        self._lock = threading.Lock()
        self._result: _Result | None = None  # until someone takes it
        self._is_abandoned = False
        self._outer: socket.socket | None = None

    def run(self) -> None:
        _running.add(self)
        try:
            self._run()
        finally:
            _running.discard(self)

    def take(self) -> socket.socket:
        """What came of it; to be called once, when it was told."""
        result, self._result = self._result, None
        if isinstance(result, socket.socket):
            return result
        assert result is not None
        raise result

    def abandon(self) -> None:
        """Nobody will take the result."""
        with self._lock:
            self._is_abandoned = True
            self._drop_result()
        self._wire.close()

    def hurry(self) -> None:
        """The process ends: carry what was written so far and no more."""
        _shutdown(self._outer, socket.SHUT_RD) if self._outer is not None else self._wire.close()

    def _run(self) -> None:
        try:
            self._transport = _transport(self._wire, self._key)
            channel = self._prove(self._wire, self._transport, self._key)
            inner, outer = socket.socketpair()
            inner.setblocking(False)
        except Exception as exc:  # whatever a stranger can provoke in paramiko
            self._end_network()
            self._offer(_reason(exc, self._wire))
            return
        self._outer = outer
        inward = threading.Thread(target=_carry_in, args=(channel, outer), name="ssh in", daemon=True)
        inward.start()
        self._offer(inner)
        del inner
        _carry_out(outer, channel)
        self._wire.finish()
        self._transport.join(_LINGER_S)
        self._end_network()
        failure = self._transport.get_exception()
        if failure is not None and not isinstance(failure, EOFError):
            log.warning("the SSH tunnel with %s broke: %s", self._wire.peer, _text(failure))
        _shutdown(outer, socket.SHUT_RDWR)
        inward.join(_LINGER_S)
        outer.close()

    def _offer(self, result: _Result) -> None:
        with self._lock:
            self._result = result
            if self._is_abandoned:
                self._drop_result()
                return
        self._tell()

    def _drop_result(self) -> None:
        if isinstance(self._result, socket.socket):
            self._result.close()
        self._result = None

    def _end_network(self) -> None:
        self._wire.close()
        if self._transport is not None and self._transport.is_alive():
            self._transport.join(_LINGER_S)
        self._wire.release()


def _carry_out(outer: socket.socket, channel: paramiko.Channel) -> None:
    """Until our end is closed; when the channel is, what else is written to the pair is dropped."""
    try:
        while data := outer.recv(_CHUNK_BYTES):
            channel.sendall(data)
        channel.close()
    except (OSError, EOFError, paramiko.SSHException):
        pass
    try:
        # The kernel tells our end that it was reset if anything is left unread here.
        while outer.recv(_CHUNK_BYTES):
            pass
    except OSError:
        pass


def _carry_in(channel: paramiko.Channel, outer: socket.socket) -> None:
    try:
        while data := channel.recv(_READ_BYTES):
            outer.sendall(data)
    except (OSError, EOFError, paramiko.SSHException):
        pass
    # Our end finds the end after what it has not read yet.  It may go on writing until then, to nobody:
    # a broken pipe is news that a transport of asyncio does not expect before the end of file.
    _shutdown(outer, socket.SHUT_WR)


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        pass


_running: set[_Tunnel] = set()


@atexit.register
def _finish_all() -> None:
    """What was said before the program ended is still delivered; daemon threads would just stop."""
    tunnels = list(_running)
    for tunnel in tunnels:
        tunnel.hurry()
    until = time.monotonic() + _EXIT_LIMIT_S
    for tunnel in tunnels:
        tunnel.join(max(0.0, until - time.monotonic()))
