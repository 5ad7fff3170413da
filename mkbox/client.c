/* Finding the master and asking it one thing; see client.h. */
#define _GNU_SOURCE
#include "client.h"

#include "inplace.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* Connecting and sending end by then: a master that is alive but hangs must not hang every make. */
#define SEND_SECONDS 60

char *working_directory(void) {
    char *cwd = getcwd(NULL, 0);
    if (!cwd) fail(1, "cannot tell the working directory: %s; go to a directory that exists", strerror(errno));
    return cwd;
}

/* ---- the socket ---------------------------------------------------------------------------- */

/* Set when the socket was found by walking up: a file that anybody may have put there. */
static bool found_by_chance;

char *find_socket(void) {
    const char *named = getenv("TERMITE_SOCKET");
    found_by_chance = false;
    if (named && *named == '/') return strdup(named);
    char *cwd = working_directory();
    size_t length = strlen(cwd);
    if (named && *named) return joined(cwd, length, named);
    if (length == 1) length = 0; /* "/": the loop below adds the slash */
    for (;;) {
        struct stat st;
        char *path = joined(cwd, length, SOCKET_NAME);
        if (!lstat(path, &st) && S_ISSOCK(st.st_mode)) {
            found_by_chance = true;
            return path;
        }
        free(path);
        if (!length) return NULL;
        while (cwd[--length] != '/') continue;
    }
}

/* An address holds 107 bytes of path; a longer one is reached through its open directory. */
static int connect_long(int fd, const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) < sizeof address.sun_path) {
        strcpy(address.sun_path, path);
        return connect(fd, (struct sockaddr *)&address, sizeof address);
    }
    const char *name = strrchr(path, '/') + 1;
    char *directory = strndup(path, name - path);
    int at = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
    free(directory);
    if (at < 0) return -1;
    int length = snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", at, name);
    int result = -1;
    if (length >= (int)sizeof address.sun_path) errno = ENAMETOOLONG;
    else result = connect(fd, (struct sockaddr *)&address, sizeof address);
    int error = errno;
    close(at);
    errno = error;
    return result;
}

int connect_to(const char *path) {
    struct stat st;
    if (found_by_chance && !lstat(path, &st) && st.st_uid != geteuid()) {
        errno = EPERM;
        return -1;
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && fd <= STDERR_FILENO) { /* those were closed, and are the command's to find closed */
        int higher = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
        close(fd);
        fd = higher;
    }
    if (fd < 0) return -1;
    struct timeval limit = {.tv_sec = SEND_SECONDS};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (!connect_long(fd, path)) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

const char *why_unreachable(int error) {
    switch (error) {
    case ECONNREFUSED:
    case ENOENT:
        return "nobody listens there; start termite-master in the project root, or use termite-make";
    case EPERM:
        return "it belongs to another user; start your own termite-master, or name this one in TERMITE_SOCKET";
    case EACCES:
        return "permission denied; run as the user who started termite-master";
    case EAGAIN:
        return "the master does not answer; look at its log, or start it again";
    default:
        return strerror(error);
    }
}

/* ---- the request --------------------------------------------------------------------------- */

static bool send_all(int fd, const char *bytes, size_t count) {
    while (count) {
        ssize_t sent = send(fd, bytes, count, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        bytes += sent;
        count -= sent;
    }
    return true;
}

static size_t measured(char **strings, uint32_t *count) {
    size_t bytes = 0;
    for (*count = 0; strings[*count]; ++*count) bytes += strlen(strings[*count]) + 1;
    return bytes;
}

static char *put_u32(char *at, uint32_t value) {
    for (int i = 0; i < 4; i++) at[i] = (char)(value >> 8 * i);
    return at + 4;
}

static uint32_t get_u32(const unsigned char *at) {
    return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

static char *put_all(char *at, char **strings) {
    for (; *strings; strings++) at = stpcpy(at, *strings) + 1;
    return at;
}

bool ask(int fd, const struct request *request) {
    uint32_t argc, envc;
    char *cwd = working_directory();
    char *single[] = {cwd, (char *)request->program, (char *)request->worker, NULL};
    uint32_t singles;
    size_t size = 16 + measured(single, &singles) + measured(request->argv, &argc) + measured(request->env, &envc);
    mode_t mask = umask(0);
    umask(mask);

    char *buffer = allocate(8 + size), *at = buffer;
    at = stpcpy(at, WRAPPER_MAGIC);
    at = put_u32(at, (uint32_t)size);
    at = put_u32(at, request->kind | request->flags << 8);
    at = put_u32(at, mask);
    at = put_u32(at, argc);
    at = put_u32(at, envc);
    at = put_all(at, single);
    at = put_all(at, request->argv);
    at = put_all(at, request->env);
    bool sent = send_all(fd, buffer, at - buffer);
    free(buffer);
    free(cwd);
    return sent;
}

/* ---- the answer ---------------------------------------------------------------------------- */

/* All of it, also to a pipe or terminal that somebody made non-blocking.  A reader that is gone ends this
 * process by SIGPIPE, as it would have ended the command. */
static void write_all(int fd, const char *bytes, size_t count) {
    while (count) {
        ssize_t written = write(fd, bytes, count);
        if (written >= 0) {
            bytes += written;
            count -= written;
        } else if (errno == EAGAIN) {
            struct pollfd ready = {.fd = fd, .events = POLLOUT};
            poll(&ready, 1, -1);
        } else if (errno != EINTR) {
            fail(1, "%s: write error: %s", fd == STDOUT_FILENO ? "stdout" : "stderr", strerror(errno));
        }
    }
}

/* The master asked for a piece of stdin and has not got it yet. */
static bool stdin_wanted;

/* False when the master went away; leaves `stdin_wanted` set when there was nothing to read after all. */
static bool send_stdin(int fd) {
    static char piece[FRAME_HEADER + STDIN_PIECE];
    ssize_t count;
    do count = read(STDIN_FILENO, piece + FRAME_HEADER, STDIN_PIECE);
    while (count < 0 && errno == EINTR);
    if (count < 0 && errno == EAGAIN) return true;
    stdin_wanted = false;
    if (count < 0) count = 0; /* closed or unreadable: the command sees an empty one */
    piece[0] = FRAME_STDIN;
    put_u32(piece + 1, (uint32_t)count);
    return send_all(fd, piece, FRAME_HEADER + count);
}

/* What has come in and is not yet used up: buffer[start..end). */
static unsigned char buffer[256 * 1024];
static size_t start, end;

/* Reads more; false with errno 0 at the end, EAGAIN when the time is up.  While the command waits for
 * stdin, both ends are watched: it may end without ever getting any. */
static bool receive(int fd) {
    if (start == end) start = end = 0;
    if (end == sizeof buffer) { /* only the beginning of a header can be left over */
        memmove(buffer, buffer + start, end - start);
        end -= start;
        start = 0;
    }
    for (;;) {
        if (stdin_wanted) {
            struct pollfd ends[2] = {{.fd = fd, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
            if (poll(ends, 2, -1) < 0 && errno != EINTR) return false;
            if (ends[1].revents && !ends[0].revents) {
                if (!send_stdin(fd)) return errno = 0, false;
                continue;
            }
            if (!ends[0].revents) continue;
        }
        ssize_t count = recv(fd, buffer + end, sizeof buffer - end, 0);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return false;
        if (count == 0) return errno = 0, false;
        end += count;
        return true;
    }
}

static bool has(int fd, size_t bytes) {
    while (end - start < bytes)
        if (!receive(fd)) return false;
    return true;
}

static bool copy_out(int fd, int to, size_t bytes) {
    while (bytes) {
        if (start == end && !receive(fd)) return false;
        size_t part = end - start < bytes ? end - start : bytes;
        write_all(to, (char *)buffer + start, part);
        start += part;
        bytes -= part;
    }
    return true;
}

static bool copy_message(int fd, size_t bytes) {
    char *line = allocate(bytes + 1);
    for (size_t at = 0; at < bytes;) {
        if (start == end && !receive(fd)) return free(line), false;
        size_t part = end - start < bytes - at ? end - start : bytes - at;
        memcpy(line + at, buffer + start, part);
        start += part;
        at += part;
    }
    line[bytes] = 0;
    complain("%s", line);
    free(line);
    return true;
}

static struct answer no_more(void) {
    return (struct answer){errno == EAGAIN ? ANSWER_LATE : ANSWER_LOST, 0};
}

struct answer obey(int fd, int seconds) {
    struct timeval limit = {.tv_sec = seconds};
    if (seconds) setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    const struct answer garbage = {ANSWER_GARBAGE, 0};
    for (;;) {
        if (!has(fd, FRAME_HEADER)) return no_more();
        unsigned char kind = buffer[start];
        uint32_t length = get_u32(buffer + start + 1);
        start += FRAME_HEADER;
        switch (kind) {
        case FRAME_STDOUT:
        case FRAME_STDERR:
            if (!copy_out(fd, kind == FRAME_STDOUT ? STDOUT_FILENO : STDERR_FILENO, length)) return no_more();
            break;
        case FRAME_MESSAGE:
            if (length > 65536) return garbage;
            if (!copy_message(fd, length)) return no_more();
            break;
        case FRAME_WANT:
            if (length) return garbage;
            stdin_wanted = true;
            break;
        case FRAME_EXIT:
            if (length != 4) return garbage;
            if (!has(fd, 4)) return no_more();
            return (struct answer){ANSWER_EXIT, (int)get_u32(buffer + start)};
        case FRAME_LOCAL:
            if (length != 1) return garbage;
            if (!has(fd, 1)) return no_more();
            return (struct answer){ANSWER_LOCAL, buffer[start]};
        default:
            return garbage;
        }
    }
}

void end_like(int wait_status) {
    if (WIFEXITED(wait_status)) _exit(WEXITSTATUS(wait_status));
    if (!WIFSIGNALED(wait_status)) fail(1, "the master answered with the impossible wait status %d", wait_status);
    int number = WTERMSIG(wait_status);
    struct rlimit no_core = {0, 0};
    sigset_t all;
    setrlimit(RLIMIT_CORE, &no_core); /* the core that matters is the command's */
    signal(number, SIG_DFL);
    sigfillset(&all);
    sigprocmask(SIG_UNBLOCK, &all, NULL);
    kill(getpid(), number);
    _exit(128 + number); /* only as init of a PID namespace */
}
